"""Call signatures of compiled functions over a case's points: which sizes change, and which calls one graph may serve.

Calls have one *signature* if they call the same code under the same compile config, with arguments of the same structure,
and their sizes are equal or change with a declared `Range`. A size that is 1 at some points has a signature of its own there,
because Dynamo has no dynamic dimension that may be 1. `Values` are static: each value has its own signature.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from aot_cache.artifact import key
from aot_cache.misses.call_signature import Leaf, structure_of
from aot_cache.misses.size_relations import AffineSize, fit
from aot_cache.recipes.dimensions import Point
from aot_cache.store import JsonObject

if TYPE_CHECKING:  # tracing kernels does without torch's compiler
    from aot_cache.upstream.hooks.dynamo_frames import Frame


_SPECIAL = (0, 1)
"""Sizes for which Dynamo always makes a graph of its own."""


_Pattern = tuple[tuple[tuple[int, int], ...], ...]


@dataclass
class _Series:
    """The n-th call of one structure at every point of a case, and how its sizes change."""

    paths: list[str]
    integer: list[bool]
    fixed: list[bool]
    first: list[tuple[int, ...]]
    varies: list[set[int]]
    low: list[list[int | None]]
    high: list[list[int | None]]
    points: dict[_Pattern, list[int]] = field(default_factory=dict)
    """For each pattern of special sizes, as (dimension, size) of each leaf, the points where it is so."""
    seen: dict[int, list[tuple[int, ...]]] = field(default_factory=dict)
    """Point → the sizes of each leaf that is not the model's own."""

    def add(self, found: list[SeenLeaf], point: int) -> None:
        self.seen[point] = [leaf.sizes for leaf in found if not leaf.fixed]
        pattern = []
        for n, leaf in enumerate(found):
            sizes, special = leaf.sizes, []
            for d, size in enumerate(sizes):
                if size != self.first[n][d]:
                    self.varies[n].add(d)
                if size in _SPECIAL:
                    special.append((d, size))
                else:
                    low, high = self.low[n][d], self.high[n][d]
                    self.low[n][d] = size if low is None else min(low, size)
                    self.high[n][d] = size if high is None else max(high, size)
            pattern.append(tuple(special))
        self.points.setdefault(tuple(pattern), []).append(point)


