"""Record what a real program launches on a real GPU, as a plan in the builder's format.

`with recording(): …` records this process; `run_command` runs a program and every Python process that it starts.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aot_cache.artifact.plan import Plan, Tuning, Unit, merge, named
from aot_cache.errors import DeclarationError
from aot_cache.upstream import after_import
from aot_cache.upstream.hooks import torch_capture

FOLDER_VARIABLE = "AOT_CACHE_RECORD_TO"
NAME_VARIABLE = "AOT_CACHE_RECORD_NAME"


class Recording:
    """An active recording; `plan()` returns what was launched so far."""

    def __init__(self, name: str) -> None:
        from aot_cache.upstream.hooks.triton_launches import LaunchLog, record_launches

        self._name = name
        self._log = LaunchLog()
        self._undo = record_launches(self._log)

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
        closures = {name: log.closures[name] for name in sorted(log.functions)}
        digests = {name: triton_jit.closure_digest(document) for name, document in closures.items()}
        units = [
            Unit(source=digests[unit["kernel"]], via=[list(v) for v in sorted(via)], **unit)
            for unit, via in zip(log.units, log.via)
        ]
        tunings = [Tuning(**tuning) for tuning in log.tunings]
        target = _target_id() if units else "none"
        plan = Plan(
            recipe=self._name,
            target=target,
            origin="recorded",
            triton=triton.__version__,
            units=units,
            tunings=tunings,
            closures=closures,
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


def run_command(command: list[str], out: Path, name: str) -> tuple[int, Plan]:
    """Run a command, and record the launches of all its Python processes.

    Returns:
        (the command's exit code, the plan). The plan is also written to `out`.

    Raises:
        DeclarationError: the command cannot be started, or nothing was launched.
    """
    with tempfile.TemporaryDirectory(prefix="aot-cache-record-") as folder:
        environment = dict(os.environ)
        environment[FOLDER_VARIABLE] = folder
        environment[NAME_VARIABLE] = name
        package = str(Path(__file__).resolve().parents[2])
        site = str(Path(__file__).resolve().parent / "record_site")
        paths = [site, package, environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(p for p in paths if p)
        try:
            code = subprocess.call(command, env=environment)
        except OSError as error:
            raise DeclarationError(f"cannot run {command[0]!r}: {error.strerror or error}") from error
        plans = [Plan.read(path) for path in sorted(Path(folder).glob("*.json"))]
        plan = merge(plan for plan in plans if plan.units)
    plan.write(out)
    return code, plan


def start_from_environment() -> None:
    """Called in each process of a recorded command: record once Triton is imported, and write the plan at exit."""
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder:
        after_import.when_triton_comes(lambda: _begin(Path(folder)))


def _begin(folder: Path) -> None:
    started: list[Any] = []

    def finish() -> None:
        for recording_ in started:
            with contextlib.suppress(DeclarationError):
                recording_.plan().write(folder / f"{os.getpid()}.json")

    started.append(Recording(os.environ.get(NAME_VARIABLE, "recorded")))
    atexit.register(finish)
    _at_worker_exit(finish)


def _at_worker_exit(finish: Any) -> None:
    """Call `finish` when a worker process of an engine ends: multiprocessing skips atexit."""
    from multiprocessing import util

    if "multiprocessing.process" in sys.modules:
        util.Finalize(None, finish, exitpriority=100)


def _target_id() -> str:
    from aot_cache.runtime import host_gpu

    if not torch_capture.cuda_is_up():
        raise DeclarationError("kernels were launched, but CUDA is not initialised", hint="record on a GPU")
    return host_gpu.native()[0].id
