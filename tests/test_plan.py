"""aot_cache.artifact.plan: plans as files, their differences, and one plan of many recordings. No torch."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aot_cache.artifact.key import function_of
from aot_cache.artifact.plan import CallPlan, CasePlan, Plan, Tuning, Unit, diff, merge
from aot_cache.artifact.plan_of_ranks import apart, of_processes, of_ranks, ranks_of_kernel
from aot_cache.errors import DeclarationError, StoreUnwritable
from aot_cache.recipes.declare import Call, Case
from aot_cache.recipes.dimensions import Range, Values, enumerate_points

# --- plans of any content ---------------------------------------------------------------------------------------------

text = st.text(max_size=6)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | text
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=2), max_leaves=5
)
mappings = st.dictionaries(text, scalars, max_size=3)
kernels = st.sampled_from(["a.b:kernel", "a.b:other", "c:make.<locals>.kernel"])
boxes = st.fixed_dictionaries({"n": st.sampled_from(["1", "2..4", "1..8 except 3"])})
reached = st.dictionaries(text, st.lists(boxes, min_size=1, max_size=2), max_size=2)
specializations = st.lists(
    st.fixed_dictionaries({"t": st.tuples(st.sampled_from(["i32", "*bf16", "constexpr"]), scalars).map(list)}),
    max_size=3,
)
tunings = st.builds(
    Tuning,
    kernel=kernels,
    tuner=st.integers(0, 1),
    key=st.lists(scalars, max_size=2),
    candidates=st.lists(mappings, min_size=1, max_size=3),
    choice=st.none() | mappings,
    measured=mappings,
    reached=reached,
)

calls = st.builds(
    CallPlan,
    function=st.sampled_from(["a.b:f", "a.b:Layer.forward"]),
    line=st.integers(1, 999),
    id=st.text("0123456789abcdef", min_size=16, max_size=16),
    mode=st.sampled_from(["inference", "no_grad", "grad bfloat16"]),
    wrapping=st.fixed_dictionaries(
        {"backend": st.just("inductor"), "options": mappings, "dynamic": st.none() | st.booleans()}
    ),
    dynamic=st.dictionaries(
        st.sampled_from(["L['x']", "L['self'].weight", "L['state'][0]"]),
        st.lists(
            st.tuples(st.integers(-1, 3), st.integers(2, 9), st.integers(9, 99)).map(list), min_size=1, max_size=2
        ),
        max_size=2,
    ),
    hint=st.dictionaries(text, st.dictionaries(text, st.integers(), max_size=2), max_size=2),
    reached=reached,
)


types = st.sampled_from(["*bf16", "i32", "constexpr"])
signatures = st.recursive(
    st.lists(types, max_size=3).map(tuple), lambda inner: st.lists(types | inner, max_size=3).map(tuple)
)


@st.composite
def plans(draw: st.DrawFn, target: str | None = None) -> Plan:
    """A plan as the builder makes one: units and tunings once each, `via` within bounds."""
    found = {t.id: t for t in draw(st.lists(tunings, max_size=3))}
    pairs = [[-1, -1]] + [[n, c] for n, t in enumerate(found.values()) for c in range(len(t.candidates))]
    units = st.builds(
        Unit,
        kernel=kernels,
        source=st.sampled_from(["aa" * 32, "bb" * 32]),
        specialization=specializations,
        options=mappings,
        overrides=mappings,
        via=st.lists(st.sampled_from(pairs), max_size=3, unique_by=tuple).map(sorted),
        reached=reached,
    )
    cases = st.builds(
        CasePlan,
        name=text,
        dims=st.dictionaries(text, text, max_size=2),
        points=st.integers(0, 99),
        total=st.integers(0, 99),
        sampled=st.lists(text),
    )
    return Plan(
        recipe=draw(text),
        target=draw(st.sampled_from(["h200", "a100"])) if target is None else target,
        origin=draw(st.sampled_from(["traced", "recorded"])),
        triton="3.7.1",
        cases=draw(st.lists(cases, max_size=2)),
        units=list({u.id: u for u in draw(st.lists(units, max_size=4))}.values()),
        tunings=list(found.values()),
        closures=draw(st.dictionaries(kernels, json_values, max_size=2)),
        launchers=tuple(draw(st.lists(signatures, max_size=2))),
        calls=draw(st.lists(calls, max_size=3)),
        ranks=draw(st.integers(1, 8)),
    )


def order_of(plan: Plan) -> list[list[str]]:
    return [list(unit.options) for unit in plan.units]


# --- files ------------------------------------------------------------------------------------------------------------


@given(plan=plans())
def test_a_plan_comes_back_from_its_file(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("plan") / "a.plan.json"
    plan.write(path)
    back = Plan.read(path)
    assert back == plan
    assert order_of(back) == order_of(plan), "the order of options is part of Triton's key"
    first = path.read_bytes()
    back.write(path)
    assert path.read_bytes() == first


@given(plan=plans())
def test_a_plan_is_json_with_a_unit_a_line(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("plan") / "a.plan.json"
    plan.write(path)
    content = path.read_text()
    assert json.loads(content) == plan.to_json()
    lines = content.split("\n")
    for unit in plan.units:
        assert any(line.strip().rstrip(",").startswith('{"kernel"') and unit.source in line for line in lines)
    for call in plan.calls:
        assert any(line.strip().startswith('{"function"') and call.id in line for line in lines)
    assert content.endswith("}\n")


GOOD = Plan(recipe="r", target="h200", units=[Unit(kernel="a:k", source="aa", specialization=[], options={})]).to_json()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "not JSON"),
        ("[1]", "expected a JSON object in plan"),
        ("{", "not JSON"),
        ("{}", "found none"),
        (json.dumps({**GOOD, "aot-cache plan": 99}), "schema 99"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "units"}), "'units'"),
        (json.dumps({**GOOD, "units": [{"kernel": "a:k"}]}), "TypeError"),
        (json.dumps({**GOOD, "units": [{**GOOD["units"][0], "new": 1}]}), "TypeError"),
        (json.dumps({**GOOD, "units": 3}), "TypeError"),
        (json.dumps({**GOOD, "closures": 3}), "TypeError"),
        (json.dumps({**GOOD, "cases": ["x"]}), "TypeError"),
        (json.dumps({**GOOD, "calls": 3}), "TypeError"),
        (json.dumps({**GOOD, "calls": [{"function": "a:f"}]}), "TypeError"),
    ],
)
def test_a_file_that_is_no_plan(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "plan.json").write_text(content)
    with pytest.raises(DeclarationError) as caught:
        Plan.read(tmp_path / "plan.json")
    assert words in str(caught.value)


def test_a_plan_of_a_version_that_knew_no_calls() -> None:
    assert Plan.from_json({name: value for name, value in GOOD.items() if name != "calls"}).calls == []


def test_a_call_says_what_a_person_asks_of_it() -> None:
    call = CallPlan(
        function="a:f",
        line=3,
        id="0" * 16,
        mode="inference",
        wrapping={"backend": "inductor"},
        dynamic={"L['x']": [[0, 2, 9]]},
    )
    assert (call.hint, call.reached) == ({}, {})
    assert Plan.from_json(json.loads(json.dumps(Plan(recipe="r", target="cpu", calls=[call]).to_json()))).calls == [
        call
    ]


def test_a_case_in_a_plan_is_what_was_enumerated_of_it() -> None:
    dims = {"n": Range(1, 9, 4), "heads": Values(2, 4)}
    case = Case("decode", lambda n, heads: Call(print), dims, "no_grad", "bfloat16", {"n": 4})
    found = enumerate_points(dims)
    made = CasePlan.of(case, found)
    assert made == CasePlan(
        name="decode",
        dims={name: dim.text for name, dim in dims.items()},
        points=len(found.points),
        total=found.total,
        sampled=list(found.sampled),
        mode="no_grad",
        autocast="bfloat16",
    )
    assert list(made.dims) == ["n", "heads"], "in the declared order"
    large = enumerate_points({"n": Range(1, 100)}, 10)
    assert CasePlan.of(Case("c", lambda n: Call(print), {"n": Range(1, 100)}), large).sampled == ["n"]


@pytest.mark.parametrize("data", [b"\xff\xfe", b"\x00" * 20, b"[" * 100_000])
def test_a_file_of_other_bytes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(data)
    with pytest.raises(DeclarationError):
        Plan.read(tmp_path / "plan.json")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="No such file"):
        Plan.read(tmp_path / "none.json")
    with pytest.raises(DeclarationError, match="directory"):
        Plan.read(tmp_path)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnwritable):
        Plan(recipe="r", target="h200").write(tmp_path / "file" / "plan.json")


# --- identity ---------------------------------------------------------------------------------------------------------

UNIT = Unit(kernel="a:k", source="aa", specialization=[{"t": ["i32", "D"]}], options={"num_warps": 4, "debug": False})


def test_a_unit_s_id_is_what_is_compiled() -> None:
    same = replace(UNIT, via=[[0, 1]], reached={"case": [{"n": "1..4"}]})
    assert same.id == UNIT.id
    others = [
        replace(UNIT, kernel="a:l"),
        replace(UNIT, source="ab"),
        replace(UNIT, specialization=[{"t": ["i32", ""]}]),
        replace(UNIT, options={"debug": False, "num_warps": 4}),  # another key of Triton's
        replace(UNIT, options={"num_warps": 8, "debug": False}),
        replace(UNIT, overrides={"num_warps": 8}),
    ]
    assert len({UNIT.id, *(unit.id for unit in others)}) == len(others) + 1


@pytest.mark.parametrize(
    ("via", "expected"),
    [([], True), ([[-1, -1]], True), ([[0, 0]], False), ([[-1, -1], [0, 0]], True), ([[0, 0], [1, 2]], False)],
)
def test_who_launches_a_unit(via: list[list[int]], expected: bool) -> None:
    assert replace(UNIT, via=via).launched_without_tuner() is expected


def test_what_was_sampled() -> None:
    cases = [
        CasePlan(name="a", dims={"n": "1..9"}, points=4, total=9, sampled=["n"]),
        CasePlan(name="b", dims={"n": "1..9"}, points=9, total=9, sampled=[]),
    ]
    assert Plan(recipe="r", target="h200", cases=cases).sampled == ["a.n"]


# --- differences ------------------------------------------------------------------------------------------------------


@given(plan=plans())
def test_a_plan_does_not_differ_from_itself(plan: Plan) -> None:
    assert diff(plan, Plan.from_json(json.loads(json.dumps(plan.to_json())))).same


@given(left=plans(), right=plans())
def test_a_difference_is_what_one_has_and_the_other_lacks(left: Plan, right: Plan) -> None:
    found, back = diff(left, right), diff(right, left)
    ids_left, ids_right = {u.id for u in left.units}, {u.id for u in right.units}
    assert {u.id for u in found.only_left} == ids_left - ids_right
    assert {u.id for u in found.only_right} == ids_right - ids_left
    assert (back.only_left, back.only_right) == (found.only_right, found.only_left)
    assert (back.tunings_left, back.tunings_right) == (found.tunings_right, found.tunings_left)
    assert found.same == (ids_left == ids_right and not found.tunings_left and not found.tunings_right)


def test_points_and_choices_make_no_difference() -> None:
    tuning = Tuning(kernel="a:k", tuner=0, key=[64], candidates=[{"B": 1}, {"B": 2}])
    left = Plan(recipe="r", target="h200", units=[UNIT], tunings=[tuning])
    right = Plan(
        recipe="s", target="a100", units=[replace(UNIT, reached={"x": []})], tunings=[replace(tuning, choice={"B": 2})]
    )
    assert diff(left, right).same
    assert not diff(left, replace(right, tunings=[replace(tuning, candidates=[{"B": 1}])])).same


# --- merging ----------------------------------------------------------------------------------------------------------


def launches(plan: Plan) -> set[tuple[str, str]]:
    """(unit, through which candidate of which tuning), free of numbers and of how kernels of one name are told apart."""

    def through(tuning: Tuning, candidate: int) -> str:
        identity = [function_of(tuning.kernel), tuning.tuner, tuning.key, tuning.candidates]
        return json.dumps([*identity, tuning.candidates[candidate]])

    return {(unit.id, "" if t < 0 else through(plan.tunings[t], c)) for unit in plan.units for t, c in unit.via}


def test_merging_tells_kernels_of_one_name_apart() -> None:
    """Two processes that each saw one of a factory's kernels."""

    def part(source: str) -> Plan:
        units = [Unit(kernel="m:f.<locals>.k", source=source * 32, specialization=[], options={}, via=[[0, 0]])]
        return Plan(
            recipe="r",
            target="h200",
            units=units,
            tunings=[Tuning(kernel="m:f.<locals>.k", tuner=0, key=[], candidates=[{}])],
            closures={"m:f.<locals>.k": source},
        )

    merged = merge([part("a"), part("b"), part("a")])
    names = [f"m:f.<locals>.k@{source * 12}" for source in "ab"]
    assert [unit.kernel for unit in merged.units] == names == [tuning.kernel for tuning in merged.tunings]
    assert merged.closures == dict(zip(names, "ab")) and [unit.via for unit in merged.units] == [[[0, 0]], [[1, 0]]]
    assert not diff(merged, part("b")).only_right and not diff(merged, part("b")).tunings_right
    assert merge([part("a"), part("a")]).units == merge([part("a")]).units == part("a").units


