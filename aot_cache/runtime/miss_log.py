"""The misses of this process: the last few for `stats()`, and all as JSON lines in the file that AOT_CACHE_MISSES names.

Several processes may append to one file; each line is one write under a lock. A repeated miss is written the first, second,
fourth, eighth … time, with its count in this process. `aot-cache inspect --misses` shows the file, and
`aot-cache build --misses` builds what it lists.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aot_cache.store import Json

VARIABLE = "AOT_CACHE_MISSES"
SCHEMA = 1
_KEPT = 256
_MOST_IDENTITIES = 65536


@dataclass(frozen=True)
class Miss:
    """One call that found nothing to run.

    Args:
        kind: `graph`, `kernel`, `tuning` or `load`.
        name: `module:qualname` of the function or kernel.
        in_capture, sealed: whether a capture was active, and whether the process was sealed.
        action: what was done: `eager`, `twin`, `first config`, `unsafe`, `refused`, `compiled` or `observed`.
        why: how the call differs from what is installed.
    """

    kind: str
    name: str
    in_capture: bool
    sealed: bool
    action: str
    why: str

    def to_json(self) -> dict[str, Json]:
        return dict(self.__dict__)


class Misses:
    """The misses of this process. Thread-safe."""

    def __init__(self, warn: Callable[[str], None] = warnings.warn) -> None:
        self._lock = threading.Lock()
        self._recent: deque[Miss] = deque(maxlen=_KEPT)
        self._seen: Counter[str] = Counter()
        self._in_capture = 0
        self._warn = warn
        self._cannot_write = False

    def note(self, miss: Miss, facts: Callable[[], Mapping[str, Json] | None]) -> None:
        """Keep a miss. `facts` returns what the next build needs, or None if unknown; it is called only if there is a file."""
        path = os.environ.get(VARIABLE)
        with self._lock:
            self._recent.append(miss)
            self._in_capture += miss.in_capture
        if path and not self._cannot_write:
            try:
                found = facts()
                if found is not None:
                    self._write(path, miss, found)
            except Exception as error:  # the call continues even if its miss cannot be written
                self._cannot_write = isinstance(error, OSError)
                self._warn(f"aot-cache cannot write the miss of {miss.name} to {path}: {error}")

    def count_in_capture(self) -> int:
        """How many misses happened inside captures."""
        return self._in_capture

    def to_json(self) -> list[dict[str, Json]]:
        """The last few, oldest first."""
        with self._lock:
            return [miss.to_json() for miss in self._recent]

    def reset(self) -> None:
        """Forget all (tests)."""
        with self._lock:
            self._recent.clear()
            self._seen.clear()
            self._in_capture = 0
            self._cannot_write = False

    def _write(self, path: str, miss: Miss, facts: Mapping[str, Json]) -> None:
        head = {"aot-cache miss": SCHEMA, **miss.to_json()}
        same = [miss.kind, miss.name, miss.action, miss.in_capture, miss.sealed, facts]
        identity = hashlib.sha256(json.dumps(same, sort_keys=True, default=str).encode()).hexdigest()
        with self._lock:
            if len(self._seen) < _MOST_IDENTITIES or identity in self._seen:
                self._seen[identity] += 1
            seen = self._seen[identity]
        if seen and seen & (seen - 1) == 0:
            append(path, json.dumps({**head, "pid": os.getpid(), "seen": seen, **facts}))


def append(path: str, line: str) -> None:
    """Append a line with one write under a lock: other processes append to the same file.

    Raises:
        OSError: the file cannot be written.
    """
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        data = (line + "\n").encode()
        written = os.write(handle, data)
        if written != len(data):  # the disk is full; readers skip the incomplete line
            raise OSError(28, "no space left on device")
    finally:
        os.close(handle)
