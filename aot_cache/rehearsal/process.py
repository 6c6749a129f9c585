"""Starts the process that has only the bundle, and reads its events and how it ends."""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import IO

from aot_cache.files import scratch
from aot_cache.process_group import ProcessGroup
from aot_cache.recipes.options import CONFIG_VARIABLE
from aot_cache.store import Json

_KEPT = (CONFIG_VARIABLE, "AOT_CACHE_DEBUG", "AOT_CACHE_MISSES", "AOT_CACHE_UNTESTED")


class Died(Exception):
    """The process ended early; the message has its signal or exit code, and its last line of stderr."""


def events(job: Mapping[str, Json], timeout: float | None) -> Generator[Mapping[str, Json], None, None]:
    """Run the process in the current folder and yield its events.

    Args:
        timeout: seconds that it may take for one point before it is killed; None: no limit.

    Raises:
        Died: it ended before it was done, or was killed.
    """
    with scratch.folder() as folder, _started(job, folder) as child:
        patience = None
        while (line := child.line(patience)) is not None:
            event = json.loads(line)
            yield event
            if event["event"] in ("end", "error"):
                return
            patience = timeout if event["event"] == "at" else None
        raise Died(child.last())


def _how(code: int) -> str:
    if code >= 0:
        return f"it ended with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"it was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


class _Child:
    """The process and its output."""

    def __init__(self, group: ProcessGroup) -> None:
        self._group, self.process = group, group.process
        process = self.process
        self._said: queue.Queue[str | None] = queue.Queue()
        self._last_words: deque[str] = deque(maxlen=20)
        self._readers = [
            Thread(target=_lines, args=(process.stdout, self._said), daemon=True),
            Thread(target=_drain, args=(process.stderr, self._last_words), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def line(self, timeout: float | None) -> str | None:
        """The next line of its output; None at the end.

        Raises:
            Died: there was no line within `timeout` seconds.
        """
        try:
            return self._said.get(timeout=timeout)
        except queue.Empty:
            raise Died(f"it was killed after {timeout:g} s without an answer") from None

    def last(self) -> str:
        """How it ended, and its last line of stderr."""
        code = self.process.wait()
        self._readers[1].join()
        words = [word.strip() for word in self._last_words if word.strip()]
        return f"{_how(code)}: {words[-1] if words else 'no word'}"

    def end(self) -> None:
        """Kill the process and everything that it started, and close its pipes."""
        self._group.end()
        for reader in self._readers:
            reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()


@contextmanager
def _started(job: Mapping[str, Json], folder: Path) -> Iterator[_Child]:
    group = ProcessGroup([sys.executable, "-m", "aot_cache.rehearsal.child"], environment(folder, job))
    child, process = _Child(group), group.process
    try:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it is dead already; `line` then reports that
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.close()
        yield child
    finally:
        child.end()


def environment(folder: Path, job: Mapping[str, Json]) -> dict[str, str]:
    """The environment of a server: empty caches, no AOT_CACHE variables except `_KEPT`, no C compiler.

    With `compiler` in the job, a C compiler is left available, because the recipe's own code needs one.
    """
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith("AOT_CACHE")}
    for name in ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE"):
        kept.pop(name, None)
    kept |= {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
    if not job["compiler"]:
        kept |= {"CC": "/bin/false", "CXX": "/bin/false"}
    if job["config"]:
        kept[CONFIG_VARIABLE] = job["config"]
    if job["ranks"] > 1:
        names = {"RANK": job["rank"], "LOCAL_RANK": job["rank"]}
        names |= {"WORLD_SIZE": job["ranks"], "LOCAL_WORLD_SIZE": job["ranks"]}
        kept |= {name: str(value) for name, value in names.items()}
    kept["PYTHONPATH"] = os.pathsep.join(path for path in (os.getcwd(), kept.get("PYTHONPATH", "")) if path)
    return kept


def _lines(stream: IO[str], into: queue.Queue[str | None]) -> None:
    for line in stream:
        into.put(line)
    into.put(None)


def _drain(stream: IO[str], into: deque[str]) -> None:
    show = os.environ.get("AOT_CACHE_DEBUG") == "1"
    for line in stream:
        into.append(line)
        if show:
            sys.stderr.write(line)