@given(parts=st.lists(plans(target="h200"), min_size=1, max_size=3))
def test_merging_keeps_everything_once(parts: list[Plan]) -> None:
    expected = set().union(*(launches(plan) for plan in parts))
    ids = {unit.id for plan in parts for unit in plan.units}
    merged = merge(copy.deepcopy(parts))
    assert launches(merged) == expected
    assert [u.id for u in merged.units] == list(dict.fromkeys(u.id for plan in parts for u in plan.units))
    assert {u.id for u in merged.units} == ids
    assert not diff(merged, parts[0]).only_right
    for part in parts:
        assert not diff(merged, part).only_right and not diff(merged, part).tunings_right
    assert merged.target == "h200"


@given(parts=st.lists(plans(target="h200"), min_size=1, max_size=3))
def test_merging_leaves_its_parts_alone(parts: list[Plan]) -> None:
    before = copy.deepcopy(parts)
    merge(parts)
    assert parts == before


@given(plan=plans(target="h200"))
def test_merging_with_itself_changes_nothing(plan: Plan) -> None:
    one, two = copy.deepcopy(plan), copy.deepcopy(plan)
    merged = merge([one, two])
    assert diff(merged, plan).same and launches(merged) == launches(plan)


def test_a_choice_that_any_process_recorded_is_kept() -> None:
    tuning = Tuning(kernel="a:k", tuner=0, key=[64], candidates=[{"B": 1}, {"B": 2}])
    without, with_choice = (
        Plan(recipe="r", target="h200", tunings=[t]) for t in (tuning, replace(tuning, choice={"B": 2}))
    )
    for order in ([without, with_choice], [with_choice, without]):
        (merged,) = merge(copy.deepcopy(order)).tunings
        assert merged.choice == {"B": 2}