@dataclass
class CallSignature:
    """See the module's docstring.

    Args:
        function, module, line: what is called.
        structure: digest of the code, the compile config and the structure of the arguments.
        sizes: for each leaf and dimension a size, or [low, high] where it changes with the point.
        points: case number → points at which such a call is made.
        places: case number → occurrence indices, among a point's calls of this structure, of calls with this signature.
    """

    function: str
    module: str
    line: int
    structure: str
    paths: list[str]
    integer: list[bool]
    sizes: list[list[object]]
    wrapping: JsonObject | None
    points: dict[int, list[int]] = field(default_factory=dict)
    places: dict[int, set[int]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return key.digest([self.structure, self.paths, self.sizes])[:16]

    def fits(self, structure: str, found: list[Leaf]) -> bool:
        """Whether a call has this signature."""
        return structure == self.structure and all(
            _fits(size, wanted) for leaf, sizes in zip(found, self.sizes) for size, wanted in zip(leaf.sizes, sizes)
        )

    def takes(self, structure: str, sizes: Mapping[str, Sequence[int]]) -> bool:
        """Whether a recorded call has this signature; `sizes` has none of the model's own parameters."""
        mine = dict(zip(self.paths, self.sizes))
        return structure == self.structure and all(
            len(found) == len(mine.get(path, ())) and all(map(_fits, found, mine[path]))
            for path, found in sizes.items()
        )

    def dynamic(self) -> dict[str, list[list[int]]]:
        """Path → [dimension, low, high] of each size that changes; dimension -1 stands for an integer argument."""
        return {
            path: [[-1 if integer else d, *size] for d, size in enumerate(sizes) if isinstance(size, list)]
            for path, integer, sizes in zip(self.paths, self.integer, self.sizes)
            if any(isinstance(size, list) for size in sizes)
        }


def _fits(size: int, wanted: object) -> bool:
    return bool(wanted[0] <= size <= wanted[1] if isinstance(wanted, list) else size == wanted)


@dataclass(frozen=True)
class SeenLeaf:
    """A tensor or integer of a call: the expression that leads to it, and its sizes (see `misses.call_signature.Leaf`)."""

    path: str
    integer: bool
    fixed: bool
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class SeenCall:
    """A call of a compiled function, as a child reports it to its parent."""

    function: str
    module: str
    line: int
    wrapping: JsonObject | None
    structure: str
    leaves: list[SeenLeaf]


def seen_call(frame: Frame, mode: str) -> SeenCall:
    """The call that Dynamo asks to compile as `frame`."""
    structure, found = structure_of(frame, mode)
    leaves = [SeenLeaf(x.path, not isinstance(x.value, torch.Tensor), x.fixed, x.sizes) for x in found]
    return SeenCall(frame.name, frame.module, frame.code.co_firstlineno, frame.wrapping, structure, leaves)


class CallTrace:
    """Collects the calls of all points of one case with one choice of `Values`, and groups them by signature."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, int], _Series] = {}
        self._frames: dict[str, tuple[str, str, int, Any]] = {}

    def add(self, calls: Sequence[SeenCall], point: int) -> None:
        """Add the calls of a point, in their order."""
        count: dict[str, int] = {}
        for call in calls:
            number = count.get(call.structure, 0)
            count[call.structure] = number + 1
            self._frames[call.structure] = (call.function, call.module, call.line, call.wrapping)
            place = (call.structure, number)
            if place not in self.series:
                self.series[place] = _Series(
                    [leaf.path for leaf in call.leaves],
                    [leaf.integer for leaf in call.leaves],
                    [leaf.fixed for leaf in call.leaves],
                    [leaf.sizes for leaf in call.leaves],
                    [set() for _ in call.leaves],
                    [[None] * len(leaf.sizes) for leaf in call.leaves],
                    [[None] * len(leaf.sizes) for leaf in call.leaves],
                )
            self.series[place].add(call.leaves, point)

    def signatures(self, case: int) -> dict[str, CallSignature]:
        """All signatures seen, by id."""
        out: dict[str, CallSignature] = {}
        for (structure, number), series in self.series.items():
            for pattern, points in series.points.items():
                name, module, line, wrapping = self._frames[structure]
                signature = CallSignature(
                    name, module, line, structure, series.paths, series.integer, _sizes(series, pattern), wrapping
                )
                same = out.setdefault(signature.id, signature)
                same.points[case] = sorted({*same.points.get(case, ()), *points})
                same.places.setdefault(case, set()).add(number)
        return out


Occurrence = tuple[str, int]
"""A structure, and the index of a call among a point's calls of that structure."""


def follows(traces: Iterable[CallTrace], points: Sequence[Point]) -> dict[Occurrence, dict[str, list[AffineSize]]]:
    """How the sizes of each occurrence follow from the point, over all choices of a case's `Values`.

    Args:
        traces: all of one case.
        points: of the case, by number.
    """
    alike: dict[Occurrence, list[_Series]] = {}
    for survey in traces:
        for place, series in survey.series.items():
            alike.setdefault(place, []).append(series)
    known: dict[object, AffineSize] = {}
    out: dict[Occurrence, dict[str, list[AffineSize]]] = {}
    for place, several in alike.items():
        seen = {at: sizes for series in several for at, sizes in series.seen.items()}
        paths = [path for path, fixed in zip(several[0].paths, several[0].fixed) if not fixed]
        where = [points[at] for at in seen]
        for n, path in enumerate(paths):
            columns = zip(*(sizes[n] for sizes in seen.values()))
            out.setdefault(place, {})[path] = [_fitted(column, tuple(seen), where, known) for column in columns]
    return out


def _fitted(
    column: tuple[int, ...], at: tuple[int, ...], where: Sequence[Point], known: dict[object, AffineSize]
) -> AffineSize:
    """`fit`, once for equal columns of sizes: a model has many equal layers."""
    if (column, at) not in known:
        known[column, at] = fit(column, where)
    return known[column, at]


def _sizes(series: _Series, pattern: _Pattern) -> list[list[object]]:
    out = []
    for n, first in enumerate(series.first):
        sizes: list[object] = []
        for d, size in enumerate(first):
            if d not in series.varies[n] or series.fixed[n]:
                sizes.append(size)
            elif d in dict(pattern[n]):
                sizes.append(dict(pattern[n])[d])
            elif series.low[n][d] == series.high[n][d]:
                sizes.append(series.low[n][d])
            else:
                sizes.append([series.low[n][d], series.high[n][d]])
        out.append(sizes)
    return out
