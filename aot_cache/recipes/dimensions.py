"""Dimensions, the points they span, and point sets as readable text.

A dimension is the set of integers that one size of a model may take. `enumerate_points` turns declared dimensions into the
points that a build visits. `describe` writes a set of points as text that can be read and diffed, and `expand` parses it.

The text of a set in one dimension is a comma-separated list of runs, `a`, `a..b` or `a..b/step` (ends included),
optionally followed by ` except ` and the runs to subtract: `1..8191 except 16..8176/16`.
"""

from __future__ import annotations

import itertools
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from aot_cache.errors import DeclarationError

Point = dict[str, int]
"""One value for every dimension, in the order in which the dimensions were declared."""

LARGEST = 2**63 - 2
"""The largest value of a dimension: sizes are int64, and `len()` of a longer range overflows."""


@dataclass(frozen=True)
class Range:
    """The values `lo`, `lo + step`, … up to and including `hi`, if a step lands on it.

    Raises:
        DeclarationError: a bound is not an int, is negative or too large, or the range is empty.
    """

    lo: int
    hi: int
    step: int = 1

    def __post_init__(self) -> None:
        for value in (self.lo, self.hi, self.step):
            _check_value(value, f"Range({self.lo!r}, {self.hi!r}, {self.step!r})")
        if self.step < 1 or self.hi < self.lo:
            raise DeclarationError(
                f"Range({self.lo}, {self.hi}, {self.step}) has no value", hint="give lo <= hi and step >= 1"
            )

    @property
    def values(self) -> Sequence[int]:
        """The values in rising order, as a `range`: constant cost for any length."""
        return range(self.lo, self.hi + 1, self.step)

    @property
    def text(self) -> str:
        """The declaration as `parse_dimension` reads it: `1..512` or `1..512/4`."""
        return f"{self.lo}..{self.hi}" + (f"/{self.step}" if self.step > 1 else "")

    def __iter__(self) -> Iterator[int]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __contains__(self, value: object) -> bool:
        return _is_int(value) and value in self.values


@dataclass(frozen=True, init=False)
class Values:
    """Exactly these values, sorted and without duplicates, so that equal sets make equal plans.

    Raises:
        DeclarationError: there is no value, or one is not an int, is negative or too large.
    """

    values: tuple[int, ...]

    def __init__(self, *values: int) -> None:
        if not values:
            raise DeclarationError("Values() has no value", hint="list the values, as in Values(16, 32)")
        for value in values:
            _check_value(value, "Values(…)")
        object.__setattr__(self, "values", tuple(sorted(set(values))))

    def __repr__(self) -> str:
        return f"Values({', '.join(map(str, self.values))})"

    @property
    def text(self) -> str:
        """The declaration as `parse_dimension` reads it: `16,32,48`."""
        return ",".join(map(str, self.values))

    def __iter__(self) -> Iterator[int]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __contains__(self, value: object) -> bool:
        return _is_int(value) and value in self.values


Dimension = Range | Values

# Nineteen digits hold every int64. Without the bound, int() would raise for a text of thousands of digits.
_RUN = re.compile(r"([0-9]{1,19})(?:\.\.([0-9]{1,19})(?:/([0-9]{1,19}))?)?")


def parse_dimension(text: str) -> Dimension:
    """Read `1..512`, `1..512/16`, `16,32` or `8`.

    Raises:
        DeclarationError: the text is none of these, or the dimension is empty.
    """
    parts = [_RUN.fullmatch(part.strip()) for part in text.split(",")]
    if len(parts) == 1 and parts[0] is not None and parts[0][2] is not None:
        return Range(int(parts[0][1]), int(parts[0][2]), int(parts[0][3] or 1))
    if all(part is not None and part[2] is None for part in parts):
        return Values(*(int(part[1]) for part in parts if part is not None))
    raise DeclarationError("a range or a list of values", repr(text), "write it as 1..512, 1..512/16, or 16,32,48")


# --- from dimensions to points ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Enumeration:
    """The points to visit.

    Attributes:
        points: every point; the last dimension changes fastest.
        total: number of points without sampling; more than `len(points)` if a dimension was sampled.
        sampled: the dimensions of which only some values are visited, in declared order.
        added: number of missed points at the end of `points` (see `Case.missed`).
    """

    points: list[Point]
    total: int
    sampled: tuple[str, ...]
    added: int = 0