def test_recordings_of_two_gpus_are_refused() -> None:
    with pytest.raises(DeclarationError, match="a100, h200"):
        merge([Plan(recipe="r", target="h200"), Plan(recipe="r", target="a100")])


def test_no_recording_is_refused() -> None:
    with pytest.raises(DeclarationError, match="did the program launch"):
        merge([])


def test_merging_reads_an_iterator() -> None:
    merged: Any = merge(iter([Plan(recipe="r", target="h200", units=[UNIT])]))
    assert len(merged.units) == 1


# --- the ranks of a job -----------------------------------------------------------------------------------------------


def of_rank(*units: Unit, **more: Any) -> Plan:
    cases = [CasePlan(name="c", dims={"n": "1..4"}, points=4, total=4, sampled=[])]
    return replace(Plan(recipe="r", target="h200", cases=cases, units=list(units), closures={"a:k": {}}), **more)


def launched(warps: int, points: str) -> Unit:
    return Unit(
        kernel="a:k", source="aa" * 32, specialization=[], options={"num_warps": warps}, reached={"c": [{"n": points}]}
    )


def test_what_only_the_third_rank_launches_is_in_the_plan_of_all() -> None:
    same = launched(1, "1..2")
    plan = of_ranks([of_rank(same), of_rank(same), of_rank(launched(1, "3"), launched(2, "4"))])
    found = [(unit.options["num_warps"], unit.ranks, unit.reached["c"]) for unit in plan.units]
    assert found == [(1, [], [{"n": "1..3"}]), (2, [2], [{"n": "4"}])] and plan.ranks == 3
    assert apart(plan) == {"a:k": "1 specialization of rank 2"}
    assert (ranks_of_kernel(plan, "a:k"), ranks_of_kernel(of_ranks([of_rank(same), of_rank()]), "a:k")) == ([], [0])


