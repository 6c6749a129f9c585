"""The parts of a rehearsal by themselves: which points, what is compared and how, what is counted, and what is written down."""

from __future__ import annotations

import json
import math
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_cache import Call, Case, Range, Recipe, Values, declare
from aot_cache.artifact import rehearsed
from aot_cache.artifact.plan import CasePlan
from aot_cache.artifact.rehearsed import CaseRun, Run, Stamp
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.render import terminal
from aot_cache.errors import DeclarationError, UnknownName
from aot_cache.rehearsal import CaseResult, Missed, PointResult, Rehearsal, arguments, compare, place, points
from aot_cache.rehearsal.leaves import Leaf, leaves, tensors
from aot_cache.upstream.codec import real_tensors
from aot_cache.upstream.hooks.second_count import COMPILERS, FAMILIES, GRAPHS, KERNELS, SecondCount, contradictions

# --- which points -----------------------------------------------------------------------------------------------------


def a_case(**dims: Any) -> Case:
    def make(**_: int) -> Call:
        return Call(len, "")

    return Case("one", make, dims)


def as_built(case: Case, **more: Any) -> CasePlan:
    return replace(CasePlan.of(case, case.points()), **more)


def chosen(case: Case, most: int | None, **more: Any) -> points.Chosen:
    (found,) = points.choose(Recipe("r", [case]), [as_built(case, **more)], (), most)
    return found


@given(
    st.lists(st.tuples(st.integers(0, 50), st.integers(0, 5000), st.integers(1, 7)), min_size=1, max_size=6),
    st.integers(1, 40),
)
def test_a_spread_is_no_more_than_was_asked_for(ranges: list[tuple[int, int, int]], most: int) -> None:
    case = a_case(**{f"d{n}": Range(low, low + more, step) for n, (low, more, step) in enumerate(ranges)})
    found = chosen(case, most)
    assert 1 <= len(found.points) <= most and found.declared == math.prod(len(d) for d in case.dims.values())
    assert all(point[name] in dim for point in found.points for name, dim in case.dims.items())
    if found.declared <= most:
        assert len(found.points) == found.declared


def test_a_spread_has_the_ends_and_one() -> None:
    values = [point["n"] for point in chosen(a_case(n=Range(1, 512)), 16).points]
    assert {1, 512} <= set(values) and len(values) == 16


def test_ranges_are_those_that_were_built() -> None:
    """`--range` narrowed them, and a miss was added."""
    found = chosen(a_case(n=Range(1, 512)), None, dims={"n": "3..4"}, missed=[{"n": 900}])
    assert [point["n"] for point in found.points] == [3, 4, 900] and found.declared == 3


def test_cases_and_dimensions_that_are_not_there() -> None:
    case = a_case(n=Values(1, 2))
    with pytest.raises(UnknownName, match="the bundle's case 'gone'"):
        chosen(case, 4, name="gone")
    with pytest.raises(DeclarationError, match="with the dimensions m, as it was built"):
        chosen(case, 4, dims={"m": "1..2"})
    with pytest.raises(DeclarationError, match="at most 1000000 points"):
        chosen(a_case(n=Range(0, 2_000_000)), None)


# --- what is in an object ---------------------------------------------------------------------------------------------


def test_every_tensor_has_a_name() -> None:
    pair = namedtuple("pair", "left right")

    @dataclass
    class Cache:
        keys: list[torch.Tensor]

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            self.register_buffer("state", torch.zeros(1))
            self.inner = torch.nn.Linear(1, 1, bias=False)
            self.kept = {"a": torch.zeros(1)}

        def step(self) -> None: ...

    held = torch.zeros(1)

    def closure() -> torch.Tensor:
        return held

    one = torch.zeros(1)
    value = [pair(one, (one,)), Cache([one]), Net().step, partial(closure, one)]
    assert {path for path, _ in tensors(value, "v")} == {
        "v[0].left",
        "v[0].right[0]",
        "v[1].keys[0]",
        "v[2].weight",
        "v[2].state",
        "v[2].inner.weight",
        "v[2].kept['a']",
        "v[3].func.held",
        "v[3].args[0]",
    }


def test_what_leads_to_itself_ends() -> None:
    ring: list[Any] = [1]
    ring.append(ring)
    assert [leaf.value for leaf in leaves(ring, "v")] == [1]


# --- how far apart ----------------------------------------------------------------------------------------------------


