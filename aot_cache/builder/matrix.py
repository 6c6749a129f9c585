"""A matrix of builds. The unit of work is one bundle: a build command of its own, run here or on other machines.

A command, and not a call, because a matrix may have builds for several releases of torch, each with its own interpreter, and
because the bundle is then the one that the command would make by itself. Several may run at once in one store.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aot_cache.process_group import ProcessGroup

_GRACE = 10.0
"""Seconds for a build that is interrupted to remove its temporary folders."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One bundle to build.

    Args:
        name: the recipe with its options, for people.
        target: its target; empty: the default of the machine that builds it.
        version: name of the environment (releases of torch, Triton, the model's code); empty if the matrix has only one.
        python: interpreter of that environment; empty: the one of the process that runs the build.
        arguments: of `aot-cache build`.
    """

    name: str
    target: str
    arguments: tuple[str, ...]
    version: str = ""
    python: str = ""

    @property
    def label(self) -> str:
        return " ".join(filter(None, (self.name, self.target, self.version)))


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How the build of a unit ended.

    Args:
        exit_code: of the command; negative: the number of the signal that ended it.
        document: what it printed for `--json`; empty if it was ended before that.
        seconds: from its start to its end, imports included.
        host: the machine that built it.
        attempts: how often it was started: more than once if a worker was lost.
        lost: why it was given up, if it was; then there is nothing else.
    """

    unit: Unit
    exit_code: int
    document: dict[str, Any]
    seconds: float
    host: str
    attempts: int = 1
    lost: str = ""


Done = Callable[[Outcome], None]
"""Called with each outcome as soon as it is there."""


def run(unit: Unit, folder: str, environment: Mapping[str, str]) -> Outcome:
    """Run the build of one unit in `folder`. A build that fails is an outcome, not an error."""
    began = time.perf_counter()
    command = [unit.python or sys.executable, "-m", "aot_cache", "build", "--json", "--quiet", *unit.arguments]
    try:
        group = ProcessGroup(command, environment, folder)
    except OSError as error:
        return Outcome(
            unit=unit, exit_code=127, document={}, seconds=0.0, host=platform.node(), lost=f"{command[0]}: {error}"
        )
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                printed, said = group.process.communicate(
                    timeout=1.0
                )  # Ray interrupts only between two of Python's steps
                break
    except BaseException:
        group.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            group.process.wait(_GRACE)
        raise
    finally:
        group.end()
    document, lost = _document(printed), ""
    if not document:
        words = [word.strip() for word in said.splitlines() if word.strip()]
        lost = f"the build ended with exit code {group.process.returncode}: {words[-1] if words else 'no output'}"
    return Outcome(
        unit=unit,
        exit_code=group.process.returncode,
        document=document,
        seconds=time.perf_counter() - began,
        host=platform.node(),
        lost=lost,
    )


def _document(printed: str) -> dict[str, Any]:
    """What the command printed for `--json`; empty if it did not."""
    try:
        found = json.loads(printed)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def run_here(units: list[Unit], folder: Path, environment: Mapping[str, str], done: Done) -> None:
    """Run all units on this machine, one after another: each build uses all cores by itself."""
    for unit in units:
        done(run(unit, str(folder), environment))
