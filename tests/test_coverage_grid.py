"""aot_cache.cli.facts.coverage_grid and aot_cache.cli.render.grid: which unit serves which sizes."""

from __future__ import annotations

from typing import Any

import pytest

from aot_cache.artifact.plan import CasePlan
from aot_cache.cli.facts.coverage_grid import GRAPH, KERNEL, MOST_JOINED, Missed, Served, grids, signs
from aot_cache.cli.render import grid as render_grid
from aot_cache.errors import DeclarationError
from aot_cache.recipes import dimensions


def a_case(name: str = "decode", sampled: list[str] | None = None, **dims: str) -> CasePlan:
    points = 1
    for text in dims.values():
        points *= len(dimensions.parse_dimension(text))
    return CasePlan(name=name, dims=dims, points=points, total=points, sampled=sampled or [])


def graph(label: str, name: str = "m:layer", case: str = "decode", **box: str) -> Served:
    return Served(label, GRAPH, name, {case: [box]})


def kernel(label: str, name: str = "m:scale", case: str = "decode", **box: str) -> Served:
    return Served(label, KERNEL, name, {case: [box]})


def heads(grid: dict[str, Any]) -> list[str]:
    return [column["values"] for column in grid["columns"]]


def drawn(found: list[dict[str, Any]], width: int = 120) -> str:
    return "\n".join(line for grid in found for line in render_grid.lines(grid, width))


def test_sizes_that_are_served_alike_share_a_column() -> None:
    (grid,) = grids([a_case(n="1..256")], [graph("g1", n="1"), graph("g2", n="2..256")])
    assert (grid["dimension"], heads(grid)) == ("n", ["1", "2..256"])
    assert [column["count"] for column in grid["columns"]] == [1, 255]
    (row,) = grid["rows"]
    assert (row["case"], row["name"], row["kind"], row["cells"]) == ("decode", "m:layer", GRAPH, [["g1"], ["g2"]])
    assert row["missed"] == [0, 0]


def test_columns_may_interleave() -> None:
    """Multiples of 16 have a specialization of their own, wherever they are."""
    units = [kernel("k1", n="1"), kernel("k2", n="2..511 except 16..496/16"), kernel("k3", n="16..512/16")]
    (grid,) = grids([a_case(n="1..512")], units)
    assert heads(grid) == ["1", "2..511 except 16..496/16", "16..512/16"]
    assert sum(column["count"] for column in grid["columns"]) == 512
    assert grid["rows"][0]["shown"] == ["k1", "k2", "k3"]


def test_cases_of_one_dimension_stand_together() -> None:
    cases = [a_case("a", n="1..512"), a_case("b", n="2..256")]
    units = [graph("g1", case="a", n="1"), graph("g2", case="a", n="2..512"), graph("g3", "m:b", "b", n="2..256")]
    (grid,) = grids(cases, units)
    assert heads(grid) == ["1", "2..256", "257..512"]
    assert [row["cells"] for row in grid["rows"]] == [[["g1"], ["g2"], ["g2"]], [None, ["g3"], None]]
    assert grid["rows"][1]["shown"] == ["·", "g3", "·"]


def test_cases_that_would_cut_each_other_to_pieces_do_not() -> None:
    cases = [a_case("a", n="1..64"), a_case("b", n="17,40,41,50")]
    units = [graph("g1", case="a", n="1..32"), graph("g2", case="a", n="33..64")]
    units += [graph(f"g{n}", "m:b", "b", n=str(n)) for n in (17, 40, 41, 50)]
    assert [heads(grid) for grid in grids(cases, units)] == [["1..32", "33..64"], ["17", "40", "41", "50"]]


def test_a_joined_grid_stays_narrow() -> None:
    cases = [a_case(f"c{n}", n=f"1..{n}") for n in range(1, 40)]
    found = grids(cases, [graph(f"g{n}", f"m:f{n}", f"c{n}", n=f"1..{n}") for n in range(1, 40)])
    assert len(found) > 1 and all(len(grid["columns"]) <= MOST_JOINED for grid in found)
    assert sum(len(grid["rows"]) for grid in found) == 39


def test_only_dimensions_that_decide_something_have_a_grid() -> None:
    cases = [a_case(n="1..64", heads="8,16", k="1..4")]
    units = [kernel("k1", n="1..64", heads="8", k="1..4"), kernel("k2", n="1..64", heads="16", k="1..4")]
    (grid,) = grids(cases, units)
    assert (grid["dimension"], heads(grid), grid["rows"][0]["shown"]) == ("heads", ["8", "16"], ["k1", "k2"])


def test_a_case_in_which_nothing_decides_is_there_once() -> None:
    (grid,) = grids([a_case(n="2..64", k="1..4")], [graph("g1", n="2..64", k="1..4")])
    assert (grid["dimension"], heads(grid)) == ("n", ["2..64"])


def test_where_two_dimensions_decide_a_cell_names_all() -> None:
    units = [graph("g1", n="1", k="1..2"), graph("g2", n="2..9", k="1"), graph("g3", n="2..9", k="2")]
    by_n, by_k = grids([a_case(n="1..9", k="1..2")], units)
    assert by_n["rows"][0]["cells"] == [["g1"], ["g2", "g3"]] and by_n["rows"][0]["shown"] == ["g1", "g2 g3"]
    assert by_k["rows"][0]["cells"] == [["g1", "g2"], ["g1", "g3"]]


