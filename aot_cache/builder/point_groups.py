"""The points of a case in groups that one set of graphs may serve, and those of them at which sizes are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from aot_cache.builder.call_kinds import SeenCall, Survey
from aot_cache.builder.one_point import Broken
from aot_cache.recipes import dimensions
from aot_cache.recipes.declare import Case
from aot_cache.recipes.dimensions import Point, Values

MOST, MOST_OF_RECORDED = 40, 5


@dataclass(eq=False)
class Group:
    """Points of a case that differ in `Range`s only, and what was seen at some of them."""

    case: int
    points: list[int]
    telling: set[int]
    survey: Survey = field(default_factory=Survey)
    seen: set[int] = field(default_factory=set)
    first: set[str] = field(default_factory=set)
    """Structures of calls that a process makes at its first call only."""
    ends: set[int] = field(default_factory=set)
    """Points that were a process's first, besides the hint."""


@dataclass(frozen=True)
class Look:
    """What a child runs: one point, which is the process's first, then others, of which that may be one."""

    group: Group
    first: int
    points: list[int]


@dataclass
class Seen:
    """What a child saw: (point, the calls there) in the order in which it ran them; and why it stopped."""

    calls: list[tuple[int, list[SeenCall]]] = field(default_factory=list)
    skipped: set[str] = field(default_factory=set)
    modules: dict[str, str] = field(default_factory=dict)
    sets: set[str] = field(default_factory=set)
    broken: Broken | None = None


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
    wanted = {tuple(point.items()) for point in dimensions.enumerate_points(dims, most).points}
    return {at for at in group if tuple(points[at].items()) in wanted} | {group[0], group[-1]}
