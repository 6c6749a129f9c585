"""The processes of one build: started, listened to, and none of them outlives it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from threading import Lock, Thread
from types import TracebackType
from typing import IO, Any, TypeVar

from aot_cache import errors
from aot_cache.build import stamp
from aot_cache.errors import TargetError

Json = Any
T = TypeVar("T")
Progress = Callable[[str, int, int], None]


class OtherRanks(Exception):
    """A worker has read the recipe, and it is for a job of so many ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks


class Died(TargetError):
    """A worker ended without its last word.

    Args:
        at: (case, point) that it was running; None where it was at nobody's code.
    """

    def __init__(self, why: str) -> None:
        super().__init__("the build worker to finish", why)
        self.why = why
        self.at: tuple[str, dict[str, int]] | None = None


def beside(function: Callable[[], T]) -> Future[T]:
    """Let something go on in a thread for which nobody has to wait, not even at the process's end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, daemon=True).start()
    return future


class Crew:
    """Worker processes; those that run when the block ends are killed.

    Args:
        progress: called by one of them at a time.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._lock = Lock()
        self._running: set[subprocess.Popen[str]] = set()
        self._ended = False

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            for worker in self._running:
                worker.kill()

    def listen(
        self,
        job: Mapping[str, Json],
        environment: Mapping[str, str],
        last: str,
        answer: dict[str, Json],
        then: Mapping[str, Callable[[], None]] | None = None,
    ) -> None:
        """Run one worker and add its events to `answer`; what it read is added to what others read.

        Args:
            last: the event with which it is done.
            then: event → what is called when it has come.

        Raises:
            AotCacheError: what the worker raised.
            OtherRanks: it should have been started in another job.
            Died: it ended without a word.
        """
        at: tuple[str, dict[str, int]] | None = None
        events = self._talk(job, environment, last)
        while True:
            try:
                event = next(events)
            except StopIteration:
                return
            except Died as died:
                died.at = at
                raise
            kind = event["event"]
            if kind == "at":
                at = (event["case"], event["point"]) if "case" in event else None
            elif kind == "progress":
                with self._lock:
                    self._progress(event["stage"], event["done"], event["total"])
            elif kind == "ranks":
                raise OtherRanks(event["ranks"])
            elif kind == "error":
                raise getattr(errors, event["type"])(event["wanted"], event["found"], event["do"])
            else:
                answer.update({**event, "inputs": stamp.both(answer["inputs"], event.get("inputs", {}))})
                if then and kind in then:
                    then[kind]()

    def _talk(self, job: Mapping[str, Json], environment: Mapping[str, str], last: str) -> Iterator[Json]:
        """Start a worker, hand it the job, yield its events, of which `last` is the last."""
        worker = self._start(environment)
        assert worker.stdin is not None and worker.stdout is not None and worker.stderr is not None
        last_words: deque[str] = deque(maxlen=20)
        listener = Thread(target=_drain, args=(worker.stderr, last_words), daemon=True)
        listener.start()
        finished = False
        try:
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.close()
            for line in worker.stdout:
                event = json.loads(line)
                finished = finished or event["event"] in ("error", "ranks", last)
                yield event
        finally:
            if worker.poll() is None and not finished:
                worker.kill()  # the reader gave up (Ctrl-C, an error): nobody waits for what it would write
            worker.wait()
            with self._lock:
                self._running.discard(worker)
            listener.join()
            worker.stdout.close()
            worker.stderr.close()
        if not finished:
            words = [w.strip() for w in last_words if w.strip()]
            raise Died(f"it ended with code {worker.returncode}: {words[-1] if words else 'no word'}")

    def _start(self, environment: Mapping[str, str]) -> subprocess.Popen[str]:
        with self._lock:
            if self._ended:
                raise TargetError("the build to go on", "it was given up")
            worker = subprocess.Popen(
                [sys.executable, "-m", "aot_cache.build.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=dict(environment),
                text=True,
            )
            self._running.add(worker)
            return worker


def _drain(stream: IO[str], into: deque[str]) -> None:
    show = os.environ.get("AOT_CACHE_DEBUG") == "1"
    for line in stream:
        into.append(line)
        if show:
            sys.stderr.write(line)
