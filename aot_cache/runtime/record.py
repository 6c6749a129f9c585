"""Write down what a real program launches on a real GPU, as a plan in the builder's format.

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
    """A recording under way; `plan()` is what was launched so far."""

    def __init__(self, name: str) -> None:
        from aot_cache.upstream.hooks.triton_launches import LaunchLog, record_launches

        self._name = name
        self._log = LaunchLog()
        self._undo = record_launches(self._log)

    def stop(self) -> None:
        """Take the hooks out."""
        self._undo()

    def clear(self) -> None:
        """Forget what was launched so far (between points, to compare each)."""
        self._log.forget()

    def plan(self) -> Plan:
        """What was launched, as a plan.

        Raises:
            DeclarationError: when a kernel was launched and no GPU is up, which cannot be.
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
    """Record what this process launches inside the block. Costs some 20 microseconds a launch."""
    started = Recording(name)
    try:
        yield started
    finally:
        started.stop()


def run_command(command: list[str], out: Path, name: str) -> tuple[int, Plan]:
    """Run `command` and record what it, and every Python process that it starts, launches.

    Returns:
        (the command's exit code, the plan, which is written to `out` as well).

    Raises:
        DeclarationError: when the command cannot be started, or nothing was launched.
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
    """Called in each process of a recorded command: record once Triton is imported, write at exit."""
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
    """Engines' worker processes end through multiprocessing, which skips atexit."""
    from multiprocessing import util

    if "multiprocessing.process" in sys.modules:
        util.Finalize(None, finish, exitpriority=100)


def _target_id() -> str:
    from aot_cache.runtime import host_gpu

    if not torch_capture.cuda_is_up():
        raise DeclarationError("kernels were launched, but CUDA is not initialised", hint="record on a GPU")
    return host_gpu.native()[0].id