def apart(found: Any, wanted: Any, tolerance: float = 1e-5, given: bool = False) -> compare.Distance:
    return compare.compare([*leaves(found, "result")], [*leaves(wanted, "result")], tolerance, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn])
def test_a_wrong_value_is_seen_in_any_dtype(dtype: torch.dtype) -> None:
    wanted = torch.ones(100).to(dtype)
    found = wanted.clone()
    assert apart(found, wanted) == compare.Distance()
    found[7] = 2
    seen = apart([found], [wanted])
    assert not seen.close and seen.value == pytest.approx(0.1) and seen.where == "result[0]"


@pytest.mark.parametrize(
    ("found", "wanted", "value"),
    [
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), 0.0),
        (torch.tensor([1.0, math.nan]), torch.tensor([math.nan, 1.0]), math.inf),
        (torch.tensor([math.inf, 1.0]), torch.tensor([-math.inf, 1.0]), math.inf),
        (torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 1.0]), 0.0),
        (torch.zeros(4), torch.zeros(4), 0.0),
        (torch.full((4,), 1e-3), torch.zeros(4), 1e4),
        (torch.tensor([1, 2, 3, 5]), torch.tensor([1, 2, 3, 4]), 0.25),
        (torch.tensor([True]), torch.tensor([False]), 1.0),
        (torch.zeros(2), torch.zeros(3), math.inf),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), math.inf),
        (3, 4, math.inf),
        (3, 3, 0.0),
        (1, True, math.inf),
        (math.nan, math.nan, 0.0),
        ([torch.zeros(1)], [torch.zeros(1), torch.zeros(1)], math.inf),
        (None, torch.zeros(1), math.inf),
    ],
)
def test_distances(found: Any, wanted: Any, value: float) -> None:
    seen = apart(found, wanted)
    assert seen.value == pytest.approx(value) and seen.close is (value == 0)


def test_the_worst_is_what_is_not_close() -> None:
    """A share of integers that must not differ is worse than a larger distance that may be."""
    found = {"tokens": torch.tensor([1] * 99 + [2]), "logits": torch.full((4,), 1.1)}
    wanted = {"tokens": torch.tensor([1] * 100), "logits": torch.ones(4)}
    seen = apart(found, wanted, tolerance=0.2)
    assert (seen.where, seen.close, seen.value) == ("result['tokens']", False, pytest.approx(0.01))
    assert apart(found, wanted, tolerance=0.2, given=True).close, "who names a tolerance means all"


def test_the_least_precise_dtype_says_what_is_close() -> None:
    assert compare.tolerance_of([]) == compare.tolerance_of(["float32"]) == 1e-5
    assert compare.tolerance_of(["float32", "bfloat16"]) == 2e-2 < compare.tolerance_of(["float8_e4m3fn"])


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["inference", "no_grad", "grad"])
def test_no_garbage_is_in_arguments(mode: str) -> None:
    @declare(n=Values(64), mode=mode)
    def case(n: int) -> Call:
        x = torch.empty(n, 3)
        fp8 = torch.empty(n, dtype=torch.float8_e4m3fn)
        ints = torch.empty(n, dtype=torch.int64)
        return Call(len, x, x.new_empty(n), torch.empty_like(x), torch.empty_strided((n,), (2,)), fp8, ints)

    one, other = arguments.make(case, {"n": 64}, "cpu"), arguments.make(case, {"n": 64}, "cpu")
    *floats, fp8, ints = one.args
    assert not ints.any() and 0 < fp8.float().abs().mean() < 1
    for number, tensor in enumerate(floats):
        assert 0.02 < tensor.std() < 0.3 and torch.equal(tensor, other.args[number])


def test_what_is_made_once_and_kept_is_no_difference() -> None:
    """The first call draws the model's weights, too: the numbers after them are others the second time."""
    kept: list[torch.Tensor] = []

    @declare(n=Values(3))
    def case(n: int) -> Call:
        if not kept:
            kept.append(torch.randn(5))
        return Call(len, torch.randn(n), kept[0])

    made = arguments.pair(case, {"n": 3}, "cpu")
    assert not made.different and torch.equal(made.bundle.args[0], made.eager.args[0])


def test_arguments_of_nobody_s_seed_are_named() -> None:
    numbers: Iterator[int] = iter(range(100))

    @declare(n=Values(3))
    def case(n: int) -> Call:
        return Call(len, torch.zeros(n), scale=torch.tensor(next(numbers)))

    assert arguments.pair(case, {"n": 3}, "cpu").different == "kwargs['scale']"


