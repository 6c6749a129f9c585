"""The worker processes of one build: starts them, reads their events, and kills those that still run at its end."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock, Thread
from types import TracebackType
from typing import IO, TypeVar

from aot_cache import errors
from aot_cache.builder import messages
from aot_cache.builder.messages import Answer, Event, Job, NeedsRanks, OtherRanks, Progressed, Raised, StartJob, Warned
from aot_cache.errors import TargetError
from aot_cache.process_group import ProcessGroup

T = TypeVar("T")
Progress = Callable[[str, int, int], None]
_MOST_AT_ONCE = 64
"""Maximum of threads, each of which reads one worker; the caller limits how many workers run at once."""


class WorkerPool:
    """A pool of worker processes. Those that still run when the block ends are killed.

    Args:
        progress: callback; never called concurrently.

    Attributes:
        warnings: what workers have warned of, each text once and in order.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self.warnings: dict[str, None] = {}
        self._lock = Lock()
        self._running: set[ProcessGroup] = set()
        self._ended = False
        self._threads = ThreadPoolExecutor(_MOST_AT_ONCE, "aot-cache-build")

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            for worker in self._running:
                worker.kill()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in a thread. When the pool is closed, its workers are killed, so it ends, too."""
        return self._threads.submit(function)

    def run(
        self, job: Job | StartJob, environment: Mapping[str, str], then: Callable[[Answer], None] | None = None
    ) -> list[Answer]:
        """Run one worker until it is done; returns its answers in order.

        Args:
            then: called with each answer as soon as it arrives.

        Raises:
            AotCacheError: the worker raised it.
            OtherRanks: the worker needs another world size.
            TargetError: the worker died.
        """
        answers: list[Answer] = []
        for event in self._talk(job, environment):
            if isinstance(event, Progressed):
                with self._lock:
                    self._progress(event.stage, event.done, event.total)
            elif isinstance(event, Warned):
                with self._lock:
                    self.warnings[event.text] = None
            elif isinstance(event, NeedsRanks):
                raise OtherRanks(event.ranks)
            elif isinstance(event, Raised):
                raise getattr(errors, event.type)(event.expected, event.found, event.hint)
            else:
                answers.append(event)
                if then is not None:
                    then(event)
        return answers

    def _talk(self, job: Job | StartJob, environment: Mapping[str, str]) -> Iterator[Event]:
        """Start a worker, send it the job, and yield its events."""
        group = self._start(environment)
        worker = group.process
        assert worker.stdin is not None and worker.stdout is not None and worker.stderr is not None
        last_words: deque[str] = deque(maxlen=20)
        listener = Thread(target=_drain, args=(worker.stderr, last_words), daemon=True)
        listener.start()
        finished = False
        try:
            worker.stdin.write(job.written() + "\n")
            worker.stdin.close()
            for line in worker.stdout:
                event = messages.read(line)
                finished = finished or isinstance(event, (Raised, NeedsRanks, messages.last_of(job)))
                yield event
        finally:
            if finished:
                worker.wait()  # it has sent its last event, but may still be writing
            group.end()  # also if the reader gave up (Ctrl-C, an error) or the worker died: children are not waited for
            with self._lock:
                self._running.discard(group)
            listener.join()
            worker.stdout.close()
            worker.stderr.close()
        if not finished:
            words = [w.strip() for w in last_words if w.strip()]
            raise TargetError(
                f"the build worker ended with exit code {worker.returncode}: {words[-1] if words else 'no output'}",
                hint="set AOT_CACHE_DEBUG=1 to see its output",
            )

    def _start(self, environment: Mapping[str, str]) -> ProcessGroup:
        with self._lock:
            if self._ended:
                raise TargetError("the build was cancelled")
            group = ProcessGroup([sys.executable, "-m", "aot_cache.builder.worker"], environment)
            self._running.add(group)
            return group


def _drain(stream: IO[str], into: deque[str]) -> None:
    show = os.environ.get("AOT_CACHE_DEBUG") == "1"
    for line in stream:
        into.append(line)
        if show:
            sys.stderr.write(line)
