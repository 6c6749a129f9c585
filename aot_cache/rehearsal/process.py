"""Start the process that has only the bundle, and listen to it: what it says, how it ends, and where it was then."""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import IO, Any

Json = Any
_KEPT = ("AOT_CACHE_CONFIG", "AOT_CACHE_DEBUG", "AOT_CACHE_MISSES", "AOT_CACHE_UNTESTED")


@dataclass(frozen=True)
class Died(Exception):
    """The process ended before it was done.

    Args:
        how: with which signal or code, and its last words.
    """

    how: str


def events(job: Mapping[str, Json], timeout: float | None, compiler: bool) -> Iterator[Mapping[str, Json]]:
    """Run the process in the current folder and yield its events.

    Args:
        timeout: seconds without a word after which it is killed; None: never.
        compiler: whether it may run a C compiler, for the recipe's own sake.

    Raises:
        Died: it ended before it was done, or was killed.
    """
    with tempfile.TemporaryDirectory(prefix="aot-cache-") as scratch, _started(job, Path(scratch), compiler) as child:
        said: queue.Queue[str | None] = queue.Queue()
        last_words: deque[str] = deque(maxlen=20)
        assert child.stdout is not None and child.stderr is not None
        readers = [
            Thread(target=_lines, args=(child.stdout, said), daemon=True),
            Thread(target=_drain, args=(child.stderr, last_words), daemon=True),
        ]
        for reader in readers:
            reader.start()
        finished = False
        while not finished:
            try:
                line = said.get(timeout=timeout)
            except queue.Empty:
                child.kill()
                raise Died(f"it was killed after {timeout:g} s without a word") from None
            if line is None:
                break
            event = json.loads(line)
            finished = event["event"] in ("end", "error")
            yield event
        if finished:
            return
        code = child.wait()
        readers[1].join(10)
        words = [word.strip() for word in last_words if word.strip()]
        raise Died(f"{_how(code)}: {words[-1] if words else 'no word'}")


def _how(code: int) -> str:
    if code >= 0:
        return f"it ended with code {code}"
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return f"it was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


@contextmanager
def _started(job: Mapping[str, Json], scratch: Path, compiler: bool) -> Iterator[subprocess.Popen[str]]:
    """The process, which does not outlive the block."""
    child = subprocess.Popen(
        [sys.executable, "-m", "aot_cache.rehearsal.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(scratch, job["rank"], job["ranks"], compiler),
        text=True,
    )
    try:
        assert child.stdin is not None
        try:
            child.stdin.write(json.dumps(job) + "\n")
            child.stdin.close()
        except BrokenPipeError:
            pass  # it is dead already, which its silence says
        yield child
    finally:
        child.kill()
        child.wait()


def environment(scratch: Path, rank: int, ranks: int, compiler: bool) -> dict[str, str]:
    """Where nothing is but what a server has: no cache that anybody filled, no setting of ours, no C compiler."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or not name.startswith("AOT_CACHE")}
    for name in ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE"):
        kept.pop(name, None)
    kept |= {"TRITON_CACHE_DIR": str(scratch / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
    if not compiler:
        kept |= {"CC": "/bin/false", "CXX": "/bin/false"}
    if ranks > 1:
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
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