def test_many_are_counted_and_the_sets_told_apart() -> None:
    low = [kernel(f"k{n}", n="1..8") for n in range(1, 11)]
    high = [kernel(f"k{n}", n="9..16") for n in range(11, 21)]
    (grid,) = grids([a_case(n="1..16")], [*low, *high])
    assert grid["rows"][0]["shown"] == ["a ×10", "b ×10"]
    assert grid["rows"][0]["cells"][0] == [f"k{n}" for n in range(1, 11)], "in the order of the units"


def test_a_declared_size_at_which_a_function_is_not_reached() -> None:
    (grid,) = grids([a_case(n="1..16")], [graph("g1", n="9..16"), kernel("k1", n="1..16")])
    assert heads(grid) == ["1..8", "9..16"]
    assert grid["rows"][0]["cells"] == [[], ["g1"]] and grid["rows"][0]["shown"] == ["–", "g1"]


def test_a_sampled_dimension_shows_what_was_visited() -> None:
    (grid,) = grids([a_case(n="1..100000", sampled=["n"])], [graph("g1", n="1"), graph("g2", n="2,16,100000")])
    assert heads(grid) == ["1", "2,16,100000"] and all(column["sampled"] for column in grid["columns"])
    assert "n, sampled" in drawn([grid])


def test_a_long_set_is_told_by_its_count() -> None:
    odd = ",".join(str(n * n) for n in range(4, 30))
    (grid,) = grids([a_case(n="1..1000")], [graph("g1", n=odd)])
    assert [column["short"] for column in grid["columns"]][1] == "26 of 16..841"


def test_without_dimensions() -> None:
    (grid,) = grids([a_case()], [graph("g1")])
    assert (grid["dimension"], heads(grid), grid["rows"][0]["cells"]) == ("", ["always"], [["g1"]])
    assert grids([a_case(n="1..4")], []) == []


def test_misses_get_columns_of_their_own() -> None:
    missed = [Missed(GRAPH, "m:layer", "decode", {"n": at}, count) for at, count in ((300, 4), (600, 5), (7, 1))]
    missed += [Missed(GRAPH, "m:other", "decode", {"n": 8}, 1), Missed(GRAPH, "m:layer", "gone", {"n": 9}, 1)]
    (grid,) = grids([a_case(n="2..256")], [graph("g1", n="2..256")], missed)
    assert heads(grid) == ["2..6,8..256", "7", "300,600"]
    assert grid["rows"][0]["missed"] == [0, 1, 9] and grid["rows"][0]["cells"] == [["g1"], ["g1"], None]
    assert "g1 ✗1" in drawn([grid]) and "· ✗9" in drawn([grid])


@pytest.mark.parametrize("text", ["1..99999999", "many", "1..2/0"])
def test_a_set_that_no_build_writes(text: str) -> None:
    with pytest.raises(DeclarationError):
        grids([a_case(n="1..4")], [graph("g1", n=text)])


def test_the_signs_that_occur_are_told() -> None:
    (grid,) = grids([a_case(n="1..4")], [graph("g1", n="1..4")])
    assert list(signs([grid])) == []
    many = [kernel(f"k{n}", n="2..4") for n in range(3)]
    (grid,) = grids([a_case(n="1..4")], many, [Missed(KERNEL, "m:scale", "decode", {"n": 9}, 2)])
    assert [text.split()[0] for text in signs([grid])] == ["a", "·:", "–:", "✗12:"]
    grid["rows"][0]["found"] = [0, 3, 0]
    assert list(signs([grid]))[-1].startswith("g1 3×: ")


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_neighbours_that_are_served_alike_are_one_cell() -> None:
    cases = [a_case("a", n="1..512"), a_case("b", n="1..256")]
    units = [graph("g1", case="a", n="1"), graph("g2", case="a", n="2..512"), graph("g3", "m:b", "b", n="1..256")]
    lines = drawn(grids(cases, units)).splitlines()
    assert lines[1].split() == "case function or kernel 1 │ 2..256 │ 257..512".split()
    assert lines[3:] == ["a     m:layer             g1 │ g2", "b     m:b                 g3          │ ·"]


def test_a_grid_that_is_too_wide_is_written_out() -> None:
    units = [graph(f"g{n}", n=str(n)) for n in range(1, 41)] + [kernel("k1", n="1..40")]
    found = grids([a_case(n="1..40")], units)
    lines = drawn(found).splitlines()
    assert all(len(line) <= 120 for line in lines) and len(lines) == 43
    assert "    g7       7" in lines and lines[-1] == "  decode  m:scale  k1 at all"
    assert len(drawn(found, 1000).splitlines()) == 5, "where there is room it is drawn"


def test_a_name_that_is_too_long_keeps_its_end() -> None:
    units = [graph("g1", "a.very.long.package.of.modules:the_function_itself", n="1")]
    assert " the_function_itself " in drawn(grids([a_case(n="1")], units))
    units = [graph("g1", "m:" + "x" * 80 + "_end", n="1")]
    assert "…" in drawn(grids([a_case(n="1")], units)) and "_end  g1" in drawn(grids([a_case(n="1")], units))
