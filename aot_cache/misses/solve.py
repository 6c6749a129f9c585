"""Which declaration would have covered a call of a compiled function that missed. Torch-free: asked while serving."""

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
    """Which point of which case makes a missed call.

    Args:
        points: case → the point; empty when there is none.
        declare: the declaration that would have covered it; empty when none would, or what is declared does already.
        why: what keeps it from being covered; empty when `declare` would.
    """

    points: dict[str, Point]
    declare: str
    why: str


def points_for(
    calls: Sequence[CallPlan], cases: Sequence[CasePlan], name: str, structure: str, sizes: Mapping[str, Sequence[int]]
) -> Solved:
    """Solve for the point that makes a missed call; of several cases, the one whose declaration is the nearest.

    Args:
        calls, cases: of the plan that was served.
        name: `module:qualname` of the function.
        structure: of the call, see `misses.call_signature.structure_of`.
        sizes: of each tensor and integer that is given and is not the model's own.
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
    """For each way in which the sizes of such calls follow from a case's dimensions: it, its first point, what changes."""
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
    """The first point of a box as `dimensions.describe` writes it; costs nothing however large the box is."""
    return {dim: int(text.partition("..")[0].partition(",")[0]) for dim, text in box.items()}


def _dims(case: CasePlan) -> dict[str, Dimension]:
    return {name: dimensions.parse_dimension(text) for name, text in case.dims.items()}


def _distance(case: CasePlan, point: Point) -> int:
    """How far a point is from what was declared."""
    apart = 0
    for name, dim in _dims(case).items():
        value = point[name]
        if value not in dim:
            apart += max(1, dim.values[0] - value, value - dim.values[-1])
    return apart


def _declaration(case: CasePlan, point: Point) -> tuple[str, str]:
    """(the declaration that covers `point`, as people write it; why there is none)."""
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
    """The dimension with one more value; a range stays one, by steps that meet it."""
    if isinstance(dim, Values):
        return Values(*dim, value)
    return Range(min(dim.lo, value), max(dim.values[-1], value), math.gcd(dim.step, value - dim.lo))


def _written(dim: Dimension) -> str:
    if isinstance(dim, Values):
        return repr(dim)
    return f"Range({dim.lo}, {dim.hi}{f', {dim.step}' if dim.step > 1 else ''})"
