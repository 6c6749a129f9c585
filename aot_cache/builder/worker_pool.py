"""The worker processes of one build: starts them, reads their events, and kills those that still run at its end."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
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


@dataclass(frozen=True, eq=False)
class Worker:
    """A worker process, and what reads its stderr.

    Args:
        last_words: the last lines of it.
    """

    group: ProcessGroup
    listener: Thread
    last_words: deque[str]


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
        self._waiting: set[Worker] = set()
        self._ended = False
        self._threads = ThreadPoolExecutor(_MOST_AT_ONCE, "aot-cache-build")

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._ended = True
            for group in self._running:
                group.kill()
            waiting = [*self._waiting]
        for worker in waiting:
            self.dismiss(worker)
        self._threads.shutdown(wait=False, cancel_futures=True)

    def submit(self, function: Callable[[], T]) -> Future[T]:
        """Call a function in a thread. When the pool is closed, its workers are killed, so it ends, too."""
        return self._threads.submit(function)

    def prepare(self, job: Job, environment: Mapping[str, str]) -> Worker:
        """Start a worker that does what it can before the rest of its job is known, for `run` or `dismiss`.

        Raises:
            TargetError: the pool is closed.
        """
        worker = self._start(environment)
        with self._lock:
            self._waiting.add(worker)
        _write(worker, replace(job, waits=True))
        return worker

    def dismiss(self, worker: Worker) -> None:
        """End a prepared worker that nothing is left for."""
        with self._lock:
            self._waiting.discard(worker)
        self._end(worker)

    def run(
        self,
        job: Job | StartJob,
        environment: Mapping[str, str],
        then: Callable[[Answer], None] | None = None,
        prepared: Worker | None = None,
    ) -> list[Answer]:
        """Run one worker until it is done; returns its answers in order.

        Args:
            then: called with each answer as soon as it arrives.
            prepared: a worker that was prepared for this job, in the same environment.

        Raises:
            AotCacheError: the worker raised it.
            OtherRanks: the worker needs another world size.
            TargetError: the worker died.
        """
        answers: list[Answer] = []
        for event in self._talk(job, environment, prepared):
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

    def _talk(self, job: Job | StartJob, environment: Mapping[str, str], prepared: Worker | None) -> Iterator[Event]:
        """Send the job to a worker, and yield its events."""
        worker = prepared or self._start(environment)
        with self._lock:
            self._waiting.discard(worker)
        process, finished = worker.group.process, False
        assert process.stdin is not None and process.stdout is not None
        try:
            _write(worker, job)
            with suppress(BrokenPipeError):
                process.stdin.close()
            for line in process.stdout:
                event = messages.read(line)
                finished = finished or isinstance(event, (Raised, NeedsRanks, messages.last_of(job)))
                yield event
        finally:
            if finished:
                process.wait()  # it has sent its last event, but may still be writing
            self._end(worker)
        if not finished:
            words = [w.strip() for w in worker.last_words if w.strip()]
            raise TargetError(
                f"the build worker ended with exit code {process.returncode}: {words[-1] if words else 'no output'}",
                hint="set AOT_CACHE_DEBUG=1 to see its output",
            )

    def _start(self, environment: Mapping[str, str]) -> Worker:
        with self._lock:
            if self._ended:
                raise TargetError("the build was cancelled")
            group = ProcessGroup([sys.executable, "-m", "aot_cache.builder.worker"], environment)
            self._running.add(group)
        last_words: deque[str] = deque(maxlen=20)
        listener = Thread(target=_drain, args=(group.process.stderr, last_words), daemon=True)
        listener.start()
        return Worker(group, listener, last_words)

    def _end(self, worker: Worker) -> None:
        """Also if its reader gave up (Ctrl-C, an error) or it died: its children are not waited for."""
        worker.group.end()
        with self._lock:
            self._running.discard(worker.group)
        worker.listener.join()
        for pipe in (worker.group.process.stdin, worker.group.process.stdout, worker.group.process.stderr):
            if pipe is not None:
                with suppress(OSError):  # what was not read any more
                    pipe.close()


def _write(worker: Worker, job: Job | StartJob) -> None:
    pipe = worker.group.process.stdin
    assert pipe is not None
    with suppress(BrokenPipeError):  # it has ended already: it has said why, or its exit code does
        pipe.write(job.written() + "\n")
        pipe.flush()


def _drain(stream: IO[str], into: deque[str]) -> None:
    show = os.environ.get("AOT_CACHE_DEBUG") == "1"
    for line in stream:
        into.append(line)
        if show:
            sys.stderr.write(line)