_SPREAD = 64
_ENDS, _KEYS, _POWERS, _OTHERS = range(4)
# Where Triton's specialization changes: a size of 1 is a constant, a multiple of 16 an attribute, and 2**31 takes an i64.
_KEY_CHANGES = (1, 2, 15, 16, 17, 31, 32, 33, 2**31 - 1, 2**31)


def enumerate_points(dims: Mapping[str, Dimension], limit: int = 16384) -> Enumeration:
    """List the points of `dims`, at most `limit` of them.

    Above the limit the dimensions are sampled, the longest first, until the product fits: the values around which kernels'
    keys change are kept. If it still does not fit, the values of lowest rank are dropped, but never a dimension's two ends.

    Raises:
        DeclarationError: `limit` is below 1, a dimension is invalid, or the ends alone are more than `limit` points.
    """
    if not _is_int(limit) or limit < 1:
        raise DeclarationError("a limit of at least 1 point", repr(limit))
    for name, dim in dims.items():
        if not isinstance(name, str) or not isinstance(dim, (Range, Values)):
            raise DeclarationError(
                "a name and a Range or Values", f"{name!r}: {dim!r}", "declare each dimension as name=Range(...)"
            )
    total = math.prod(len(dim) for dim in dims.values())
    chosen: dict[str, Sequence[int]] = {name: dim.values for name, dim in dims.items()}
    ranked: dict[str, list[tuple[int, int]]] = {}
    for name in sorted(dims, key=lambda name: -len(dims[name])):
        if math.prod(map(len, chosen.values())) <= limit:
            break
        ranked[name] = _sample(dims[name].values)
        chosen[name] = [value for value, _ in ranked[name]]
    if math.prod(map(len, chosen.values())) > limit:
        _thin(ranked, limit)
    for name, values in ranked.items():
        chosen[name] = sorted(value for value, _ in values)
    points = [dict(zip(dims, combination)) for combination in itertools.product(*chosen.values())]
    return Enumeration(points, total, tuple(name for name in dims if len(chosen[name]) < len(dims[name])))


def _sample(values: Sequence[int]) -> list[tuple[int, int]]:
    """Choose (value, rank) pairs from rising `values`. The pairs to drop first are last."""
    ranks = {values[0]: _ENDS, values[-1]: _ENDS}

    def add(target: int, rank: int) -> None:
        # A dimension with steps may not have the target: then the nearest values on both sides are taken.
        after = bisect_left(values, target)
        for index in (bisect_right(values, target) - 1, after):
            if 0 <= index < len(values):
                ranks.setdefault(values[index], rank)

    for target in _KEY_CHANGES:
        add(target, _KEYS)
    powers = [2**exponent for exponent in range(values[-1].bit_length() + 1) if 2 ** (exponent + 1) > values[0]]
    for power in powers:
        for target in (power, power - 1, power + 1):
            add(target, _POWERS)
        for value in _one_of_each(values, power):
            ranks.setdefault(value, _POWERS)
    wanted = min(len(values), len(ranks) + _SPREAD)
    for number in itertools.count(1):
        # Multiples of the golden ratio: evenly spread for any count, and not aligned with any power of two.
        if len(ranks) >= wanted or number > 16 * _SPREAD:
            break
        fraction = number * 0x9E3779B97F4A7C15 % 2**64
        ranks.setdefault(values[fraction * len(values) >> 64], _OTHERS)
    return list(ranks.items())


