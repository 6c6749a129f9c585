"""Runs a recipe's host code at every declared point on the virtual device, and records what it launches."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import RawArray
from typing import Any

import torch
import triton

from aot_cache.artifact.key import told_apart
from aot_cache.artifact.plan import CasePlan, Plan, Tuning, Unit
from aot_cache.builder import fingerprint, fork_map, one_point, virtual_gpu
from aot_cache.builder.messages import Refused
from aot_cache.builder.one_point import Broken
from aot_cache.builder.recorded_calls import Call
from aot_cache.recipes import dimensions
from aot_cache.recipes.declare import Case, Recipe
from aot_cache.recipes.dimensions import Enumeration, Point
from aot_cache.store import Json, JsonObject
from aot_cache.upstream.codec import triton_jit
from aot_cache.upstream.hooks.triton_launches import LaunchLog, intercept_launch

BLOCK = 64
"""Number of points that a child runs before it reports."""

Progress = Callable[[str, int, int], None]


@dataclass
class _Block:
    """What a child recorded at some points of one case."""

    case: int
    units: list[dict[str, Json]] = field(default_factory=list)
    tunings: list[dict[str, Json]] = field(default_factory=list)
    unit_marks: list[list[int]] = field(default_factory=list)
    tuning_marks: list[list[int]] = field(default_factory=list)
    via: list[list[tuple[int, int]]] = field(default_factory=list)
    closures: dict[str, JsonObject] = field(default_factory=dict)
    hidden: dict[str, set[tuple[tuple[str, int], ...]]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    calls: list[list[Call]] = field(default_factory=list)
    """The calls of compiled functions at each point."""
    broken: Broken | None = None
    sets: set[str] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The result of a trace.

    Args:
        plan: the units.
        calls: case → the calls of compiled functions at each of its points; cases that failed (`plan.failed`) are left out.
        refused: the missed points at which the recipe's code cannot run.
        unclear: kernel → why its name is ambiguous; such kernels are not built.
    """

    plan: Plan
    calls: dict[str, list[list[Call]]]
    refused: list[Refused]
    unclear: dict[str, str] = field(default_factory=dict)

    @property
    def compiled(self) -> list[str]:
        """The cases that call compiled functions, which are not traced here but run as plain Python."""
        return sorted(case for case, points in self.calls.items() if any(points))


def trace(recipe: Recipe, target: str, progress: Progress, workers: int | None = None) -> Trace:
    """Enumerate what `recipe` launches. The process must have become `target` (see `virtual_gpu.become`).

    A case that fails at any declared point is left out, and is listed in the plan.

    Raises:
        DeclarationError: all cases failed, the first because the recipe's own code raised.
        TraceError: all cases failed, the first because its host code cannot run without a GPU.
    """
    enumerations = [case.points() for case in recipe.cases]
    jobs = [(number, *block) for number, points in enumerate(enumerations) for block in _blocks(points)]
    total = sum(len(e.points) for e in enumerations)
    merged = _Merged(recipe, target, enumerations)
    done = 0
    calls: dict[str, list[list[Call]]] = {
        case.name: [[] for _ in found.points] for case, found in zip(recipe.cases, enumerations)
    }
    refused: list[Refused] = []
    failed: dict[int, dict[int, Broken]] = {}
    at = RawArray("q", len(jobs))  # each job's current point, which is reported if its process dies

    def run(index: int) -> _Block:
        number, start, stop = jobs[index]
        return _run_block(recipe.cases[number], number, enumerations[number].points, range(start, stop), index, at)

    progress("trace", 0, total)
    _before.update(sys.modules)
    sound: list[_Block] = []
    sets: dict[str, set[str]] = {}
    broken: Broken | None
    for index, block in fork_map.run(run, range(len(jobs)), workers):
        number, start, stop = jobs[index]
        name, first = recipe.cases[number].name, enumerations[number].points[start]
        if isinstance(block, fork_map.Died):
            broken = one_point.died(name, enumerations[number].points[at[index]], block.why)
        else:
            broken = block.broken
            late_modules.update(block.modules)
            sets.setdefault(name, set()).update(block.sets)
        if broken is None:
            sound.append(block)
            calls[name][start : start + len(block.calls)] = block.calls
        elif start < len(enumerations[number].points) - enumerations[number].added:
            failed.setdefault(number, {})[start] = broken
            if len(failed) == len(recipe.cases):
                raise one_point.all_of(_first(failed))
        else:
            refused.append(Refused(case=name, point=first, why=str(broken.error)))
        done += stop - start
        progress("trace", done, total)
    for one in sound:
        if one.case not in failed:
            merged.add(one)
    plan = merged.plan()
    if refused:
        visited = recipe.without([(one.case, one.point) for one in refused])
        plan = replace(plan, cases=[CasePlan.of(case, case.points()) for case in visited.cases])
    plan = replace(plan.with_sets(sets), failed=[broken.failed for broken in _first(failed)])
    gone = {case.case for case in plan.failed}
    return Trace(
        plan=plan,
        calls={name: found for name, found in calls.items() if name not in gone},
        refused=refused,
        unclear=merged.unclear(),
    )


def _first(failed: Mapping[int, Mapping[int, Broken]]) -> list[Broken]:
    """The failure of each case at its first failing block, in the recipe's order, independent of the order of reports."""
    return [blocks[min(blocks)] for _, blocks in sorted(failed.items())]


