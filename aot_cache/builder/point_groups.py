"""The points of a case in groups that one set of graphs may serve, and the probe points of each group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from aot_cache.builder.call_signatures import CallTrace, SeenCall
from aot_cache.builder.one_point import Broken
from aot_cache.recipes import dimensions
from aot_cache.recipes.declare import Case
from aot_cache.recipes.dimensions import Point, Values

MAX_PROBES, MAX_PROBES_RECORDED = 40, 5


@dataclass(eq=False)
class Group:
    """Points of a case that differ in `Range`s only, and the calls seen at some of them."""

    case: int
    points: list[int]
    probe_points: set[int]
    trace: CallTrace = field(default_factory=CallTrace)
    seen: set[int] = field(default_factory=set)
    first: set[str] = field(default_factory=set)
    """Structures of calls that a process makes at its first point only."""
    ends: set[int] = field(default_factory=set)
    """Points that a process ran first, besides the hint."""


@dataclass(frozen=True)
class TraceJob:
    """What a child runs: `first`, which is the first point of that process, then `points`, which may have it again."""

    group: Group
    first: int
    points: list[int]


@dataclass
class TraceResult:
    """What a child saw: (point, its calls) in the order in which it ran them; `broken` says why it stopped early."""

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


def probe_points(case: Case, points: list[Point], group: list[int], most: int) -> set[int]:
    """Points of a group at which calls are traced first: both ends, ones, powers of two, and a spread of others."""
    first = points[group[0]]
    dims = {name: Values(first[name]) if isinstance(dim, Values) else dim for name, dim in case.dims.items()}
    wanted = {tuple(point.items()) for point in dimensions.enumerate_points(dims, most).points}
    return {at for at in group if tuple(points[at].items()) in wanted} | {group[0], group[-1]}