def test_a_choice_between_other_candidates_is_of_its_rank() -> None:
    one, other = (
        of_rank(launched(1, "1"), tunings=[Tuning(kernel="a:k", tuner=0, key=[64], candidates=[{"B": b}])])
        for b in (1, 2)
    )
    plan = of_ranks([one, other, other])
    assert [(tuning.candidates, tuning.ranks) for tuning in plan.tunings] == [([{"B": 1}], [0]), ([{"B": 2}], [1, 2])]


def test_a_choice_that_differs_from_the_first_rank_s_is_of_its_rank() -> None:
    tuning = Tuning(kernel="a:k", tuner=0, key=[64], candidates=[{"B": 1}, {"B": 2}])
    recorded = [
        of_rank(launched(1, "1"), tunings=[replace(tuning, choice=choice, ranks=ranks)])
        for choice, ranks in (({"B": 2}, [3]), (None, [2]), ({"B": 1}, [1]), ({"B": 2}, [0]), ({"B": 2}, []))
    ]
    expected = [({"B": 2}, []), ({"B": 1}, [1])]
    assert [(found.choice, found.ranks) for found in of_processes(recorded).tunings] == expected
    assert [(found.choice, found.ranks) for found in of_processes(recorded[:-1]).tunings] == expected
    first_of_all = of_processes([recorded[2], recorded[3]])
    assert [(found.choice, found.ranks) for found in first_of_all.tunings] == [({"B": 1}, [1]), ({"B": 2}, [])]


def test_ranks_that_declare_otherwise_are_refused() -> None:
    other = of_rank(cases=[CasePlan(name="c", dims={"n": "1..8"}, points=8, total=8, sampled=[])])
    with pytest.raises(
        DeclarationError, match=r"declaration of case 'c' on all ranks, found n=1..4 as rank 0, n=1..8 as rank 2"
    ):
        of_ranks([of_rank(), of_rank(), other])