def _blocks(points: Enumeration) -> Iterator[tuple[int, int]]:
    """(start, stop) of each block. Missed points have blocks of their own, so that only those that raise are left out."""
    declared = len(points.points) - points.added
    yield from ((start, min(start + BLOCK, declared)) for start in range(0, declared, BLOCK))
    yield from ((at, at + 1) for at in range(declared, len(points.points)))


_before: set[str] = set()
late_modules: dict[str, str] = {}
"""Module → file of what host code imported while it ran in children. The stamp needs it, and the parent does not see it."""


def _run_block(
    case: Case, number: int, every: Sequence[Point], mine: range, index: int, at: MutableSequence[int]
) -> _Block:
    """Run the points of a block; `at[index]` is always the current point. Runs in a child, and never raises."""
    block = _Block(number)
    at[index] = mine.start
    try:
        _fill(block, case, every, mine, index, at)
    except Exception as error:  # while recording launches: a kernel's source cannot be read, for one
        block.broken = one_point.broken(case, every[at[index]], error)
    block.modules, block.sets = fingerprint.imported_since(_before), one_point.sets.pop(case.name, set())
    return block


def _fill(block: _Block, case: Case, every: Sequence[Point], mine: range, index: int, at: MutableSequence[int]) -> None:
    torch.set_num_threads(1)  # tensors with values are small, and there is a child per core
    log = LaunchLog()
    virtual_gpu.compiled_calls.clear()
    with intercept_launch(log, virtual_gpu.kernel_was_launched), virtual_gpu.tensors(), case.modes():
        for number in mine:
            log.mark = at[index] = number
            block.broken = one_point.run(case, every[number])
            block.calls.append(list(virtual_gpu.compiled_calls))
            virtual_gpu.compiled_calls.clear()
            if block.broken is not None:
                return
    block.units, block.tunings = log.units, log.tunings
    block.unit_marks, block.tuning_marks = log.seen_units, log.seen_tunings
    block.via = [sorted(v) for v in log.via]
    block.closures, block.hidden = log.closures, log.hidden


def functions_at(case: Case, point: Point) -> dict[str, Any]:
    """The kernels that `case` launches at `point`, by identity. Finds kernels that are made inside functions."""
    log = LaunchLog()
    with intercept_launch(log, virtual_gpu.kernel_was_launched), virtual_gpu.tensors(), case.modes():
        broken = one_point.run(case, point)
    if broken is not None:
        raise broken.error
    return dict(log.functions)


class _Merged:
    """Merges the blocks of all children into a plan."""

    def __init__(self, recipe: Recipe, target: str, enumerations: list[Enumeration]) -> None:
        self._recipe, self._target, self._enumerations = recipe, target, enumerations
        self._units: dict[str, dict[str, Json]] = {}
        self._unit_marks: dict[str, dict[int, list[int]]] = {}
        self._via: dict[str, set[tuple[str, int]]] = {}
        self._tunings: dict[str, dict[str, Json]] = {}
        self._tuning_marks: dict[str, dict[int, list[int]]] = {}
        self._closures: dict[str, JsonObject] = {}
        self._hidden: dict[str, set[tuple[tuple[str, int], ...]]] = {}

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
        for kernel, hidden in block.hidden.items():
            self._hidden.setdefault(kernel, set()).update(hidden)

    def unclear(self) -> dict[str, str]:
        """Kernels with one name and source that differ in values that cannot be encoded, so that they cannot be told apart."""
        called, out = told_apart(self._closures), {}
        for kernel, found in self._hidden.items():
            if len(found) > 1:
                what = ", ".join(sorted({name for hidden in found for name, _ in hidden}))
                out[called[kernel]] = f"{len(found)} kernels of this name cannot be told apart: they differ in {what}"
        return out

    def plan(self) -> Plan:
        called = told_apart(self._closures)

        def told(known: dict[str, dict[str, Json]]) -> dict[str, dict[str, Json]]:
            """Renamed to the names in the plan, and sorted by content."""
            renamed = {name: {**one, "kernel": called[one["kernel"]]} for name, one in known.items()}
            return dict(sorted(renamed.items(), key=lambda item: json.dumps(item[1])))

        told_tunings = told(self._tunings)
        number_of = {name: number for number, name in enumerate(told_tunings)}
        units = [
            Unit(
                source=triton_jit.closure_digest(self._closures[self._units[name]["kernel"]]),
                via=[list(v) for v in sorted((number_of.get(t, -1), c) for t, c in self._via[name])],
                reached=self._reached(self._unit_marks[name]),
                **unit,
            )
            for name, unit in told(self._units).items()
        ]
        tunings = [
            Tuning(reached=self._reached(self._tuning_marks[name]), **tuning) for name, tuning in told_tunings.items()
        ]
        return Plan(
            recipe=self._recipe.name,
            target=self._target,
            triton=triton.__version__,
            cases=[CasePlan.of(case, e) for case, e in zip(self._recipe.cases, self._enumerations)],
            units=units,
            tunings=tunings,
            closures={called[name]: closure for name, closure in sorted(self._closures.items())},
        )

    def _reached(self, marks: dict[int, list[int]]) -> dict[str, list[dict[str, str]]]:
        out = {}
        for number in sorted(marks):
            case = self._recipe.cases[number]
            points = self._enumerations[number].points
            out[case.name] = dimensions.describe((points[m] for m in sorted(set(marks[number]))), case.dims)
        return out
