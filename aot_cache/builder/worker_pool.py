"""The processes of one build: started, listened to, and none of them outlives it."""

from __future__ import annotations

import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from threading import Lock, Thread
from types import TracebackType
from typing import IO, Any, TypeVar

from aot_cache import errors
from aot_cache.builder import fingerprint
from aot_cache.errors import TargetError
from aot_cache.process_group import ProcessGroup

Json = Any
T = TypeVar("T")
Progress = Callable[[str, int, int], None]


class OtherRanks(Exception):
    """A worker has read the recipe, and it is for a job of so many ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks


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
        self._running: set[ProcessGroup] = set()
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
            TargetError: it died.
        """
        for event in self._talk(job, environment, last):
            kind = event["event"]
            if kind == "progress":
                with self._lock:
                    self._progress(event["stage"], event["done"], event["total"])
            elif kind == "ranks":
                raise OtherRanks(event["ranks"])
            elif kind == "error":
                raise getattr(errors, event["type"])(event["wanted"], event["found"], event["do"])
            else:
                answer.update({**event, "inputs": fingerprint.both(answer["inputs"], event.get("inputs", {}))})
                if then and kind in then:
                    then[kind]()

    def _talk(self, job: Mapping[str, Json], environment: Mapping[str, str], last: str) -> Iterator[Json]:
        """Start a worker, hand it the job, yield its events, of which `last` is the last."""
        group = self._start(environment)
        worker = group.process
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
            if finished:
                worker.wait()  # it has nothing more to say, and has yet to write what it knows
            group.end()  # the reader gave up (Ctrl-C, an error), or it died: nobody waits for what children would write
            with self._lock:
                self._running.discard(group)
            listener.join()
            worker.stdout.close()
            worker.stderr.close()
        if not finished:
            words = [w.strip() for w in last_words if w.strip()]
            raise TargetError(
                "the build worker to finish",
                f"it ended with code {worker.returncode}: {words[-1] if words else 'no word'}",
            )

    def _start(self, environment: Mapping[str, str]) -> ProcessGroup:
        with self._lock:
            if self._ended:
                raise TargetError("the build to go on", "it was given up")
            group = ProcessGroup([sys.executable, "-m", "aot_cache.builder.worker"], environment)
            self._running.add(group)
            return group


def _drain(stream: IO[str], into: deque[str]) -> None:
    show = os.environ.get("AOT_CACHE_DEBUG") == "1"
    for line in stream:
        into.append(line)
        if show:
            sys.stderr.write(line)