def test_shared_memory_is_put_back() -> None:
    """Whatever views the calls have of it; what is each one's own, and parameters, stay as they are."""
    cache, weight = torch.zeros(8), torch.nn.Parameter(torch.zeros(2))

    @declare(n=Values(3), mode="no_grad")
    def case(n: int) -> Call:
        return Call(len, cache[n:], torch.zeros(n), weight)

    made = arguments.pair(case, {"n": 3}, "cpu")
    shared = arguments.Shared.of(made)
    with torch.no_grad():
        for tensor in made.bundle.args:
            tensor += 1
        shared.put_back()
    assert shared and not cache.any() and made.bundle.args[1].all() and weight.all()


def test_no_mode_is_left_behind() -> None:
    with real_tensors.Filling(1):
        pass
    assert torch.empty(1, device="meta").is_meta and not torch.overrides.is_tensor_like(1)


def test_the_place_of_an_error_is_in_the_user_s_code() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2) @ torch.zeros(3)
    assert f"({__file__}:" in place.told(caught.value)


# --- two counts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ledger", "second", "missed", "count"),
    [
        ({}, {}, False, 0),
        ({"frame": 2, "graph_compile": 1}, {GRAPHS: 1}, False, 0),
        ({}, {GRAPHS: 1}, False, 1),
        ({}, {GRAPHS: 1}, True, 0),
        ({"frame": 1}, {}, False, 1),
        ({"module_load": 1}, {KERNELS: 3}, False, 0),
        ({"gcc": 1}, {KERNELS: 1}, False, 2),
        ({"refused": 1}, {}, True, 0),
        ({"late_install": 1}, {KERNELS: 1}, False, 0),
        ({"late_install": 1}, {}, False, 0),
        ({"late_install": 1}, {GRAPHS: 1}, False, 1),
        ({}, {COMPILERS: 1, GRAPHS: 1}, False, 2),
    ],
)
def test_where_the_counts_contradict(ledger: Any, second: Any, missed: bool, count: int) -> None:
    assert len(contradictions(ledger, second, missed)) == count


def test_the_second_count_knows_every_harmful_kind() -> None:
    from aot_cache.runtime.ledger import HARMFUL

    counted_once = ["other_compile"]  # by compilers that start no program
    assert sorted([*(kind for kinds in FAMILIES.values() for kind in kinds), *counted_once]) == sorted(HARMFUL)


def test_the_second_count_sees_a_compile_and_a_compiler() -> None:
    import subprocess

    from torch._dynamo import reset

    reset()
    seen = SecondCount(kernels=False)
    before = seen.total()
    torch.compile(lambda x: x * 2 + 1, backend="aot_eager")(torch.ones(3))
    after = seen.total()
    assert after[GRAPHS] > before[GRAPHS] and after[COMPILERS] == before[COMPILERS]
    subprocess.run(["true"], check=True)
    assert seen.total() == after
    with pytest.raises(OSError, match="ptxas"):
        subprocess.run(["/nowhere/ptxas"], check=True)
    assert seen.total()[COMPILERS] == after[COMPILERS] + 1
    reset()


# --- results ----------------------------------------------------------------------------------------------------------


def a_point(n: int, status: str = "hit", **more: Any) -> PointResult:
    return PointResult("decode", {"n": n}, status, **more)


def a_rehearsal(*found: PointResult, chosen: int | None = None, declared: int = 3, **more: Any) -> Rehearsal:
    case = CaseResult("decode", declared, len(found) if chosen is None else chosen, found)
    given = {"path": Path("b.safetensors"), "digest": "d" * 64, "device": "cpu", "versions": {}, "date": "2026-01-01"}
    return Rehearsal(**{**given, "cases": (case,), **more})


def test_only_all_hits_pass() -> None:
    assert a_rehearsal(a_point(1), a_point(2)).passed
    assert not a_rehearsal(a_point(1), a_point(2, "differs")).passed
    assert not a_rehearsal(a_point(1), chosen=2).passed, "a point that was not run"
    assert not a_rehearsal(a_point(1), died="it was ended by SIGSEGV").passed
    assert not a_rehearsal(chosen=0).passed, "nothing was run"


