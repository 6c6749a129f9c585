"""Record what a real program launches on a real GPU, as a plan in the builder's format.

`with recording(): …` records this process; `run_command` runs a program and every Python process that it starts.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, cast, get_args

from aot_cache.artifact import engine_cache
from aot_cache.artifact.engine_cache import Caches
from aot_cache.artifact.plan import Plan, Tuning, Unit, merge, named
from aot_cache.errors import DeclarationError
from aot_cache.upstream import after_import
from aot_cache.upstream.hooks import process_end, torch_capture

FOLDER_VARIABLE = "AOT_CACHE_RECORD_TO"
NAME_VARIABLE = "AOT_CACHE_RECORD_NAME"
CANDIDATES_VARIABLE = "AOT_CACHE_RECORD_CANDIDATES"


Candidates = Literal["launched", "all", "chosen"]
"""Which candidates of an autotuner a plan has: those that ran, all of them, or only the choice."""
CANDIDATES: tuple[Candidates, ...] = get_args(Candidates)


class Recording:
    """An active recording; `plan()` returns what was launched so far. Its methods may be called from any thread."""

    def __init__(self, name: str, candidates: Candidates = "launched") -> None:
        from aot_cache.upstream.hooks.triton_launches import LaunchLog, record_launches

        self._name, self._candidates = name, candidates
        self._log = LaunchLog()
        self._undo = record_launches(self._log, every_candidate=candidates == "all")
        self._target = ""

    @property
    def lock(self) -> threading.RLock:
        """Held while a launch is written down."""
        return self._log.lock

    def when_changed(self, action: Callable[[], None]) -> None:
        """Call `action()` after each launch of a new specialization, and each new choice of an autotuner."""
        self._log.changed = action

    def stop(self) -> None:
        """Stop recording: take the hooks out."""
        self._undo()

    def clear(self) -> None:
        """Forget the launches so far (used between points, to compare each)."""
        self._log.forget()

    def plan(self) -> Plan:
        """What was launched, as a plan.

        Raises:
            DeclarationError: a kernel was launched, but CUDA is not initialised.
        """
        import triton

        from aot_cache.upstream.codec import triton_jit

        log = self._log
        with log.lock:
            closures = {name: log.closures[name] for name in sorted(log.functions)}
            launched = [(dict(unit), sorted(via)) for unit, via in zip(log.units, log.via)]
            tunings = [Tuning(**tuning) for tuning in log.tunings]
            launchers = tuple(sorted(log.launchers, key=json.dumps))
        digests = {name: triton_jit.closure_digest(document) for name, document in closures.items()}
        units = [
            Unit(source=digests[unit["kernel"]], via=[list(pair) for pair in via], **unit)
            for unit, via in launched
            if self._candidates != "chosen" or any(_is_chosen(tunings, *pair) for pair in via)
        ]
        self._target = self._target or (_target_id() if units or launchers else "")
        plan = Plan(
            recipe=self._name,
            target=self._target or "none",
            origin="recorded",
            triton=triton.__version__,
            units=units,
            tunings=tunings,
            closures=closures,
            launchers=launchers,
        )
        return named(plan)


@contextlib.contextmanager
def recording(name: str = "recorded") -> Iterator[Recording]:
    """Record what this process launches inside the block. Costs about 20 microseconds for each launch."""
    started = Recording(name)
    try:
        yield started
    finally:
        started.stop()


def _is_chosen(tunings: Sequence[Tuning], number: int, candidate: int) -> bool:
    """Whether a launch was made without a tuner, or with the tuner's choice (or its choice is not known)."""
    if number < 0 or candidate < 0:
        return True
    tuning = tunings[number]
    return tuning.choice is None or tuning.candidates[candidate] == tuning.choice


def run_command(command: list[str], out: Path, name: str, candidates: Candidates = "launched") -> tuple[int, Plan]:
    """Run a command, and record the launches of all its Python processes, also of those that are killed.

    Returns:
        (the command's exit code, the plan). The plan is also written to `out`.

    Raises:
        DeclarationError: the command cannot be started, or nothing was launched.
    """
    with tempfile.TemporaryDirectory(prefix="aot-cache-record-") as folder:
        environment = dict(os.environ)
        environment[FOLDER_VARIABLE] = folder
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
        plans = [Plan.read(path) for path in sorted(Path(folder).glob("*.json"))]
        caches = engine_cache.merged(engine_cache.read(path) for path in sorted(Path(folder).glob("*.safetensors")))
        seen = [plan for plan in plans if plan.units or plan.launchers]
        plan = merge(seen) if seen or not caches.entries else Plan(recipe=name, target="none", origin="recorded")
    return code, engine_cache.write_plan(plan, caches, out)


def keep_caches(caches: Caches) -> None:
    """Called in a process of a recorded command: put entries of its engine's compile cache into the recording."""
    engine_cache.write(Path(os.environ[FOLDER_VARIABLE], f"{uuid.uuid4().hex}.safetensors"), caches)


def start_from_environment() -> None:
    """Called in each process of a recorded command: record from when Triton is imported."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        to = Path(folder)
        after_import.when_triton_comes(lambda: _Writer(to).start())


class _Writer:
    """Records this process, and its forked children, into one file per process.

    A thread writes the file within milliseconds of each new specialization, because engines that hang are killed: what was
    launched in that moment may be lost. A process that ends in any other way writes it once more.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        chosen = os.environ.get(CANDIDATES_VARIABLE, "launched")
        self._recording = Recording(os.environ.get(NAME_VARIABLE, "recorded"), cast(Candidates, chosen))

    def start(self) -> None:
        """Start the thread, and be called at the end of the process and in its forked children."""
        self._start()
        atexit.register(self._write)
        process_end.before_exit(self._write)
        lock = self._recording.lock  # taken for the fork: in the child, nobody would give back another thread's
        os.register_at_fork(before=lock.acquire, after_in_parent=lock.release, after_in_child=self._start_in_child)

    def _start(self) -> None:
        self._changed, self._writing = threading.Event(), threading.Lock()
        self._recording.when_changed(self._changed.set)
        threading.Thread(target=self._run, name="aot-cache record", daemon=True).start()

    def _start_in_child(self) -> None:
        self._recording.lock.release()
        self._start()

    def _run(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            self._write()

    def _write(self) -> None:
        with self._writing, contextlib.suppress(DeclarationError):  # CUDA is not up: nothing has run
            self._recording.plan().write(self._folder / f"{os.getpid()}.json")


def _target_id() -> str:
    from aot_cache.runtime import host_gpu

    if not torch_capture.cuda_is_up():
        raise DeclarationError("kernels were launched, but CUDA is not initialised", hint="record on a GPU")
    return host_gpu.native()[0].id