def _one_of_each(values: Sequence[int], power: int) -> Iterator[int]:
    """A multiple of 16 and a non-multiple among the values in [power, 2 * power), from its upper half if possible."""
    start, middle, stop = (bisect_left(values, bound) for bound in (power, power + power // 2, 2 * power))
    # Sixteen neighbours in an arithmetic sequence have all its remainders modulo 16; a list must be searched whole.
    reach = 16 if isinstance(values, range) else len(values)
    indices = [*range(middle, min(stop, middle + reach)), *range(start, min(middle, start + reach))]
    for multiple in (True, False):
        for index in indices:
            if (values[index] % 16 == 0) is multiple:
                yield values[index]
                break


def _thin(ranked: dict[str, list[tuple[int, int]]], limit: int) -> None:
    """Drop values from the tails of `ranked` until the product fits: lowest rank first, then from the longest dimension."""
    while math.prod(map(len, ranked.values())) > limit:
        name = max(ranked, key=lambda name: (ranked[name][-1][1], len(ranked[name])))
        if ranked[name][-1][1] == _ENDS:
            raise DeclarationError(
                f"at most {limit} points",
                f"{math.prod(map(len, ranked.values()))} from the ends of {len(ranked)} dimensions alone",
                "declare fewer dimensions or a higher limit",
            )
        ranked[name].pop()


# --- sets of points as text ------------------------------------------------------------------------------------------

_Row = tuple[int, ...]


def describe(points: Iterable[Point], dims: Iterable[str]) -> list[dict[str, str]]:
    """Write a set of points as boxes: dimension -> text of its values.

    The boxes are disjoint and their union is exactly the set; a full product is one box. `dims` gives the names in
    order; it may be a mapping of dimensions.

    Raises:
        DeclarationError: a point does not have exactly these dimensions, or a value is not an int of at least 0.
    """
    names = list(dims)
    rows: set[_Row] = set()
    for point in points:
        if len(point) != len(names) or not all(name in point for name in names):
            raise DeclarationError(f"a point of {', '.join(names) or 'no dimension'}", repr(point))
        rows.add(tuple(point[name] for name in names))
    for value in set(itertools.chain.from_iterable(rows)):
        _check_value(value, "a point")
    return [dict(zip(names, texts)) for texts in _boxes(sorted(rows), len(names))]


def point_text(point: Mapping[str, int]) -> str:
    """A point for display: `batch=2, tokens=1`."""
    return ", ".join(f"{dim}={value}" for dim, value in point.items())


def least(box: Mapping[str, str]) -> Point:
    """The first point of a box that `describe` wrote; constant cost for any size.

    Raises:
        DeclarationError: a text is not in the grammar.
    """
    found = {dim: _RUN.match(text) for dim, text in box.items()}
    for dim, match in found.items():
        if match is None:
            raise DeclarationError("a set of values", repr(box[dim]), "write it as 1..8191 except 16..8176/16")
    return {dim: int(match[1]) for dim, match in found.items() if match is not None}


def holds(box: Mapping[str, str], point: Mapping[str, int]) -> bool:
    """Whether a box that `describe` wrote contains a point.

    Raises:
        DeclarationError: a text is not in the grammar.
    """
    return set(box) == set(point) and all(point[dim] in _parse_set(text, 1 << 20) for dim, text in box.items())


def expand(boxes: Iterable[Mapping[str, str]], limit: int = 1 << 20) -> list[Point]:
    """The inverse of `describe`: every point of the boxes once, in rising order (the last dimension fastest).

    Raises:
        DeclarationError: a text is not in the grammar, the boxes differ in their dimensions, or they hold more than
            `limit` points (a typo in a plan must not exhaust memory).
    """
    names: list[str] | None = None
    rows: set[_Row] = set()
    left = limit
    for box in boxes:
        names = list(box) if names is None else names
        if set(box) != set(names):
            raise DeclarationError(
                f"boxes of {', '.join(names)}", f"a box of {', '.join(box)}", "give all boxes the same dimensions"
            )
        sets = [_parse_set(box[name], limit) for name in names]
        left -= math.prod(map(len, sets))
        if left < 0:
            raise DeclarationError(f"the boxes hold more than {limit} points")
        rows.update(itertools.product(*sets))
    return [dict(zip(names or [], row)) for row in sorted(rows)]


def _boxes(rows: Sequence[_Row], width: int) -> Iterator[list[str]]:
    """The texts of disjoint boxes whose union is the rising `rows`."""
    if width == 0 or not rows:
        yield from ([] for _ in rows)
        return
    if width == 1:
        yield [_set_text([row[0] for row in rows])]
        return
    # Values of the first dimension with the same rest (the rows without it) share boxes. Different rests make different
    # boxes, so boxes are disjoint. A full product has one rest only.
    firsts: dict[tuple[_Row, ...], list[int]] = {}
    for first, group in itertools.groupby(rows, key=lambda row: row[0]):
        firsts.setdefault(tuple(row[1:] for row in group), []).append(first)
    for rest, values in firsts.items():
        text = _set_text(values)
        for texts in _boxes(rest, width - 1):
            yield [text, *texts]


# Longer texts, in characters, are worth the slow search for a shorter one.
_SHORT = 64
# At most so many values are subtracted for each one kept: without a limit, a set with wide gaps would cost its whole span.
_TAKEN = 4


def _set_text(values: Sequence[int]) -> str:
    """The shortest text found for rising, distinct, non-empty `values`."""
    forms = [(values, "")]
    step = math.gcd(*(after - before for before, after in itertools.pairwise(values))) or 1
    whole = range(values[0], values[-1] + 1, step)
    if 0 < len(whole) - len(values) <= _TAKEN * len(values):
        present = set(values)
        forms.append(([value for value in whole if value not in present], f"{_run_text(whole)} except "))
    shortest = min((prefix + _adjacent_runs(part) for part, prefix in forms), key=len)
    if len(shortest) > _SHORT:  # search for interleaved runs, such as two remainders of one modulus
        shortest = min(shortest, *(prefix + _interleaved_runs(part) for part, prefix in forms), key=len)
    return shortest


def _run_text(run: range) -> str:
    """The run as text: a list if that is shorter (`2,4,6`), else `a..b` or `a..b/step`."""
    step = f"/{run.step}" if run.step > 1 else ""
    short = f"{run[0]}..{run[-1]}{step}"
    return short if len(run) > 2 and len(short) < len(",".join(map(str, run[:8]))) else ",".join(map(str, run))


def _adjacent_runs(values: Sequence[int]) -> str:
    """Text of runs of neighbours, from the left. Each run ends where its step changes."""
    texts = []
    index = 0
    while index < len(values):
        end = index
        step = values[index + 1] - values[index] if index + 1 < len(values) else 1
        while end + 1 < len(values) and values[end + 1] - values[end] == step:
            end += 1
        run = range(values[index], values[end] + 1, step)
        text = _run_text(run)
        if ".." not in text:  # the run is too short: take one value, the others may start a better run
            run, text = run[:1], str(values[index])
        texts.append(text)
        index += len(run)
    return ",".join(texts)


def _interleaved_runs(values: Sequence[int]) -> str:
    """Text of runs that may interleave. Each starts at the least value left, and has the step that makes it longest, out of
    the steps to the next 32 values."""
    left = set(values)
    texts = []
    for index, first in enumerate(values):
        if first not in left:
            continue
        best = range(first, first + 1)
        for other in values[index + 1 : index + 33]:
            last = other
            while last in left:
                last += other - first
            run = range(first, last, other - first)
            best = max(best, run, key=len)
        text = _run_text(best)
        if ".." not in text:
            best, text = best[:1], str(first)
        left.difference_update(best)
        texts.append(text)
    return ",".join(texts)


def _parse_set(text: str, limit: int) -> set[int]:
    """The values that `text` names. Raises DeclarationError for more than `_set_text` writes for a set of `limit` values."""
    limit *= _TAKEN + 1
    plain, separator, taken = text.partition(" except ")
    found: list[set[int]] = []
    for part in (plain, taken) if separator else (plain,):
        values: set[int] = set()
        for run in part.split(","):
            match = _RUN.fullmatch(run)
            if match is None:
                raise DeclarationError("a set of values", repr(text), "write it as 1..8191 except 16..8176/16")
            span = Range(int(match[1]), int(match[2] or match[1]), int(match[3] or 1))
            if len(values) + len(span) > limit:
                raise DeclarationError(f"{text!r} has more than {limit} values", hint="check its bounds")
            values.update(span)
        found.append(values)
    return found[0].difference(*found[1:])


def _is_int(value: object) -> TypeGuard[int]:
    # True == 1, but a bool as a size is a mistake.
    return isinstance(value, int) and not isinstance(value, bool)


def _check_value(value: object, where: str) -> None:
    if not _is_int(value) or not 0 <= value <= LARGEST:
        raise DeclarationError(f"an int from 0 to {LARGEST}", f"{value!r} in {where}")