def test_a_line_for_each_function() -> None:
    missed = [a_point(n, "miss", misses=(Missed("m:f", f"size {n}"), Missed("m:g", "gone"))) for n in (1, 2, 3)]
    assert a_rehearsal(*missed).reasons() == [
        "m:f: size 1 (at decode, n=1 and 2 more, for 2 other reasons, too)",
        "m:g: gone (at decode, n=1 and 2 more)",
    ]


# --- what is written down ---------------------------------------------------------------------------------------------

VERSIONS = {"aot-cache": "0.1.0", "python": "3.11", "torch": "2.13", "triton": ""}
DIGEST = "a" * 64


def a_run(run: int, declared: int = 9, device: str = "cpu", **more: Any) -> Run:
    case = CaseRun("decode", run, declared, 1e-7)
    return replace(Run(DIGEST, device, "2026-01-01T00:00:00Z", VERSIONS, (case,)), **more)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return tmp_path / "b.safetensors"


def test_what_is_written_is_read(bundle: Path) -> None:
    assert rehearsed.read(bundle, DIGEST) == Stamp()
    rehearsed.add(bundle, a_run(9))
    rehearsed.add(bundle, a_run(4, device="NVIDIA H200"))
    assert rehearsed.path_of(bundle).name == "b.rehearsed.json"
    stamp = rehearsed.read(bundle, DIGEST)
    assert [run.text() for run in stamp.runs] == ["rehearsed 4 of 9 points on NVIDIA H200", "proved 9 points on cpu"]
    assert (
        bundle_facts.coverage("traced", 9, [], stamp=stamp)
        == "rehearsed 4 of 9 points on NVIDIA H200; proved 9 points on cpu"
    )
    other = rehearsed.read(bundle, "b" * 64)
    assert not other.runs and "is about another bundle" in other.ignored
    assert bundle_facts.coverage("traced", 9, [], stamp=other) == "enumerated 9 points"


def test_a_new_run_takes_the_place_of_an_old_one(bundle: Path) -> None:
    rehearsed.add(bundle, a_run(9))
    assert rehearsed.add(bundle, a_run(4)).runs[0].run == 9, "fewer points of the same versions take nothing away"
    newer = {**VERSIONS, "torch": "2.14"}
    assert rehearsed.add(bundle, a_run(4, versions=newer)).runs[0].run == 4
    assert rehearsed.add(bundle, a_run(1, digest="b" * 64)).runs == (a_run(1, digest="b" * 64),), "a new bundle"
    assert rehearsed.remove(bundle, "b" * 64, "cpu") == Stamp() == rehearsed.read(bundle, "b" * 64)


def test_no_case_of_a_bundle_is_left_out_of_proved() -> None:
    cases = (CaseRun("a", 2, 2, 0.0), CaseRun("b", 0, 3, 0.0))
    assert not a_run(1, cases=cases).proved and a_run(1, cases=cases).text() == "rehearsed 2 of 5 points on cpu"
    assert not a_run(1, cases=()).proved


@pytest.mark.parametrize(
    ("points", "sampled", "runs", "text"),
    [
        (9, [], (), "enumerated 9 points"),
        (1, [], (), "enumerated 1 point"),
        (131, ["f.n"], (), "sampled: f.n"),
        (131, ["f.n"], (a_run(16, 39999),), "sampled: f.n; rehearsed 16 of 39999 points on cpu"),
        (131, ["f.n"], (a_run(39999, 39999),), "proved 39999 points on cpu"),
        (1, [], (a_run(1, 1),), "proved 1 point on cpu"),
    ],
)
def test_words_for_coverage(points: int, sampled: list[str], runs: tuple[Run, ...], text: str) -> None:
    assert bundle_facts.coverage("traced", points, sampled, stamp=Stamp(runs)) == text


HOSTILE = [
    b"",
    b"\xff",
    b"[]",
    b"null",
    b"{}",
    b'{"aot-cache rehearsed": 2, "runs": []}',
    b'{"aot-cache rehearsed": 1, "runs": {"a": 1}}',
    b'{"aot-cache rehearsed": 1, "runs": [1]}',
    b"[" * 100_000,
    b" " * (5 << 20),
]


@pytest.mark.parametrize("data", HOSTILE, ids=range(len(HOSTILE)))
def test_what_is_no_stamp_is_said(bundle: Path, data: bytes) -> None:
    rehearsed.path_of(bundle).write_bytes(data)
    stamp = rehearsed.read(bundle, DIGEST)
    assert not stamp.runs and "is not the record of a rehearsal" in stamp.ignored
    assert rehearsed.add(bundle, a_run(9)).runs, "and does not stay"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.sampled_from(["digest", "device", "date", "versions", "cases", "name", "run", "declared", "distance"]), JSON)
