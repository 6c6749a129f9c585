"""The points of a case in groups that one set of graphs may serve, and those of them at which sizes are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from aot_cache import shapes
from aot_cache.build.calls import Survey
from aot_cache.recipe import Case
from aot_cache.shapes import Point, Values

MOST, MOST_OF_RECORDED = 40, 5


@dataclass
class Group:
    """Points of a case that differ in `Range`s only, and what was seen at some of them."""

    case: int
    points: list[int]
    telling: set[int]
    survey: Survey = field(default_factory=Survey)
    seen: set[int] = field(default_factory=set)


def by_values(case: Case, points: list[Point]) -> Iterator[list[int]]:
    """Points that differ in `Range`s only, as numbers."""
    static = [name for name, dim in case.dims.items() if isinstance(dim, Values)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, point in enumerate(points):
        groups.setdefault(tuple(point[name] for name in static), []).append(number)
    yield from groups.values()


def telling(case: Case, points: list[Point], group: list[int], most: int) -> set[int]:
    """Points of a group at which sizes are looked at: its ends, ones, powers of two, and a spread of others."""
    first = points[group[0]]
    dims = {name: Values(first[name]) if isinstance(dim, Values) else dim for name, dim in case.dims.items()}
    wanted = {tuple(point.items()) for point in shapes.enumerate_points(dims, most).points}
    return {at for at in group if tuple(points[at].items()) in wanted} | {group[0], group[-1]}
