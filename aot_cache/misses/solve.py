"""Finds the declaration that would have covered a missed call of a compiled function. No torch; used while serving."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from aot_cache.artifact.plan import CallPlan, CasePlan
from aot_cache.misses import size_relations
from aot_cache.misses.size_relations import Relations
from aot_cache.recipes import dimensions
from aot_cache.recipes.dimensions import Dimension, Point, Range, Values


class Solved(NamedTuple):
    """The case and point that make a missed call.

    Args:
        points: case → the point; empty if there is none.
        declare: the declaration that would have covered it; empty if none would, or if it is declared already.
        why: why no declaration helps; empty if `declare` is given.
    """

    points: dict[str, Point]
    declare: str
    why: str


def points_for(
    calls: Sequence[CallPlan], cases: Sequence[CasePlan], name: str, structure: str, sizes: Mapping[str, Sequence[int]]
) -> Solved:
    """Solve for the point that makes a missed call. If several cases do, the one whose declaration is nearest is chosen.

    Args:
        calls, cases: of the plan that is served.
        name: `module:qualname` of the function.
        structure: of the call, see `misses.call_signature.structure_of`.
        sizes: sizes of each tensor and integer argument that is not a parameter or buffer.
    """
    mine = [call for call in calls if call.function == name]
    alike = [call for call in mine if call.structure == structure]
    if not alike:
        why = "has another call signature: mode, dtype, device, torch.compile options, source, or number of arguments"
        return Solved({}, "", f"the call {why}" if mine else f"no declared case calls {name}")
    found: list[tuple[int, CasePlan, Point]] = []
    reasons: list[str] = []
    for case in cases:
        for relations, seen, changing in _places(case, alike):
            point = size_relations.solve(relations, sizes, seen, changing)
            if isinstance(point, str):
                reasons.append(f"{point} ({case.name})")
            else:
                found.append((_distance(case, point), case, point))
    if not found:
        return Solved({}, "", reasons[0] if reasons else "its sizes were not looked at")
    _, case, point = min(found, key=lambda one: one[0])
    return Solved({case.name: point}, *_declaration(case, point))


def _places(case: CasePlan, calls: Sequence[CallPlan]) -> Iterator[tuple[Relations, Point, set[str]]]:
    """For each distinct set of relations of such calls: the relations, their first point, the dimensions that change."""
    told: list[Relations] = []
    boxes: list[list[Mapping[str, str]]] = []
    for call in calls:
        for place in call.follows.get(case.name, ()):
            if place not in told:
                told.append(place)
                boxes.append([])
            boxes[told.index(place)].extend(call.reached.get(case.name, ()))
    for relations, mine in zip(told, boxes):
        if mine:
            texts = {dim: {box[dim] for box in mine} for dim in case.dims}
            changing = {dim for dim, found in texts.items() if len(found) > 1 or not next(iter(found)).isdecimal()}
            yield relations, min(map(_first, mine), key=lambda point: tuple(point.values())), changing


def _first(box: Mapping[str, str]) -> Point:
    """The first point of a box that `dimensions.describe` wrote; constant cost for any size."""
    return {dim: int(text.partition("..")[0].partition(",")[0]) for dim, text in box.items()}


def _dims(case: CasePlan) -> dict[str, Dimension]:
    return {name: dimensions.parse_dimension(text) for name, text in case.dims.items()}


def _distance(case: CasePlan, point: Point) -> int:
    """Distance of a point from the declared dimensions: the sum over them, at least 1 for each that lacks the value."""
    apart = 0
    for name, dim in _dims(case).items():
        value = point[name]
        if value not in dim:
            apart += max(1, dim.values[0] - value, value - dim.values[-1])
    return apart


def _declaration(case: CasePlan, point: Point) -> tuple[str, str]:
    """(the declaration that covers `point`, as source text; why there is none)."""
    wider = [
        f"{name}={_written(_with(dim, point[name]))}" for name, dim in _dims(case).items() if point[name] not in dim
    ]
    at = ", ".join(f"{name}={value}" for name, value in point.items())
    if point in case.missed or not (wider or case.sampled):
        return "", f"case {case.name} has it at {at or 'its one point'} already"
    if not wider:
        return f"{case.name}: {at}, declared and not visited ({', '.join(case.sampled)} sampled)", ""
    return f"{case.name}: {', '.join(wider)}", ""


def _with(dim: Dimension, value: int) -> Dimension:
    """The dimension with one more value. A range stays a range, with a step that includes the value."""
    if isinstance(dim, Values):
        return Values(*dim, value)
    return Range(min(dim.lo, value), max(dim.values[-1], value), math.gcd(dim.step, value - dim.lo))


def _written(dim: Dimension) -> str:
    if isinstance(dim, Values):
        return repr(dim)
    return f"Range({dim.lo}, {dim.hi}{f', {dim.step}' if dim.step > 1 else ''})"