def test_no_value_is_a_traceback(tmp_path_factory: pytest.TempPathFactory, name: str, value: Any) -> None:
    bundle = tmp_path_factory.mktemp("stamp") / "b.safetensors"
    document = json.loads(json.dumps({rehearsed.FORMAT: 1, "runs": [a_run(4).to_json()]}))
    run = document["runs"][0]
    (run if name in run else run["cases"][0])[name] = value
    rehearsed.path_of(bundle).write_text(json.dumps(document))
    stamp = rehearsed.read(bundle, DIGEST)
    for text in (
        bundle_facts.coverage("traced", 9, [], stamp=stamp),
        *(t for _, t in terminal.stamp_lines(stamp.facts())),
    ):
        assert terminal.clean(text).isprintable()
    assert all(run.run <= run.declared for run in stamp.runs)


def test_a_leaf_knows_its_path() -> None:
    assert [*leaves(3, "result")] == [Leaf("result", 3)]


# --- captures, by a stand-in for them ---------------------------------------------------------------------------------


class Graphs:
    """Stands for torch's captures: the call runs at once, and `replay` does nothing; reading a value raises."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.captured = 0
        self.capturing = False
        self.given_back: list[object] = []
        patch.setattr(torch.cuda, "CUDAGraph", lambda: self)
        patch.setattr(torch.cuda, "graph", lambda _: self)
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "current_stream", lambda: "the stream that was current")
        patch.setattr(torch.cuda, "set_stream", self.given_back.append)
        item = torch.Tensor.item
        patch.setattr(torch.Tensor, "item", lambda tensor: self._refuse() or item(tensor))

    def _refuse(self) -> None:
        if self.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")

    def __enter__(self) -> None:
        self.captured, self.capturing = self.captured + 1, True

    def __exit__(self, *_: object) -> None:
        self.capturing = False

    def replay(self) -> None: ...


class Quiet(SecondCount):
    """Sees nothing; nothing is hooked for good."""

    def __init__(self) -> None: ...

    def total(self) -> dict[str, int]:
        return dict.fromkeys(FAMILIES, 0)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Graphs:
    from aot_cache.runtime import loader

    monkeypatch.setattr(loader, "arm", lambda _: None)  # there is nothing to be hooked into
    return Graphs(monkeypatch)


def test_every_first_call_is_inside_a_capture(graphs: Graphs) -> None:
    from aot_cache.rehearsal.serve import Stage

    stage, case = Stage("cuda", Quiet(), None), declare(n=Values(1, 2, 3))(lambda n: Call(torch.sin, torch.empty(n)))
    found = [stage.run(case, {"n": n}) for n in (1, 2, 3)]
    assert [point.status for point in found] == ["hit"] * 3 and all(point.captured for point in found)
    assert graphs.captured == 3 and not stage.not_captured


def test_a_call_that_no_capture_takes_is_made_outside(graphs: Graphs) -> None:
    """Tried once; a server makes it outside, too. Its state is as it was before the capture broke off."""
    from aot_cache.rehearsal.serve import Stage

    total = torch.zeros(1)

    def reading(x: torch.Tensor) -> float:
        total.add_(1)
        return float(x.sum().item() + total.item())

    stage, case = Stage("cuda", Quiet(), None), declare(n=Values(1, 2))(lambda n: Call(reading, torch.empty(n)))
    found = [stage.run(case, {"n": n}) for n in (1, 2)]
    assert [(point.status, point.captured) for point in found] == [("hit", False)] * 2, found
    assert "not permitted when stream is capturing" in stage.not_captured[case.name] and graphs.captured == 1
    assert graphs.given_back == ["the stream that was current"]


def test_what_raises_everywhere_is_not_blamed_on_captures(graphs: Graphs) -> None:
    from aot_cache.rehearsal.serve import Stage

    def broken(x: torch.Tensor) -> None:
        raise ValueError("always")

    stage, case = Stage("cuda", Quiet(), None), declare(n=Values(1))(lambda n: Call(broken, torch.empty(n)))
    found = stage.run(case, {"n": 1})
    assert found.status == "cannot run" and "ValueError: always" in found.why and not stage.not_captured
