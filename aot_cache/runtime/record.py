"""Record what a real program launches and which compiled functions it calls, as a plan in the builder's format.

`with recording(): …` records this process; `run_command` runs a program and every Python process that it starts.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from aot_cache.artifact import engine_cache
from aot_cache.artifact.engine_cache import Caches
from aot_cache.artifact.plan import Plan
from aot_cache.artifact.plan_of_ranks import of_processes
from aot_cache.errors import DeclarationError
from aot_cache.files import scratch
from aot_cache.recordings import plans
from aot_cache.recordings.calls import CallLog
from aot_cache.recordings.plans import Candidates
from aot_cache.upstream import after_import
from aot_cache.upstream.codec import torch_ranks
from aot_cache.upstream.hooks import dynamo_calls, process_end, torch_capture

FOLDER_VARIABLE = "AOT_CACHE_RECORD_TO"
NAME_VARIABLE = "AOT_CACHE_RECORD_NAME"
CANDIDATES_VARIABLE = "AOT_CACHE_RECORD_CANDIDATES"


class Recording:
    """An active recording; `plan()` returns what was launched so far. Its methods may be called from any thread."""

    def __init__(self, name: str, candidates: Candidates = "launched") -> None:
        from aot_cache.upstream.hooks.triton_launches import LaunchLog, record_launches

        self._name, self._candidates = name, candidates
        self._log = LaunchLog()
        self._calls = CallLog(lambda: self._log.changed())
        self._undo = [
            record_launches(self._log, every_candidate=candidates == "all"),
            dynamo_calls.note_calls(self._calls.note),
        ]
        self._target = ""

    @property
    def locks(self) -> tuple[threading.RLock, ...]:
        """Held while a launch or a call is written down."""
        return (self._log.lock, self._calls.lock)

    def when_changed(self, action: Callable[[], None]) -> None:
        """Call `action()` after each launch of a new specialization, each new choice of an autotuner, and each call of a compiled
        function with new sizes."""
        self._log.changed = action

    def note_call(self, *call: Any) -> None:
        """Record a call of a compiled function, see `CallLog.note`."""
        self._calls.note(*call)

    def stop(self) -> None:
        """Stop recording: take the hooks out."""
        while self._undo:
            self._undo.pop()()

    def clear(self) -> None:
        """Forget what was recorded so far (used between points, to compare each)."""
        self._log.forget()
        self._calls.forget()

    def plan(self) -> Plan:
        """What was launched, as a plan.

        Raises:
            DeclarationError: a kernel was launched, but CUDA is not initialised.
        """

        def target(kernels: bool) -> str:
            if not kernels and not torch_capture.cuda_is_up():
                return "cpu"
            self._target = self._target or _target_id()
            return self._target

        return plans.of_logs(self._log, self._calls, self._name, target, self._candidates)


@contextlib.contextmanager
def recording(name: str = "recorded") -> Iterator[Recording]:
    """Record what this process launches inside the block. Costs about 20 microseconds for each launch."""
    started = Recording(name)
    try:
        yield started
    finally:
        started.stop()


def run_command(command: list[str], out: Path, name: str, candidates: Candidates = "launched") -> tuple[int, Plan]:
    """Run a command, and record the launches of all its Python processes, also of those that are killed.

    Returns:
        (the command's exit code, the plan). The plan is also written to `out`.

    Raises:
        DeclarationError: the command cannot be started, or nothing was launched.
    """
    with scratch.folder() as folder:
        environment = dict(os.environ)
        environment[FOLDER_VARIABLE] = str(folder)
        environment[NAME_VARIABLE] = name
        environment[CANDIDATES_VARIABLE] = candidates
        package = str(Path(__file__).resolve().parents[2])
        site = str(Path(__file__).resolve().parent / "record_site")
        paths = [site, package, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        try:
            code = subprocess.call(command, env=environment)
        except OSError as error:
            raise DeclarationError(f"cannot run {command[0]!r}: {error.strerror or error}") from error
        plans = [Plan.read(path) for path in sorted(folder.glob("*.json"))]
        caches = engine_cache.merged(engine_cache.read(path) for path in sorted(folder.glob("*.safetensors")))
        seen = _of_one_target([plan for plan in plans if plan.units or plan.launchers or plan.functions])
        plan = of_processes(seen) if seen or not caches.entries else Plan(recipe=name, target="none", origin="recorded")
    return code, engine_cache.write_plan(plan, caches, out)


def _of_one_target(plans: list[Plan]) -> list[Plan]:
    """The plans, without those of processes that used no GPU if others did."""
    on_gpus = [plan for plan in plans if plan.target != "cpu"]
    return on_gpus or plans


def keep_caches(caches: Caches) -> None:
    """Called in a process of a recorded command: put entries of its engine's compile cache into the recording."""
    engine_cache.write(Path(os.environ[FOLDER_VARIABLE], f"{uuid.uuid4().hex}.safetensors"), caches)


def start_from_environment() -> None:
    """Called in each process of a recorded command: record from when Triton is imported, or a compiled function called."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        return
    to = Path(folder)
    once = threading.Lock()

    def start() -> _Writer | None:
        if not once.acquire(blocking=False):  # and never given back
            return None
        undo()
        writer = _Writer(to)
        writer.start()
        return writer

    def begin() -> None:
        start()

    def first_call(*call: Any) -> None:
        writer = start()
        if writer is not None:
            writer.recording.note_call(*call)

    # Started at a call and not at Dynamo's import, because nothing may be imported while torch is.
    undo = dynamo_calls.note_calls(first_call)
    after_import.when_triton_comes(begin)


class _Writer:
    """Records this process, and its forked children, into one file per process.

    A thread writes the file within milliseconds of each new specialization, because engines that hang are killed: what was
    launched in that moment may be lost. A process that ends in any other way writes it once more.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        chosen = os.environ.get(CANDIDATES_VARIABLE, "launched")
        self.recording = Recording(os.environ.get(NAME_VARIABLE, "recorded"), cast(Candidates, chosen))

    def start(self) -> None:
        """Start the thread, and be called at the end of the process and in its forked children."""
        self._start()
        atexit.register(self._write)
        process_end.before_exit(self._write)
        # The locks are taken for the fork: in the child, nobody would give back another thread's.
        os.register_at_fork(before=self._hold, after_in_parent=self._let_go, after_in_child=self._start_in_child)

    def _hold(self) -> None:
        for lock in self.recording.locks:
            lock.acquire()

    def _let_go(self) -> None:
        for lock in self.recording.locks:
            lock.release()

    def _start(self) -> None:
        self._changed, self._writing = threading.Event(), threading.Lock()
        self.recording.when_changed(self._changed.set)
        threading.Thread(target=self._run, name="aot-cache record", daemon=True).start()

    def _start_in_child(self) -> None:
        self._let_go()
        self._start()

    def _run(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            self._write()

    def _write(self) -> None:
        with self._writing, contextlib.suppress(DeclarationError):  # CUDA is not up: nothing has run
            plan, rank = self.recording.plan(), torch_ranks.one_of_several()
            if rank is not None:
                plan = replace(plan, tunings=[replace(tuning, ranks=[rank]) for tuning in plan.tunings])
            plan.write(self._folder / f"{os.getpid()}.json")


def _target_id() -> str:
    from aot_cache.runtime import host_gpu

    if not torch_capture.cuda_is_up():
        raise DeclarationError("kernels were launched, but CUDA is not initialised", hint="record on a GPU")
    return host_gpu.native()[0].id
