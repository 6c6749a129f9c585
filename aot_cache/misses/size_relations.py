"""How the sizes of a call follow from a case's dimensions: `fit` from traced calls, `solve` for a call that missed.

A relation is `[16]` for a size that is always 16, `[plus, times, dimension, ...]` for plus + times · the product of these
dimensions (one or two), and None if neither holds at all points. All numbers are integers, and every fit is exact.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from aot_cache.recipes.dimensions import LARGEST, Point

AffineSize = list[object] | None
Relations = Mapping[str, Sequence[AffineSize]]
"""Path of a tensor or integer → the relation of each of its sizes. An integer has one size, its value."""


def fit(sizes: Sequence[int], points: Sequence[Point]) -> AffineSize:
    """The relation that gives `sizes[n]` at `points[n]`, or None; `points` is not empty."""
    if len(set(sizes)) == 1:
        return [sizes[0]]
    dims = [name for name in points[0] if len({point[name] for point in points}) > 1]
    for names in (*itertools.combinations(dims, 1), *itertools.combinations(dims, 2)):
        relation = _line(sizes, [math.prod(point[name] for name in names) for point in points], names)
        if relation is not None:
            return relation
    return None


def _line(sizes: Sequence[int], values: Sequence[int], names: Sequence[str]) -> AffineSize:
    """The line through (value, size) of all points, or None."""
    other = next((n for n, value in enumerate(values) if value != values[0]), None)
    if other is None:
        return None
    times, rest = divmod(sizes[other] - sizes[0], values[other] - values[0])
    plus = sizes[0] - times * values[0]
    if rest or not times or any(size != plus + times * value for size, value in zip(sizes, values)):
        return None
    return [plus, times, *names]


def solve(
    relations: Relations, sizes: Mapping[str, Sequence[int]], seen: Point, changing: Collection[str]
) -> Point | str:
    """The point at which a call has these sizes, or one line that says why there is none.

    Args:
        relations: of the call signature.
        sizes: sizes of the call, by the same paths.
        seen: a point at which such a call was seen. A dimension that no size determines keeps its value there.
        changing: the dimensions that had several values where such calls were seen.
    """
    if {path: len(found) for path, found in sizes.items()} != {path: len(found) for path, found in relations.items()}:
        return "it is called with other tensors or integers"
    equations: dict[tuple[tuple[object, ...], int], str] = {}
    unknown = []
    for path, found in relations.items():
        for d, (relation, size) in enumerate(zip(found, sizes[path])):
            if relation is None:
                unknown.append(_name(path, d, sizes))
            else:
                equations.setdefault((tuple(relation), size), _name(path, d, sizes))
    # Equations with fewer dimensions first, so that most dimensions of a product are known already.
    point = _search({}, sorted(equations.items(), key=lambda equation: len(equation[0][0])), seen)
    if isinstance(point, str):
        return point
    untold = [name for name in seen if name in changing and name not in point]
    if unknown and untold:
        return f"{unknown[0]} does not follow from {' or '.join(untold)} alone, and no other size determines it"
    return {**seen, **point}


_Equation = tuple[tuple[tuple[object, ...], int], str]


def _search(point: Point, equations: Sequence[_Equation], seen: Point) -> Point | str:
    """The point that solves all equations, or why there is none. Equations are distinct, so there are few of them."""
    if not equations:
        return point
    ((relation, size), name), *others = equations
    why = ""
    for option in _options(point, relation, size, seen):
        found = _search(option, others, seen)
        if not isinstance(found, str):
            return found
        why = why or found
    return why or f"{name} is {size}, {_never(point, relation)}"


def _options(point: Point, relation: Sequence[Any], size: int, seen: Point) -> Iterator[Point]:
    """The extensions of `point` that give one size."""
    plus, times, names = relation[0], relation[1] if len(relation) > 1 else 0, relation[2:]
    left = [name for name in names if name not in point]
    if not left and size == plus + times * math.prod(point[name] for name in names):
        yield point
    for free in left:
        # If several dimensions are free, one is solved for and the others keep their values from `seen`.
        held = {name: point.get(name, seen[name]) for name in names if name != free}
        factor = times * math.prod(held.values())
        value, rest = divmod(size - plus, factor) if factor else (0, 1)
        if not rest and 0 <= value <= LARGEST:
            yield {**point, **held, free: value}


def _never(point: Point, relation: Sequence[Any]) -> str:
    """Why no point gives a size."""
    plus, names = relation[0], relation[2:]
    if not names:
        return f"and always {plus} in what was declared"
    text = " · ".join([*([str(relation[1])] if relation[1] != 1 else []), *names]) + (f" + {plus}" if plus else "")
    known = ", ".join(f"{name}={point[name]}" for name in names if name in point)
    return f"and not {text} with {known}" if known else f"and no whole number makes it {text}"


def _name(path: str, d: int, sizes: Mapping[str, Sequence[int]]) -> str:
    """A size for display: `size 0 of x`. The path is one of Dynamo's expressions."""
    return f"size {d} of {readable(path)}" if len(sizes[path]) > 1 else readable(path)


def readable(path: str) -> str:
    """A path for display: `L['x'].weight` → `x.weight`."""
    return path.removeprefix("L['").replace("']", "", 1)
