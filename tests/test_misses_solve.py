"""aot_cache.misses and their facts: what a missed call would have needed, and the file of misses. No torch."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aot_cache.artifact.plan import CallPlan, CasePlan, Plan, Tuning, Unit, extended
from aot_cache.cli.facts.misses import misses
from aot_cache.errors import DeclarationError, UnknownName
from aot_cache.misses import file as miss_file
from aot_cache.misses import size_relations as follows
from aot_cache.misses.file import identity, read
from aot_cache.misses.size_relations import AffineSize, Relations
from aot_cache.misses.solve import Solved, points_for
from aot_cache.recipes import dimensions
from aot_cache.recipes.declare import Call, Case, Recipe
from aot_cache.recipes.dimensions import Point, Range, Values

# --- relations: fitted, and solved ------------------------------------------------------------------------------------

DIMS = {"batch": Range(1, 5), "tokens": Range(1, 4), "heads": Values(16, 32)}
POINTS = dimensions.enumerate_points(DIMS).points
OUTSIDE = st.fixed_dictionaries({name: st.integers(1, 10_000) for name in DIMS})


def size_at(relation: AffineSize, point: Point) -> int:
    assert relation is not None
    plus, *more = relation
    return int(plus + (more[0] * math.prod(point[name] for name in more[1:]) if more else 0))


names = st.sampled_from(list(DIMS))
relations = st.one_of(
    st.integers(0, 4096).map(lambda size: [size]),
    st.tuples(st.integers(0, 99), st.integers(1, 64), names).map(list),
    st.tuples(st.integers(0, 99), st.integers(1, 64), names, names).filter(lambda r: r[2] < r[3]).map(list),
)


@given(relations)
def test_a_relation_is_found_from_its_sizes(relation: list[Any]) -> None:
    fitted = follows.fit([size_at(relation, point) for point in POINTS], POINTS)
    assert fitted is not None and sorted(map(str, fitted)) == sorted(map(str, relation))


@given(st.lists(st.integers(0, 9), min_size=len(POINTS), max_size=len(POINTS)))
def test_what_is_fitted_fits_everywhere(sizes: list[int]) -> None:
    fitted = follows.fit(sizes, POINTS)
    assert fitted is None or [size_at(fitted, point) for point in POINTS] == sizes


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(relations, min_size=1, max_size=3), min_size=1), OUTSIDE)
def test_a_point_is_found_from_the_sizes_of_its_call(kind: Mapping[str, list[list[Any]]], point: Point) -> None:
    sizes = {path: [size_at(r, point) for r in found] for path, found in kind.items()}
    solved = follows.solve(kind, sizes, POINTS[0], set(DIMS))
    if isinstance(solved, str):  # products of which no factor is told: one factor of each stays as it was seen
        products = {tuple(relation[2:]) for found in kind.values() for relation in found if len(relation) > 3}
        assert len(products) > 1
        return
    assert list(solved) == list(DIMS)
    assert {path: [size_at(r, solved) for r in found] for path, found in kind.items()} == sizes
    for relation in (r for found in kind.values() for r in found):
        if len(relation) == 3:  # one dimension alone: nothing is left open
            assert solved[relation[2]] == point[relation[2]]
    told = {name for found in kind.values() for relation in found for name in relation[2:]}
    assert all(solved[name] == POINTS[0][name] for name in DIMS if name not in told)


@given(relations.filter(lambda r: len(r) > 1), st.integers(-99, 99).filter(bool), OUTSIDE)
def test_two_sizes_that_do_not_agree_have_no_point(relation: list[Any], wrong: int, point: Point) -> None:
    size = size_at(relation, point)
    assert isinstance(
        follows.solve({"x": [relation, relation]}, {"x": [size, size + wrong]}, POINTS[0], set(DIMS)), str
    )


X = "L['x']"


def test_products_that_share_a_dimension_agree_on_it() -> None:
    kind: Relations = {X: [[0, 1, "batch", "tokens"], [0, 1, "batch", "heads"]]}
    assert follows.solve(kind, {X: [14, 5]}, POINTS[0], set(DIMS)) == {"batch": 1, "tokens": 14, "heads": 5}


UNSOLVED: dict[str, tuple[Relations, dict[str, list[int]], str]] = {
    "constant": ({X: [[16], [0, 1, "batch"]]}, {X: [17, 3]}, "size 0 of x is 17, and always 16 in what was declared"),
    "remainder": ({X: [[1, 2, "batch"]]}, {X: [8]}, "x is 8, and no whole number makes it 2 · batch + 1"),
    "negative": ({X: [[9, 2, "batch"]]}, {X: [1]}, "x is 1, and no whole number makes it 2 · batch + 9"),
    "two say otherwise": (
        {X: [[0, 1, "batch"]], "L['y'].table": [[5], [0, 2, "batch"]]},
        {X: [7], "L['y'].table": [5, 12]},
        "size 1 of y.table is 12, and not 2 · batch with batch=7",
    ),
    "unknown": ({X: [None, [16]]}, {X: [7, 16]}, "size 0 of x does not follow from batch or tokens alone"),
    "other tensors": ({X: [[16]]}, {"L['y']": [16]}, "it is called with other tensors or integers"),
    "another rank": ({X: [[16]]}, {X: [16, 1]}, "it is called with other tensors or integers"),
}


@pytest.mark.parametrize("what", UNSOLVED)
def test_why_there_is_no_point(what: str) -> None:
    kind, sizes, why = UNSOLVED[what]
    solved = follows.solve(kind, sizes, POINTS[0], {"batch", "tokens"})
    assert isinstance(solved, str) and why in solved


def test_a_size_that_is_not_understood_does_no_harm_where_others_tell_everything() -> None:
    kind: Relations = {X: [None, [0, 1, "batch"]]}
    assert follows.solve(kind, {X: [3, 40]}, POINTS[0], {"batch"}) == {"batch": 40, "tokens": 1, "heads": 16}


# --- which declaration would have covered it --------------------------------------------------------------------------

CASES = [
    CasePlan(
        name="decode",
        dims={"batch": "1..512", "heads": "16,32"},
        points=1024,
        total=1024,
        sampled=[],
        missed=[{"batch": 700, "heads": 16}],
    ),
    CasePlan(name="prefill", dims={"tokens": "16..4096/16"}, points=200, total=256, sampled=["tokens"]),
]


def call(function: str, structure: str, **follows: Any) -> CallPlan:
    reached = {
        "decode": [{"batch": "2..512", "heads": "16,32"}, {"batch": "1", "heads": "32"}],
        "prefill": [{"tokens": "16..4096/16 except 48"}],
    }
    mine = {case: reached[case] for case in follows}
    return CallPlan(
        function=function,
        line=1,
        id=structure,
        mode="inference",
        wrapping={},
        dynamic={},
        hint={},
        reached=mine,
        structure=structure,
        follows=follows,
    )


CALLS = [
    call("m:f", "one", decode=[{X: [[0, 1, "batch"], [0, 128, "heads"]]}]),
    call("m:norm", "two", decode=[{X: [[0, 1, "batch"]]}], prefill=[{X: [[0, 1, "tokens"]]}]),
]


def solved(name: str, structure: str, *sizes: int) -> Solved:
    return points_for(CALLS, CASES, name, structure, {X: list(sizes)})


@pytest.mark.parametrize(
    ("sizes", "point", "declare"),
    [
        ([600, 2048], {"batch": 600, "heads": 16}, "decode: batch=Range(1, 600)"),
        ([4, 8192], {"batch": 4, "heads": 64}, "decode: heads=Values(16, 32, 64)"),
        ([0, 8192], {"batch": 0, "heads": 64}, "decode: batch=Range(0, 512), heads=Values(16, 32, 64)"),
    ],
)
def test_the_declaration_is_as_people_write_it(sizes: list[int], point: Point, declare: str) -> None:
    assert solved("m:f", "one", *sizes) == Solved({"decode": point}, declare, "")


def test_of_two_cases_the_nearer_one_is_widened() -> None:
    assert solved("m:norm", "two", 600) == solved("m:norm", "two", 592)._replace(
        points={"prefill": {"tokens": 600}}, declare="prefill: tokens=Range(16, 4096, 8)"
    )
    assert solved("m:norm", "two", 4097).declare == "prefill: tokens=Range(16, 4097)"


def test_a_dimension_that_no_size_tells_stays_where_the_call_was_seen() -> None:
    assert solved("m:norm", "two", 5).points == {"decode": {"batch": 5, "heads": 32}}


def test_a_point_that_was_sampled_out_is_said() -> None:
    found = solved("m:norm", "two", 4096)
    assert found.points == {"prefill": {"tokens": 4096}} and "tokens=4096, declared and not visited" in found.declare


@pytest.mark.parametrize("batch", [512, 700])
def test_what_is_covered_already_needs_no_declaration(batch: int) -> None:
    found = solved("m:f", "one", batch, 2048)
    assert found.points == {"decode": {"batch": batch, "heads": 16}} and not found.declare
    assert found.why == f"case decode has it at batch={batch}, heads=16 already"


@pytest.mark.parametrize(
    ("name", "structure", "sizes", "why"),
    [
        ("m:other", "one", [1, 1], "no declared case calls m:other"),
        ("m:f", "two", [1, 1], "the call has another call signature: mode, dtype, device"),
        ("m:f", "one", [1, 100], "size 1 of x is 100, and no whole number makes it 128 · heads (decode)"),
    ],
)
def test_what_no_declaration_covers(name: str, structure: str, sizes: list[int], why: str) -> None:
    found = solved(name, structure, *sizes)
    assert not found.points and not found.declare and why in found.why


# --- points beside the declared ones ----------------------------------------------------------------------------------


def recipe() -> Recipe:
    return Recipe("r", [Case("one", lambda n: Call(print), {"n": Range(1, 3)}), Case("two", lambda: Call(print), {})])


def test_points_beside_the_declared_ones_are_counted() -> None:
    (case, _) = recipe().widened({"one": [{"n": 12}, {"n": 2}]}).widened({"one": [{"n": 7}, {"n": 12}]}).cases
    points = case.points()
    assert [point["n"] for point in points.points] == [1, 2, 3, 7, 12] and points.added == 2
    plan = CasePlan.of(case, points)
    assert (plan.points, plan.total, plan.missed, plan.dims) == (5, 5, [{"n": 7}, {"n": 12}], {"n": "1..3"})


def test_a_point_that_was_sampled_out_is_visited_and_counted_once() -> None:
    case = Case("long", lambda n: Call(print), {"n": Range(1, 1 << 20)})
    sampled = case.points()
    absent = next(n for n in range(1, 1 << 20) if {"n": n} not in sampled.points)
    (wider,) = Recipe("r", [case]).widened({"long": [{"n": absent}]}).cases
    assert wider.points().points[-1] == {"n": absent} and wider.points().total == sampled.total == 1 << 20


def test_a_point_can_be_taken_back() -> None:
    (case, _) = (
        recipe().widened({"one": [{"n": 12}, {"n": 13}]}).without([("one", {"n": 12}), ("two", {"n": 13})]).cases
    )
    assert [point["n"] for point in case.points().points] == [1, 2, 3, 13]


def test_points_that_a_recipe_cannot_have() -> None:
    with pytest.raises(UnknownName, match="no case 'three'"):
        recipe().widened({"three": [{"n": 1}]})
    for point in ({"m": 1}, {}, {"n": -1}, {"n": True}):
        with pytest.raises(DeclarationError):
            recipe().widened({"one": [point]})


# --- the file ---------------------------------------------------------------------------------------------------------

UNIT = {
    "kernel": "m:k",
    "source": "ab",
    "specialization": [{"t": ["*fp32", "D"]}, {"t": ["constexpr", 16]}],
    "options": {"num_warps": 4},
    "overrides": {},
}
OWN: dict[str, dict[str, Any]] = {
    "graph": {
        "place": "m.py:3",
        "wrapping": {"backend": "inductor"},
        "mode": "inference",
        "structure": "0123456789abcdef",
        "sizes": {X: [600, 16]},
        "points": {"decode": {"batch": 600}},
        "declare": "decode: batch=Range(1, 600)",
    },
    "kernel": {"unit": UNIT, "nearest": ["#1 is 16, and 32 is there"]},
    "tuning": {
        "tuning": {"kernel": "m:k", "tuner": 0, "key": [7, "torch.float32"], "candidates": [{"B": 16}, {"B": 32}]},
        "units": [{**UNIT, "via": [[0, 1]]}],
    },
    "load": {},
}


def line(kind: str = "graph", **more: Any) -> dict[str, Any]:
    common = {"aot-cache miss": 1, "kind": kind, "name": "m:k", "in_capture": False, "sealed": True, "action": "eager"}
    return {**common, "why": "no graph of it", "pid": 1, "seen": 1, **OWN[kind], **more}


def written(path: Path, *lines: Any, end: str = "") -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in lines) + end)
    return path


def test_lines_of_several_processes_are_one_miss(tmp_path: Path) -> None:
    other = {"pid": 2, "in_capture": True}
    lines = [line(pid=1), line(**other), line(pid=1, seen=2), line(pid=1, seen=4), line(**other, seen=2)]
    found = read([written(tmp_path / "m", *lines, line(sizes={X: [601, 16]}))]).found
    assert [miss.count for miss in found] == [6, 1]
    assert found[0].in_capture and found[0].sealed and not found[1].in_capture


def test_a_process_counts_apart_what_it_answered_otherwise(tmp_path: Path) -> None:
    eager, compiled = {"action": "eager", "in_capture": True}, {"action": "compiled", "why": "another"}
    lines = [line(**what, seen=seen) for seen in (1, 2, 4) for what in (eager, compiled)]
    (miss,) = read([written(tmp_path / "m", *lines)]).found
    assert (miss.count, miss.actions) == (8, ["eager", "compiled"])


def test_a_choice_of_inductor_s_says_no_more_than_its_name(tmp_path: Path) -> None:
    bare = {name: value for name, value in line("tuning").items() if name not in OWN["tuning"]}
    (miss,) = read([written(tmp_path / "m", bare)]).found
    assert (miss.units(), miss.tuning(), miss.facts) == ([], None, {})
    assert misses(read([tmp_path / "m"]), [])["misses"][0]["asked"] == "a choice between Inductor's configs"


def test_a_process_of_the_same_number_is_another_one(tmp_path: Path) -> None:
    """In containers every server is process 1, and a file outlives it."""
    one = written(tmp_path / "one", line(seen=1), line(seen=2), line(seen=4), line(seen=1), line(seen=2))
    two = written(tmp_path / "two", line(seen=1))
    assert [miss.count for miss in read([one, two]).found] == [7]


def test_who_asked_and_what_was_done_make_no_other_miss() -> None:
    other = {"pid": 9, "seen": 8, "in_capture": True, "sealed": False, "why": "!", "action": "refused"}
    for kind in OWN:
        assert identity(line(kind)) == identity(line(kind, **other)) != identity(line(kind, name="m:other"))
    assert len({identity(line(kind)) for kind in OWN}) == len(OWN)


def test_the_order_of_options_makes_another_kernel() -> None:
    one, other = ({**UNIT, "options": dict(o)} for o in ([("a", 1), ("b", 2)], [("b", 2), ("a", 1)]))
    assert identity(line("kernel", unit=one)) != identity(line("kernel", unit=other))


def test_the_order_of_the_lines_does_not_matter(tmp_path: Path) -> None:
    lines = [line(kind) for kind in OWN]
    there, back = written(tmp_path / "a", *lines), written(tmp_path / "b", *lines[::-1])
    assert read([there]) == read([back])


@pytest.mark.parametrize("cut", [1, 5, 40, 300])
def test_a_line_that_was_cut_off_is_counted(tmp_path: Path, cut: int) -> None:
    half = json.dumps(line(name="cut"))[:cut]
    for end in (half, f"{half}{json.dumps(line())}\n{json.dumps(line())}"):
        found = read([written(tmp_path / "m", line("kernel"), end=end)])
        assert found.cut_off == 1 and "cut" not in {miss.name for miss in found.found}


def test_a_file_with_nothing_in_it(tmp_path: Path) -> None:
    assert read([written(tmp_path / "m")]) == read([]) == miss_file.Misses([], 0)


HOSTILE: dict[str, Any] = {
    "text": "hello",
    "another kind": {"hello": 1},
    "a list": [],
    "schema": line(**{"aot-cache miss": 2}),
    "kind": line(kind="graph") | {"kind": "soup"},
    "kind of a kind": line() | {"kind": []},
    "seen": line(seen=True),
    "seen nothing": line(seen=0),
    "seen for ever": line(seen=1 << 70),
    "name": line(name=None),
    "sizes": line(sizes={X: [1.5]}),
    "sizes of a text": line(sizes={X: "12"}),
    "points": line(points={"decode": {"batch": "1"}}),
    "points below nothing": line(points={"decode": {"batch": -1}}),
    "points without dimensions": line(points={"decode": 5}),
    "structure": line(structure=5),
    "unit": line("kernel", unit={**UNIT, "options": []}),
    "no unit": line("kernel", unit=5),
    "nearest": line("kernel", nearest=[5]),
    "tuning": line("tuning", tuning={}),
    "candidates": line("tuning", tuning={**OWN["tuning"]["tuning"], "candidates": [5]}),
    "no candidate": line("tuning", units=[{**UNIT, "via": [[0, 2]]}]),
    "another tuning": line("tuning", units=[{**UNIT, "via": [[1, 0]]}]),
    "via": line("tuning", units=[{**UNIT, "via": ["ab"]}]),
    "missing": {name: value for name, value in line().items() if name != "mode"},
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_line_of_another_shape_is_one_clear_error(tmp_path: Path, what: str) -> None:
    path = written(tmp_path / "m", line(), HOSTILE[what])
    with pytest.raises(DeclarationError) as caught:
        read([path])
    assert f"{path}, line 2" in str(caught.value) and "\n" not in str(caught.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=5,
)


@given(st.data())
def test_no_line_is_a_traceback(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    made = line(data.draw(st.sampled_from(list(OWN))))
    inside = data.draw(
        st.sampled_from([made, *(value for value in made.values() if isinstance(value, dict) and value)])
    )
    name = data.draw(st.sampled_from(list(inside)))
    kept, inside[name] = inside[name], data.draw(json_values)
    path = tmp_path_factory.getbasetemp() / "any line"
    written(path, made)
    inside[name] = kept
    with contextlib.suppress(DeclarationError):
        found = read([path])
        for miss in found.found:
            assert isinstance(miss.units(), list) and (miss.tuning() is None) == ("tuning" not in miss.facts)
        assert len(misses(found, [path])["misses"]) == 1


@pytest.mark.parametrize(
    "content", [b"\x00\x01\xff", b"[" * 100_000, b"kernel,count\n"], ids=["bytes", "deep", "table"]
)
def test_a_file_of_another_kind(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(DeclarationError, match="is not a miss: "):
        read([tmp_path / "m"])


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="No such file"):
        read([tmp_path / "m"])


# --- what is said of them ---------------------------------------------------------------------------------------------


def test_the_most_frequent_miss_comes_first(tmp_path: Path) -> None:
    path = written(
        tmp_path / "m", *map(line, OWN), line("tuning", seen=5), line("load", seen=2, in_capture=True)
    )  # seen apart
    facts = misses(read([path]), [path])
    assert [(row["kind"], row["count"]) for row in facts["misses"]][:2] == [("tuning", 5), ("load", 3)]
    assert (facts["different"], facts["count"], facts["in_capture"], facts["declarable"]) == (4, 10, 1, 1)
    asked = {row["kind"]: row["asked"] for row in facts["misses"]}
    assert asked["graph"] == "x 600×16, inference" and asked["kernel"] == "#0:*fp32:16 #1=16 num_warps=4"
    assert asked["tuning"] == "(7, 'torch.float32'), 2 configs"


# --- missed kernels in a plan -----------------------------------------------------------------------------------------


def test_what_was_missed_is_added_to_a_plan_once() -> None:
    def unit(block: int, *via: list[int], **more: Any) -> Unit:
        return Unit(
            kernel="m:k", source="ab", specialization=[{"t": ["constexpr", block]}], options={}, via=list(via), **more
        )

    def tuning(key: int) -> Tuning:
        return Tuning(kernel="m:k", tuner=0, key=[key], candidates=[{"B": 16}, {"B": 32}])

    reached = {"decode": [{"batch": "1"}]}
    traced = Plan(
        recipe="r",
        target="h200",
        units=[unit(16, [0, 0], reached=reached)],
        tunings=[tuning(1)],
        cases=CASES,
        calls=CALLS,
    )
    part = Plan(
        recipe="r", target="h200", units=[unit(16, [0, 0]), unit(32, [0, 1])], tunings=[tuning(2)], closures={"m:k": {}}
    )
    found = extended(traced, [part, copy.deepcopy(part), Plan(recipe="r", target="h200", units=[unit(64)])])
    assert [(u.specialization[0]["t"][1], u.via) for u in found.units] == [
        (16, [[0, 0], [1, 0]]),
        (32, [[1, 1]]),
        (64, []),
    ]
    assert [t.key for t in found.tunings] == [[1], [2]] and found.units[0].reached == reached
    assert (found.cases, found.calls, found.closures) == (CASES, CALLS, {"m:k": {}})
    assert traced.units[0].via == [[0, 0]], "the plan that was given stays as it was"
