"""aot_cache.recipes.dimensions: dimensions, enumeration, and sets of points as text."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Callable
from random import Random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from aot_cache.errors import DeclarationError
from aot_cache.recipes.dimensions import LARGEST, Dimension, Point, Range, Values, describe, enumerate_points, expand
from aot_cache.recipes.dimensions import parse_dimension as parse

# --- strategies ------------------------------------------------------------------------------------------------------

ranges = st.builds(
    lambda lo, length, step: Range(lo, lo + length, step),
    st.integers(0, 2**33),
    st.integers(0, 2**33),
    st.integers(1, 100),
)
lists = st.lists(st.integers(0, 2**33), min_size=1, max_size=40).map(lambda values: Values(*values))
dimensions = ranges | lists


@st.composite
def patterned(draw: st.DrawFn) -> set[int]:
    """Sets as kernels make them: spans and remainders, joined and taken away; never empty."""
    values: set[int] = draw(st.sets(st.integers(0, 300), min_size=1, max_size=20))
    for _ in range(draw(st.integers(0, 3))):
        lo, step = draw(st.integers(0, 300)), draw(st.integers(1, 20))
        part = set(range(lo, lo + draw(st.integers(1, 400)), step))
        values = values | part if draw(st.booleans()) else (values - part or values)
    return values


@st.composite
def point_sets(draw: st.DrawFn) -> tuple[list[str], list[Point]]:
    """Names and some points over them, rising and each once: a union of boxes with some points knocked out."""
    names = ["tokens", "batch", "heads"][: draw(st.integers(1, 3))]
    axis = st.sets(st.integers(0, 40), min_size=1, max_size=6)
    rows: set[tuple[int, ...]] = set()
    for _ in range(draw(st.integers(0, 4))):
        rows.update(itertools.product(*(draw(axis) for _ in names)))
    if rows:
        rows -= draw(st.sets(st.sampled_from(sorted(rows)), max_size=5))
    return names, [dict(zip(names, row)) for row in sorted(rows)]


# --- dimensions ------------------------------------------------------------------------------------------------------


def test_a_range_includes_both_ends() -> None:
    dim = Range(1, 512)
    values = list(dim)
    assert (values[0], values[-1], len(dim), dim.text) == (1, 512, 512, "1..512")
    assert 512 in dim and 513 not in dim and 0 not in dim


def test_a_stepped_range_stops_where_its_steps_do() -> None:
    dim = Range(1, 10, 4)
    assert list(dim) == [1, 5, 9]
    assert len(dim) == 3
    assert 10 not in dim and 9 in dim
    assert dim.text == "1..10/4"


def test_values_are_a_set() -> None:
    assert Values(48, 16, 32, 16) == Values(16, 32, 48)
    assert list(Values(48, 16, 32, 16)) == [16, 32, 48]
    assert Values(48, 16, 32).text == "16,32,48"
    assert len(Values(5, 5)) == 1
    assert repr(Values(48, 16)) == "Values(16, 48)"


@pytest.mark.parametrize("dim", [Range(1, 9), Values(1, 9)])
def test_dimensions_hold_only_ints(dim: Dimension) -> None:
    assert 1 in dim
    assert True not in dim and 1.0 not in dim and "1" not in dim


@pytest.mark.parametrize("dim", [Range(0, 512, 16), Values(1, 7)])
def test_dimensions_are_frozen_hashable_and_cross_processes(dim: Dimension) -> None:
    assert pickle.loads(pickle.dumps(dim)) == dim
    assert hash(pickle.loads(pickle.dumps(dim))) == hash(dim)
    with pytest.raises(AttributeError):
        dim.lo = 3  # type: ignore[misc, union-attr]


def test_a_long_range_costs_nothing() -> None:
    dim = Range(0, LARGEST)
    assert len(dim) == LARGEST + 1
    assert 2**62 in dim


@pytest.mark.parametrize(
    "bad",
    [
        lambda: Range(-1, 4),
        lambda: Range(5, 4),
        lambda: Range(1, 4, 0),
        lambda: Range(1, 4, -1),
        lambda: Range(1, 4.0),  # type: ignore[arg-type]
        lambda: Range("1", 4),  # type: ignore[arg-type]
        lambda: Range(True, 4),
        lambda: Range(0, LARGEST + 1),
        lambda: Values(),
        lambda: Values(-1),
        lambda: Values(1, 2.5),  # type: ignore[arg-type]
        lambda: Values(1, True),
        lambda: Values([1, 2]),  # type: ignore[arg-type]
        lambda: Values(LARGEST + 1),
    ],
)
def test_bad_dimensions_are_refused(bad: Callable[[], object]) -> None:
    with pytest.raises(DeclarationError):
        bad()


@pytest.mark.parametrize(
    ("text", "dim"),
    [
        ("1..512", Range(1, 512)),
        ("1..512/16", Range(1, 512, 16)),
        ("16,32", Values(16, 32)),
        (" 16, 32 ", Values(16, 32)),
        ("8", Values(8)),
        ("0..0", Range(0, 0)),
    ],
)
def test_parse_dimension(text: str, dim: Dimension) -> None:
    assert parse(text) == dim


@given(dimensions)
def test_the_text_of_a_dimension_reads_back(dim: Dimension) -> None:
    assert parse(dim.text) == dim


@pytest.mark.parametrize(
    "text",
    ["", ",", "1,", "a", "1..", "..5", "5..1", "1..5/0", "-1..5", "1-5", "1..5,9", "1.5", "1...5", "1..5/", "١..٥"]
    + ["9" * 5000, "0.." + "9" * 19, "1..5 except 3", "1\n2"],
)
def test_bad_texts_are_refused(text: str) -> None:
    with pytest.raises(DeclarationError):
        parse(text)


# --- enumeration -----------------------------------------------------------------------------------------------------


def test_all_points_when_they_fit() -> None:
    found = enumerate_points({"tokens": Values(1, 16), "batch": Range(1, 3)})
    assert found.points == [{"tokens": t, "batch": b} for t in (1, 16) for b in (1, 2, 3)]
    assert [list(point) for point in found.points] == [["tokens", "batch"]] * 6
    assert (found.total, found.sampled) == (6, ())


def test_no_dimension_is_one_point() -> None:
    found = enumerate_points({})
    assert (found.points, found.total, found.sampled) == ([{}], 1, ())


def test_the_limit_itself_fits() -> None:
    assert enumerate_points({"n": Range(1, 100)}, limit=100).sampled == ()
    assert enumerate_points({"n": Range(1, 101)}, limit=100).sampled == ("n",)


def test_the_longest_dimension_is_sampled_first() -> None:
    found = enumerate_points({"batch": Range(1, 64), "tokens": Range(1, 8192)})
    assert found.sampled == ("tokens",)
    assert {point["batch"] for point in found.points} == set(range(1, 65))
    assert found.total == 64 * 8192


def test_a_sample_has_every_place_where_keys_change() -> None:
    dim = Range(1, 2**31 + 5)
    values = {point["n"] for point in enumerate_points({"n": dim}).points}
    assert {1, 2, 15, 16, 17, 31, 32, 33, 2**31 - 1, 2**31, 2**31 + 5} <= values
    for exponent in range(1, 31):
        power = 2**exponent
        assert {power - 1, power, power + 1} <= values
    for exponent in range(4, 31):
        inside = {value for value in values if 2**exponent <= value < 2 ** (exponent + 1)}
        assert any(value % 16 == 0 for value in inside) and any(value % 16 for value in inside)
    others = [value for value in values if value & (value - 1) and (value - 1) & (value - 2) and value & (value + 1)]
    assert len(others) > 64, "no spread of other values"


def test_a_sample_of_a_stepped_range_has_the_neighbours_of_a_change_that_it_jumps_over() -> None:
    dim = Range(5, 10**6, 7)  # 4096 and 1024 are not in it
    values = {point["n"] for point in enumerate_points({"n": dim}).points}
    for target in (16, 32, 1024, 4096, 65536):
        assert max(value for value in dim if value <= target) in values
        assert min(value for value in dim if value >= target) in values


def test_a_multiple_of_16_is_found_among_few() -> None:
    odd = list(range(513, 1024, 2))
    found = enumerate_points({"n": Values(*odd, 528), "m": Range(1, 10**6)}, limit=16384)
    assert 528 in {point["n"] for point in found.points}


@given(st.dictionaries(st.sampled_from("abc"), dimensions, min_size=1, max_size=3), st.integers(8, 3000))
def test_sampling_keeps_the_ends_and_invents_nothing(dims: dict[str, Dimension], limit: int) -> None:
    found = enumerate_points(dims, limit)
    assert found.total == math.prod(len(dim) for dim in dims.values())
    assert 1 <= len(found.points) <= limit
    assert len({tuple(point.items()) for point in found.points}) == len(found.points)
    for name, dim in dims.items():
        seen = {point[name] for point in found.points}
        assert all(value in dim for value in seen)
        assert {dim.values[0], dim.values[-1]} <= seen
        assert (name in found.sampled) == (len(seen) < len(dim))
    if found.total <= limit:
        assert found.sampled == () and len(found.points) == found.total
    # A product over what was seen: nothing but whole dimensions is left out.
    assert len(found.points) == math.prod(len({point[name] for point in found.points}) for name in dims)
    assert enumerate_points(dims, limit) == found


def test_thinning_drops_the_spread_before_what_changes_keys() -> None:
    dims = {name: Range(1, 4096) for name in "ab"}
    for point_limit in (16384, 2500):
        values = {point["a"] for point in enumerate_points(dims, point_limit).points}
        assert {1, 2, 15, 16, 17, 31, 32, 33, 4096} <= values
    assert len(values) <= 50


def test_ends_that_do_not_fit_are_an_error() -> None:
    dims = {f"d{number}": Range(1, 9) for number in range(5)}
    assert len(enumerate_points(dims, limit=32).points) == 32
    with pytest.raises(DeclarationError, match=r"at most 31 points, found 32 from the ends of 5 dimensions alone"):
        enumerate_points(dims, limit=31)


@pytest.mark.parametrize("limit", [0, -1, True, 1.5, None])
def test_a_bad_limit_is_refused(limit: int) -> None:
    with pytest.raises(DeclarationError):
        enumerate_points({"n": Range(1, 2)}, limit)


@pytest.mark.parametrize("dims", [{"n": range(1, 5)}, {"n": "1..5"}, {"n": [1, 2]}, {3: Range(1, 2)}])
def test_what_is_no_dimension_is_refused(dims: dict[str, Dimension]) -> None:
    with pytest.raises(DeclarationError):
        enumerate_points(dims)


# --- sets of points as text ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ([5], "5"),
        ([1, 2], "1,2"),
        ([1, 2, 3], "1..3"),
        ([2, 4, 6], "2,4,6"),
        ([2, 4, 6, 8, 10, 12], "2..12/2"),
        ([1, 5, 6, 7, 8], "1,5..8"),
        (range(1, 8193), "1..8192"),
        ([value for value in range(1, 8193) if value % 16], "1..8191 except 16..8176/16"),
        ([value for value in range(2, 8193, 2) if value % 16], "2..8190/2 except 16..8176/16"),
        ([value for value in range(1, 5001) if value % 4 in (1, 2)], "1..4997/4,2..4998/4"),
        ([value for value in range(1, 513) if value != 77], "1..76,78..512"),
        ([value for value in range(1, 513) if value not in (77, 99, 200)], "1..512 except 77,99,200"),
        ([0, 2**40], "0,1099511627776"),
    ],
)
def test_one_dimension_reads_well(values: list[int], text: str) -> None:
    assert describe([{"n": value} for value in values], ["n"]) == [{"n": text}]
    assert expand([{"n": text}]) == [{"n": value} for value in values]


@given(patterned() | st.sets(st.integers(0, LARGEST), min_size=1, max_size=30))
@example({0})
@example({0, LARGEST})
def test_one_dimension_round_trips(values: set[int]) -> None:
    (box,) = describe([{"n": value} for value in values], ["n"])
    assert expand([box]) == [{"n": value} for value in sorted(values)]
    assert len(box["n"]) <= len(",".join(map(str, values))), "longer than the plain list"


@given(point_sets())
def test_boxes_are_exact_and_disjoint(case: tuple[list[str], list[Point]]) -> None:
    names, points = case
    boxes = describe(points, names)
    assert expand(boxes) == points
    assert sum(len(expand([box])) for box in boxes) == len(points)
    assert all(list(box) == names for box in boxes)


@given(st.lists(patterned(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_a_full_product_is_one_box(axes: list[set[int]], random: Random) -> None:
    axes = [set(sorted(axis)[:20]) for axis in axes]
    names = ["a", "b", "c"][: len(axes)]
    points = [dict(zip(names, row)) for row in itertools.product(*axes)]
    random.shuffle(points)
    assert len(describe(points, names)) == 1


def test_a_declaration_describes_itself() -> None:
    dims: dict[str, Dimension] = {"tokens": Range(1, 512), "batch": Range(1, 16, 3), "heads": Values(8)}
    boxes = describe(enumerate_points(dims).points, dims)
    assert boxes == [{"tokens": "1..512", "batch": "1..16/3", "heads": "8"}]


def test_a_size_of_one_apart_makes_two_boxes() -> None:
    points = [{"a": a, "b": b} for a in range(1, 9) for b in range(1, 9) if a == 1 or b % 2 == 0]
    assert describe(points, ["a", "b"]) == [{"a": "1", "b": "1..8"}, {"a": "2..8", "b": "2..8/2"}]


def test_points_given_twice_count_once() -> None:
    assert describe([{"n": 3}, {"n": 3}], ["n"]) == [{"n": "3"}]


def test_nothing_and_the_point_without_dimensions_differ() -> None:
    assert describe([], ["n"]) == [] and expand([]) == []
    assert describe([{}], []) == [{}] and expand([{}]) == [{}]


@pytest.mark.parametrize(
    "points", [[{"a": 1}], [{"a": 1, "b": 2, "c": 3}], [{"a": 1, "c": 2}], [{"a": 1, "b": -1}], [{"a": 1, "b": "2"}]]
)
def test_bad_points_are_refused(points: list[Point]) -> None:
    with pytest.raises(DeclarationError):
        describe(points, ["a", "b"])


@pytest.mark.parametrize(
    "text",
    ["", "a", "1..", "3..1", "1..5/0", "-1", "1,,2", "1 2", "1..5 except ", " except 1", "1..9 except 2 except 3"]
    + ["1..9 Except 3", "1..9  except 3", "9" * 5000, "0..99999999999"],
)
def test_bad_sets_are_refused(text: str) -> None:
    with pytest.raises(DeclarationError):
        expand([{"n": text}])


def test_boxes_must_agree_on_the_dimensions() -> None:
    with pytest.raises(DeclarationError):
        expand([{"a": "1"}, {"b": "1"}])


def test_a_box_may_not_fill_the_memory() -> None:
    with pytest.raises(DeclarationError, match=r"more than 1000 (points|values)"):
        expand([{"a": "1..100", "b": "1..100"}], limit=1000)
    with pytest.raises(DeclarationError, match=r"more than 1000 (points|values)"):
        expand([{"a": "1..600"}, {"a": "601..1200"}], limit=1000)
    assert len(expand([{"a": "1..1000"}], limit=1000)) == 1000


def test_what_describe_writes_fits_the_limit_of_its_own_size() -> None:
    points = [{"n": value} for value in range(1, 5001) if value % 5 == 0 or value % 5 == 1]
    assert expand(describe(points, ["n"]), limit=len(points)) == points


def test_many_values_are_read_in_no_time() -> None:
    assert len(Values(*range(300_000))) == 300_000
