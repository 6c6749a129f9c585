"""Builds the units of a matrix on Ray: a cluster, a Ray that runs on this machine, or one that is started for it.

The results meet in the store, which all workers see. What goes over Ray is only a unit, and what its command has printed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aot_cache.builder import matrix
from aot_cache.builder.matrix import Done, Outcome, Unit
from aot_cache.errors import AotCacheError, DeclarationError

if TYPE_CHECKING:
    import ray

ATTEMPTS = 4
"""How often a unit is started, if its workers are lost: as many as by Ray's own retries, which do not say that they happened."""
LOCAL = "ray"
_CLIENT = "ray://"
_THREADS = "OMP_NUM_THREADS"
_STARTS = 3
"""How often a Ray is started here: it gives itself 30 seconds, which may be too little on a busy machine."""
_GRACE = 15.0
"""Seconds for running builds to end when the matrix is interrupted."""


def check(on: str) -> None:
    """Find mistakes before anything starts.

    Raises:
        DeclarationError: `on` is neither `ray` nor `ray://HOST:PORT`, or Ray is not installed.
    """
    if on != LOCAL and not on.startswith(_CLIENT):
        raise DeclarationError("`ray` or ray://HOST:PORT as --on", repr(on), "omit it to build on this machine")
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise DeclarationError(f"--on {on} needs Ray", hint='pip install "aot-cache[ray]"') from error


def run(units: Sequence[Unit], on: str, cores: int, folder: Path, done: Done) -> None:
    """Run all units, as many at once as Ray has room for.

    Args:
        on: `ray`, or the address of a cluster as `ray://HOST:PORT`.
        cores: how many of Ray's CPUs a unit takes.
        folder: the current folder of the builds, where a worker's machine has it; else they run in the worker's own.

    Raises:
        AotCacheError: there is no Ray at that address, or the connection to it is lost.
    """
    with contextlib.redirect_stdout(sys.stderr):  # Ray prints there that a worker was lost; stdout is for --json
        _run(units, on, cores, folder, done)


def _run(units: Sequence[Unit], on: str, cores: int, folder: Path, done: Done) -> None:
    import ray

    _connect(on)
    build = ray.remote(num_cpus=cores, max_retries=0)(_on_worker)
    running: dict[ray.ObjectRef[Outcome], tuple[Unit, int]] = {}

    def start(unit: Unit, attempt: int) -> None:
        running[build.remote(unit, str(folder), os.environ.get(_THREADS))] = (unit, attempt)

    try:
        for unit in units:
            start(unit, 1)
        while running:
            (first, *_), _ = ray.wait(list(running), num_returns=1)
            unit, attempt = running.pop(first)
            outcome = _outcome(first, unit)
            if outcome is not None:
                done(replace(outcome, attempts=attempt))
            elif attempt < ATTEMPTS:
                start(unit, attempt + 1)
            else:
                done(_given_up(unit, attempt))
    except (ConnectionError, ray.exceptions.RayError) as error:
        raise AotCacheError(
            f"the connection to Ray is lost: {error}", hint="run it again: what is built is kept"
        ) from error
    finally:
        _stop(list(running))


def _on_worker(unit: Unit, folder: str, threads: str | None) -> Outcome:
    """Build one unit in a worker of Ray, with the environment of its machine, but without what Ray has added to it."""
    own = ("RAY_", "SPT_NOENV", "PYTHONBREAKPOINT", _THREADS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    if threads is not None:
        environment[_THREADS] = threads  # else Ray's own number of threads would be in graphs for CPUs
    return matrix.run(unit, folder if os.path.isdir(folder) else os.getcwd(), environment)


def _outcome(reference: Any, unit: Unit) -> Outcome | None:
    """The outcome of a unit; None if its worker was lost before the end."""
    import ray

    try:
        outcome: Outcome = ray.get(reference)
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
        return None
    except ray.exceptions.RayTaskError as error:
        why = f"it could not be started on a worker: {error.cause or error}"
        return Outcome(unit=unit, exit_code=1, document={}, seconds=0.0, host="", lost=why)
    return outcome


def _given_up(unit: Unit, attempts: int) -> Outcome:
    why = f"the worker was lost {attempts} times"
    return Outcome(unit=unit, exit_code=-signal.SIGKILL, document={}, seconds=0.0, host="", attempts=attempts, lost=why)


def _connect(on: str) -> None:
    """Connect to Ray. `ray` is the one that RAY_ADDRESS names, or that `ray start` has started here; else one is started."""
    import ray

    before = signal.getsignal(signal.SIGTERM)
    more: dict[str, Any] = {} if on != LOCAL else {"include_dashboard": False}
    try:
        for left in reversed(range(_STARTS if on == LOCAL else 1)):
            try:
                with contextlib.redirect_stdout(
                    sys.stderr
                ):  # where it prints what it thinks of its settings; ours is for --json
                    ray.init(None if on == LOCAL else on, log_to_driver=False, logging_level=logging.ERROR, **more)
                return
            except Exception as error:  # a Ray that does not start in time raises just that
                if not left:
                    why = str(error).strip().partition("\n")[0]
                    raise AotCacheError(
                        f"no Ray at {on}: {why}", hint="start it, correct the address, or set RAY_AUTH_TOKEN"
                    ) from error
    finally:
        signal.signal(signal.SIGTERM, before)  # Ray's own handler would end this process without its cleanup


def _stop(running: list[Any]) -> None:
    """Interrupt what still runs, so that it cleans up, and leave Ray."""
    import ray

    try:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(running, num_returns=len(running), timeout=_GRACE)
    finally:
        ray.shutdown()
