"""Run a recipe's host code at every declared point on the virtual device and write down what it launches."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

from aot_cache import shapes, shipped
from aot_cache.build import pool, virtual_device
from aot_cache.build.recorded import Call
from aot_cache.errors import AotCacheError, DeclarationError, TraceError
from aot_cache.plan import CasePlan, Plan, Tuning, Unit
from aot_cache.recipe import Case, Recipe
from aot_cache.shapes import Enumeration, Point
from aot_cache.upstream import triton_jit
from aot_cache.upstream.triton_launches import LaunchLog, instead_of_launching

BLOCK = 64
"""Points that a child runs before it reports."""

Progress = Callable[[str, int, int], None]
Json = Any


@dataclass
class _Block:
    """What a child saw over some points of one case."""

    case: int
    units: list[dict[str, Json]] = field(default_factory=list)
    tunings: list[dict[str, Json]] = field(default_factory=list)
    unit_marks: list[list[int]] = field(default_factory=list)
    tuning_marks: list[list[int]] = field(default_factory=list)
    via: list[list[tuple[int, int]]] = field(default_factory=list)
    closures: dict[str, Json] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    calls: list[list[Call]] = field(default_factory=list)
    """The calls of compiled functions at each point."""
    error: AotCacheError | None = None


@dataclass(frozen=True)
class Traced:
    """What was enumerated.

    Args:
        plan: the units.
        calls: case → the calls of compiled functions at each of its points.
        refused: (case, point, why) of the missed points that the recipe's code cannot run at.
    """

    plan: Plan
    calls: dict[str, list[list[Call]]]
    refused: list[tuple[str, Point, str]]

    @property
    def compiled(self) -> list[str]:
        """The cases that call compiled functions: those are not traced here, but run as plain Python."""
        return sorted(case for case, points in self.calls.items() if any(points))


def trace(recipe: Recipe, target: str, progress: Progress, workers: int | None = None) -> Traced:
    """Enumerate what `recipe` launches. The process must have become `target` (see `virtual_device.become`).

    Raises:
        DeclarationError: when the recipe's own code raises at a point.
        TraceError: when host code cannot run without a GPU.
    """
    enumerations = [case.points() for case in recipe.cases]
    jobs = [(number, *block) for number, points in enumerate(enumerations) for block in _blocks(points)]
    total = sum(len(e.points) for e in enumerations)
    merged = _Merged(recipe, target, enumerations)
    done = 0
    calls: dict[str, list[list[Call]]] = {
        case.name: [[] for _ in found.points] for case, found in zip(recipe.cases, enumerations)
    }
    refused: list[tuple[str, Point, str]] = []

    def run(job: tuple[int, int, int]) -> _Block:
        number, start, stop = job
        return _run_block(recipe.cases[number], number, enumerations[number].points, start, stop)

    progress("trace", 0, total)
    _before.update(sys.modules)
    for index, block in pool.run(run, jobs, workers):
        number, start, stop = jobs[index]
        name, first = recipe.cases[number].name, enumerations[number].points[start]
        error = block.error if isinstance(block, _Block) else None
        if isinstance(block, pool.Died):
            error = TraceError(f"case {name!r} to run from {_where(first)}", block.why)
        if error is not None and start < len(enumerations[number].points) - enumerations[number].added:
            raise error
        if isinstance(block, _Block):
            late_modules.update(block.modules)
        if error is not None:
            refused.append((name, first, str(error)))
        else:
            merged.add(block)
            calls[name][start : start + len(block.calls)] = block.calls
        done += stop - start
        progress("trace", done, total)
    plan = merged.plan()
    if refused:
        visited = recipe.without([(case, point) for case, point, _ in refused])
        plan.cases = [CasePlan.of(case, case.points()) for case in visited.cases]
    return Traced(plan, calls, refused)


def _blocks(points: Enumeration) -> Iterator[tuple[int, int]]:
    """(start, stop) of what a child runs at once. Missed points run alone: one at which the recipe raises is left out."""
    declared = len(points.points) - points.added
    yield from ((start, min(start + BLOCK, declared)) for start in range(0, declared, BLOCK))
    yield from ((at, at + 1) for at in range(declared, len(points.points)))


_closures: dict[str, Json] = {}
_before: set[str] = set()
late_modules: dict[str, str] = {}
"""Module → file of what host code imported while it ran, in children whose imports are theirs: a build depends on it."""


def _run_block(case: Case, number: int, points: list[Point], start: int, stop: int) -> _Block:
    torch.set_num_threads(1)  # small tensors of known values, in as many children as there are cores
    log = LaunchLog()
    block = _Block(number)
    virtual_device.compiled_calls.clear()
    with instead_of_launching(log), virtual_device.tensors(), case.modes():
        for offset, point in enumerate(points[start:stop]):
            log.mark = start + offset
            error = _run_point(case, point)
            block.calls.append(list(virtual_device.compiled_calls))
            virtual_device.compiled_calls.clear()
            if error is not None:
                block.error, block.modules = error, _late_modules()
                return block
    block.units, block.tunings = log.units, log.tunings
    block.unit_marks, block.tuning_marks = log.seen_units, log.seen_tunings
    block.via = [sorted(v) for v in log.via]
    for name, function in log.functions.items():
        if name not in _closures:
            _closures[name] = triton_jit.closure(function)
        block.closures[name] = _closures[name]
    block.modules = _late_modules()
    return block


def _late_modules() -> dict[str, str]:
    new = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if name not in _before}
    return {name: path for name, path in new.items() if isinstance(path, str)}


def _run_point(case: Case, point: Point) -> AotCacheError | None:
    try:
        case.call(point)()
    except TraceError as error:
        do = shipped.what_to_do(case.make, error.do)
        return type(error)(f"{error.wanted}, in case {case.name!r} at {_where(point)}", error.found, do)
    except AotCacheError as error:
        return error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        return DeclarationError(
            f"case {case.name!r} to run at {_where(point)}",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} ({frame.filename}:{frame.lineno})",
            shipped.what_to_do(case.make),
        )
    return None


def _where(point: Point) -> str:
    return ", ".join(f"{k}={v}" for k, v in point.items())


def functions_at(case: Case, point: Point) -> dict[str, Any]:
    """The kernels that `case` launches at `point`, by name: the way to kernels that are made inside functions."""
    log = LaunchLog()
    with instead_of_launching(log), virtual_device.tensors(), case.modes():
        case.call(point)()
    return dict(log.functions)


class _Merged:
    """Blocks of all children, put together into a plan."""

    def __init__(self, recipe: Recipe, target: str, enumerations: list[Enumeration]) -> None:
        self._recipe, self._target, self._enumerations = recipe, target, enumerations
        self._units: dict[str, dict[str, Json]] = {}
        self._unit_marks: dict[str, dict[int, list[int]]] = {}
        self._via: dict[str, set[tuple[str, int]]] = {}
        self._tunings: dict[str, dict[str, Json]] = {}
        self._tuning_marks: dict[str, dict[int, list[int]]] = {}
        self._closures: dict[str, Json] = {}

    def add(self, block: _Block) -> None:
        names = [json.dumps(t) for t in block.tunings]
        for name, tuning, marks in zip(names, block.tunings, block.tuning_marks):
            self._tunings.setdefault(name, tuning)
            self._tuning_marks.setdefault(name, {}).setdefault(block.case, []).extend(marks)
        for unit, marks, via in zip(block.units, block.unit_marks, block.via):
            name = json.dumps(unit)  # the order of options is part of Triton's key
            self._units.setdefault(name, unit)
            self._unit_marks.setdefault(name, {}).setdefault(block.case, []).extend(marks)
            self._via.setdefault(name, set()).update((names[t] if t >= 0 else "", c) for t, c in via)
        self._closures.update(block.closures)

    def plan(self) -> Plan:
        tuning_order = sorted(self._tunings)
        number_of = {name: number for number, name in enumerate(tuning_order)}
        digests = {name: triton_jit.closure_digest(c) for name, c in self._closures.items()}
        units = [
            Unit(
                source=digests[self._units[name]["kernel"]],
                via=[list(v) for v in sorted((number_of.get(t, -1), c) for t, c in self._via[name])],
                reached=self._reached(self._unit_marks[name]),
                **self._units[name],
            )
            for name in sorted(self._units)
        ]
        tunings = [
            Tuning(reached=self._reached(self._tuning_marks[name]), **self._tunings[name]) for name in tuning_order
        ]
        return Plan(
            self._recipe.name,
            self._target,
            "traced",
            triton.__version__,
            [CasePlan.of(case, e) for case, e in zip(self._recipe.cases, self._enumerations)],
            units,
            tunings,
            dict(sorted(self._closures.items())),
        )

    def _reached(self, marks: dict[int, list[int]]) -> dict[str, list[dict[str, str]]]:
        out = {}
        for number in sorted(marks):
            case = self._recipe.cases[number]
            points = self._enumerations[number].points
            out[case.name] = shapes.describe((points[m] for m in sorted(set(marks[number]))), case.dims)
        return out
