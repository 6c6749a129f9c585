"""builder.kernels_trace on real kernels: for every way in which a launch is made, the plan is what Triton would ask for."""

from __future__ import annotations

import contextlib
import enum
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sample_kernels as sample
import torch
import triton
import triton.language as tl
from asking import Asked, asked_for, asking
from triton.runtime.autotuner import Autotuner

from aot_cache import Call, Case, Range, Recipe, Values
from aot_cache.artifact.key import function_of
from aot_cache.artifact.plan import Plan, Tuning, Unit
from aot_cache.builder import kernels_trace as tracing
from aot_cache.errors import DataDependent, DeclarationError, TraceError
from aot_cache.recipes import dimensions
from aot_cache.upstream.codec import triton_jit, triton_names

Host = Callable[[int, str], None]
TUNERS = [value for value in vars(sample).values() if isinstance(value, Autotuner)]


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """No choice and no compiled kernel is left for the next test."""
    yield
    for tuner in TUNERS:
        tuner.cache.clear()


def traced(make: Callable[..., Call], mode: str = "inference", autocast: str | None = None, **dims: Any) -> Plan:
    """The plan of one case, after a way through JSON."""
    recipe = Recipe("test", [Case("case", make, dims, mode, autocast)])
    plan = tracing.trace(recipe, "h200", lambda *_: None, workers=1).plan
    return Plan.from_json(json.loads(json.dumps(plan.to_json())))


def traced_host(host: Host, *numbers: int, **more: Any) -> Plan:
    return traced(lambda n: Call(host, n, "cuda"), n=Values(*numbers), **more)


def key_of(unit: Unit, plan: Plan) -> Asked:
    """Triton's key of a unit, as the loader computes it."""
    specialization = [triton_jit.decode(pair) for pair in unit.specialization]
    options = {k: triton_jit.decode(v) for k, v in unit.options.items()}
    name = function_of(unit.kernel)
    amount = plan.closures[unit.kernel][name]["refs"].get("AMOUNT")  # the factory's only one
    return " ".join(filter(None, [name, amount])), triton_jit.memory_key(specialization, options)


def points_of(unit: Unit | Tuning) -> set[int]:
    return {point["n"] for point in dimensions.expand(unit.reached["case"])}


def reached(plan: Plan) -> dict[Asked, set[int]]:
    """Key → the points that reach it."""
    out = {key_of(unit, plan): points_of(unit) for unit in plan.units}
    assert len(out) == len(plan.units), "two units have one key"
    return out


def asked_at(host: Host, *numbers: int) -> dict[Asked, set[int]]:
    """The same, by Triton's own `run` with CPU tensors."""
    out: dict[Asked, set[int]] = {}
    for n in numbers:
        for key in asked_for(lambda n=n: host(n, "cpu"), *TUNERS):
            out.setdefault(key, set()).add(n)
    return out


# --- every kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sample.KINDS)
def test_a_kind_is_enumerated_as_triton_asks(kind: str) -> None:
    numbers = list(sample.SIZES)
    host = sample.KINDS[kind]
    plan = traced_host(host, *numbers)
    assert plan.units
    assert reached(plan) == asked_at(host, *numbers)


@pytest.mark.parametrize("kind", sample.KINDS)
def test_a_unit_without_tuner_says_so(kind: str) -> None:
    plan = traced_host(sample.KINDS[kind], 2, 16)
    for unit in plan.units:
        assert unit.launched_without_tuner() == (not kind.startswith("tuned")), unit


def values_of(plan: Plan, number: int) -> set[str]:
    """What the plan says of one parameter, over its units."""
    return {json.dumps(unit.specialization[number]["t"]) for unit in plan.units}


def test_heuristics_see_each_point() -> None:
    plan = traced_host(sample.run_heuristics, 7, 8, 9, 16)
    by_even = {
        unit.specialization[3]["t"][1]: points_of(unit) for unit in plan.units if not unit.specialization[1]["t"][1]
    }
    assert by_even == {True: {8}, False: {7, 9}}


def test_offsets_decide_alignment() -> None:
    plan = traced_host(sample.run_offset, 0, 1, 7, 8, 9, 16)
    aligned = {unit.specialization[0]["t"][1]: points_of(unit) for unit in plan.units}
    assert aligned == {"D": {0, 8, 16}, "": {1, 7, 9}}


def test_arguments_that_are_none() -> None:
    plan = traced_host(sample.run_optional, 2, 3, 4, 9)
    assert '["constexpr", null]' in values_of(plan, 1) and '["*u1", "D"]' in values_of(plan, 1)
    assert '["constexpr", null]' in values_of(plan, 2) and '["*fp32", "D"]' in values_of(plan, 2)


def test_integers_by_value() -> None:
    plan = traced_host(sample.run_integers, 1, 2)
    found = values_of(plan, 1)
    assert {'["constexpr", 1]', '["i32", ""]', '["i32", "D"]', '["i64", ""]', '["i64", "D"]', '["u64", ""]'} <= found


def test_parameters_that_are_not_specialized() -> None:
    # 1 and 16 would make keys of their own; the offset of 4 bytes would, too.
    plan = traced_host(sample.run_unspecialized, 1, 3, 16, 17)
    assert values_of(plan, 1) == {'["i32", null]'}
    assert {unit.specialization[0]["t"][0] for unit in plan.units} == {"*fp32"}
    assert len({json.dumps(unit.specialization[0]) for unit in plan.units}) == 1


def test_a_parameter_called_num_warps_is_an_option_too() -> None:
    plan = traced_host(sample.run_own_warps, 3, 17)
    assert {(unit.overrides["num_warps"], unit.specialization[2]["t"][1]) for unit in plan.units} == {(1, 1), (8, 8)}
    assert all("num_warps" not in unit.options for unit in plan.units)


def test_options_keep_the_order_of_the_call() -> None:
    def host(n: int, device: str) -> None:
        x = torch.empty(n, device=device)
        sample.scale[(1,)](x, x, n, BLOCK=16, num_stages=2, num_warps=2)
        sample.scale[(1,)](x, x, n, BLOCK=16, num_warps=2, num_stages=2)

    plan = traced_host(host, 5)
    assert {tuple(unit.options)[:2] for unit in plan.units} == {
        ("num_stages", "num_warps"),
        ("num_warps", "num_stages"),
    }
    assert len({unit.id for unit in plan.units}) == 2
    assert reached(plan) == asked_at(host, 5)


def test_host_code_that_computes_on_the_cpu() -> None:
    """Tables and masks are often made there: their operators are not the virtual device's business."""

    def host(n: int, device: str) -> None:
        scales = torch.ones(3).abs() * torch.arange(3).view(-1).float().exp()
        assert scales.tolist()[0] == 1.0 and scales.device.type == "cpu"
        sample.run_scale(n + int(scales.neg()[0]), device)

    plan = traced_host(host, 5, 17)
    assert reached(plan) == asked_at(host, 5, 17)


def test_kernels_that_hooks_see() -> None:
    """A pre_run_hook gets what it would get at a launch."""
    seen: list[Any] = []
    sample.fill.add_pre_run_hook(lambda *args, **kwargs: seen.append((args[1], kwargs["BLOCK"])))
    try:
        tracing.functions_at(Case("case", lambda n: Call(sample.run_offset, n, "cuda"), {"n": Values(3)}), {"n": 3})
    finally:
        sample.fill.pre_run_hooks.clear()
    assert seen == [(7, 16)]


# --- autotuners -------------------------------------------------------------------------------------------------------


def test_a_tuner_gives_every_config_that_is_left() -> None:
    plan = traced_host(sample.run_tuned, 3, 17, 40, 50)
    blocks = {t.key[0]: [c["BLOCK"] for c in t.candidates] for t in plan.tunings}
    assert blocks == {4: [16], 32: [32, 16], 64: [64, 32, 16]}
    assert {t.key[0]: points_of(t) for t in plan.tunings} == {4: {3}, 32: {17}, 64: {40, 50}}
    assert all(t.key == [t.key[0], "torch.float32"] and t.choice is None for t in plan.tunings)


def test_via_names_the_tuning_and_the_candidate() -> None:
    plan = traced_host(sample.run_tuned, 3, 17, 40, 48)
    seen: set[tuple[int, int]] = set()
    for unit in plan.units:
        for number, candidate in unit.via:
            tuning = plan.tunings[number]
            config = tuning.candidates[candidate]
            assert config["BLOCK"] == unit.specialization[3]["t"][1]
            assert config["num_warps"] == unit.options["num_warps"]
            assert points_of(unit) & points_of(tuning)
            seen.add((number, candidate))
    assert seen == {(n, c) for n, t in enumerate(plan.tunings) for c in range(len(t.candidates))}


def test_a_tuner_around_heuristics() -> None:
    plan = traced_host(sample.run_tuned_even, 16, 32, 17)
    for unit in plan.units:
        for number, candidate in unit.via:
            block = plan.tunings[number].candidates[candidate]["BLOCK"]
            assert unit.specialization[2]["t"][1] == block
            assert {n % block == 0 for n in points_of(unit)} == {unit.specialization[3]["t"][1]}


def test_a_tuner_with_a_choice_of_its_own_is_not_expanded() -> None:
    """Libraries fill tuners from their own tables (fla's config files)."""
    choice = sample.TUNED_CONFIGS[2]

    def host(n: int, device: str) -> None:
        sample.tuned.cache[(64, "torch.float32")] = choice
        sample.run_tuned(n, device)

    plan = traced_host(host, 40)
    (unit,) = plan.units
    assert unit.specialization[3]["t"][1] == 16 and unit.launched_without_tuner() and not plan.tunings


def tuner_around_fill(prune: Callable[..., Any], configs: list[triton.Config]) -> Autotuner:
    """A tuner of which the key is the same at every point, and what is pruned is not."""
    return triton.autotune(
        configs, key=["BLOCK"], prune_configs_by={"early_config_prune": prune}, do_bench=sample.no_benchmark
    )(sample.fill)


def test_pruning_may_look_at_what_the_key_lacks() -> None:
    """The first call decides which configs are tried, and any point may come first: all of them are candidates."""
    configs = [triton.Config({"BLOCK": block}, num_warps=1) for block in (16, 32, 64)]
    tuner = tuner_around_fill(lambda c, named, **_: c[:1] if named["value"] < 10 else c[1:], configs)

    def host(n: int, device: str) -> None:
        tuner[(1,)](torch.empty(256, device=device), n)

    plan = traced_host(host, 5, 50)
    for unit in plan.units:
        for number, candidate in unit.via:
            assert plan.tunings[number].candidates[candidate]["BLOCK"] == unit.specialization[2]["t"][1]
    asked = {key for n in (5, 50) for key in asked_for(lambda n=n: host(n, "cpu"), tuner)}
    assert {key_of(unit, plan) for unit in plan.units} >= asked


def test_configs_that_are_made_while_pruning() -> None:
    """What is remembered of a config must not be the address of one that is gone."""
    first = triton.Config({"BLOCK": 16}, num_warps=1)
    gone: set[int] = set()

    def prune(configs: list[Any], named: dict[str, Any], **rest: Any) -> list[Any]:
        if named["value"] < 41:
            second = triton.Config({"BLOCK": 32}, num_warps=1)
            gone.add(id(second))
            return [first, second]
        made = [triton.Config({"BLOCK": 64}, num_warps=1)]
        while id(made[-1]) not in gone and len(made) < 50_000:  # until memory is used again, as it is some time
            made.append(triton.Config({"BLOCK": 64}, num_warps=1))
        return [first, made[-1]]

    tuner = tuner_around_fill(prune, [first, first])

    def host(n: int, device: str) -> None:
        tuner[(1,)](torch.empty(256, device=device), n)

    numbers = list(range(3, 43, 2))  # one key of Triton's for all
    plan = traced_host(host, *numbers)
    blocks = {unit.specialization[2]["t"][1]: points_of(unit) for unit in plan.units}
    assert blocks == {16: set(numbers), 32: set(numbers[:-1]), 64: set(numbers[-1:])}


def test_hooks_of_configs_change_arguments() -> None:
    """A config's pre_hook runs before its launch, as it does on the device (descriptors are made there)."""
    seen: list[int] = []
    configs = [
        triton.Config({"BLOCK": block}, num_warps=1, pre_hook=lambda named: seen.append(named["BLOCK"]))
        for block in (16, 32)
    ]
    tuner = triton.autotune(configs, key=["value"], do_bench=sample.no_benchmark)(sample.fill)
    case = Case("case", lambda n: Call(lambda: tuner[(1,)](torch.empty(64, device="cuda"), n)), {"n": Values(5)})
    tracing.functions_at(case, {"n": 5})
    assert seen == [16, 32]


# --- kernels made inside functions ------------------------------------------------------------------------------------


def test_a_kernel_that_is_made_inside_a_function_keeps_its_name() -> None:
    plan = traced_host(sample.run_made, 3, 16)
    assert {unit.kernel for unit in plan.units} == {"sample_kernels:make_kernel.<locals>.made"}
    assert set(plan.closures) == {"sample_kernels:make_kernel.<locals>.made"}


def launching(*kernels: Any) -> Host:
    def host(n: int, device: str) -> None:
        for kernel in kernels:
            kernel[(1,)](torch.empty(16, device=device), BLOCK=16)

    return host


def test_kernels_of_one_name() -> None:
    """A factory's kernels differ by what they see around them: one may not stand for the other."""
    plan = traced_host(launching(sample.make_adder(1), sample.make_adder(2), sample.make_adder(1)), 1, 2)
    assert len({unit.source for unit in plan.units}) == len(plan.units) == len(plan.closures) == 2
    assert {unit.kernel for unit in plan.units} == set(plan.closures)
    assert {function_of(unit.kernel) for unit in plan.units} == {"sample_kernels:make_adder.<locals>.adder"}
    for unit in plan.units:
        assert triton_jit.closure_digest(plan.closures[unit.kernel]) == unit.source
        assert unit.kernel.endswith(f"@{unit.source[:12]}") and points_of(unit) == {1, 2}


def test_a_kernel_is_told_from_others_in_another_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each child sees one of them only."""
    kernels = sample.make_adder(1), sample.make_adder(2)
    monkeypatch.setattr(tracing, "BLOCK", 1)
    plan = traced_host(lambda n, device: launching(kernels[n])(n, device), 0, 1)
    assert sorted(map(sorted, map(points_of, plan.units))) == [[0], [1]] and len(plan.closures) == 2


def helper(amount: int) -> Any:
    AMOUNT = tl.constexpr(amount)

    @triton.jit
    def more(x):
        return x + AMOUNT

    return more


def around(first: Any, second: Any) -> Any:
    @triton.jit
    def outer(x, BLOCK: tl.constexpr):
        at = x + tl.arange(0, BLOCK)
        tl.store(at, first(tl.load(at)) * second(1.0))

    return outer


@pytest.mark.contract("triton_names")
def test_functions_of_one_name_inside_a_kernel() -> None:
    """What a kernel calls has one name, too: in which order decides its code."""
    one, two = helper(1), helper(2)
    kernels = around(one, two), around(two, one), around(one, one)
    documents = [triton_jit.closure(kernel) for kernel in kernels]
    assert len({triton_jit.closure_digest(document) for document in documents}) == 3
    for number, kernel in enumerate(kernels):
        differs = [bool(triton_jit.closure_differs(kernel, document)) for document in documents]
        assert [n for n, different in enumerate(differs) if not different] == [number]
    assert not triton_jit.closure_differs(around(helper(1), helper(2)), documents[0])


class Table:
    """What no plan can write down."""

    def __init__(self, value: int) -> None:
        self.values = {"a": value}


def from_table(table: Any) -> Any:
    @triton.constexpr_function
    def taken():
        return table.values["a"]

    @triton.jit
    def filled(x, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), taken())

    return filled


@pytest.mark.parametrize("block", [1, 64])
def test_kernels_that_nothing_tells_apart(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Table(1), Table(2)
    kernels = from_table(tables[0]), from_table(tables[1])
    monkeypatch.setattr(tracing, "BLOCK", block)

    def unclear(*numbers: int) -> dict[str, str]:
        def make(n: int) -> Call:
            return Call(launching(kernels[n]), n, "cuda")

        recipe = Recipe("test", [Case("case", make, {"n": Values(*numbers)})])
        return tracing.trace(recipe, "h200", lambda *_: None, workers=1).unclear

    ((name, why),) = unclear(0, 1).items()
    assert name.endswith("from_table.<locals>.filled") and "table.values in" in why and "2 kernels" in why
    assert unclear(0) == {} == unclear(1)


@pytest.mark.contract("triton_names")
def test_what_a_module_has_by_name_hides_nothing() -> None:
    def factory(known: Any) -> Any:
        @triton.constexpr_function
        def taken():
            return known(1).values["a"]

        return taken

    assert factory(Table) is not factory(Table)
    assert triton_names.hidden(factory(Table)) == ()
    assert len(triton_names.hidden(factory(lambda n: Table(n)))) == 1


# --- values that have a written form ----------------------------------------------------------------------------------


class Color(enum.Enum):
    RED = "red"


class Text(str, enum.Enum):
    ONE = "one"


VALUES: dict[str, Any] = {
    "int": 3,
    "large int": 2**70,
    "negative": -1,
    "bool": True,
    "float": 0.1,
    "infinite": float("inf"),
    "nan": float("nan"),
    "text": "a\n\u2192'\"",
    "none": None,
    "tuple": (1, (2.5, "x"), None),
    "named tuple": sample.Pair(1, (2, 3)),
    "constexpr": tl.constexpr(4),
    "dtype": tl.float8e4nv,
    "pointer": tl.pointer_type(tl.float32),
    "torch dtype": torch.bfloat16,
    "jit function": sample.double,
    "enum of ints": sample.Mode.TWO,
    "enum": Color.RED,
    "enum of texts": Text.ONE,
}
with contextlib.suppress(ImportError):  # torch does not need it
    import numpy

    VALUES |= {"numpy float": numpy.float64(0.5), "numpy int": numpy.int64(3)}


@pytest.mark.parametrize("what", VALUES)
def test_a_constexpr_is_written_exactly_or_refused(what: str) -> None:
    """Triton's key holds the value's repr: one that is nearly the same is a kernel that nobody finds."""
    value = VALUES[what]
    specialization = [("constexpr", value), ("i32", "D")]
    try:
        text, refused = json.dumps(triton_jit.encode(specialization)), ""
    except TraceError as error:
        text, refused = "", str(error)
    if refused:
        assert type(value).__name__ in refused and "enum" not in what
        return
    decoded = triton_jit.decode(json.loads(text))
    assert triton_jit.memory_key(decoded, {}) == triton_jit.memory_key(specialization, {})
    assert repr(decoded) == repr(specialization)


# --- values that host code reads --------------------------------------------------------------------------------------


def test_values_that_are_declared_can_be_read() -> None:
    lengths = {1: [0, 5, 12], 2: [0, 40, 41]}

    def make(n: int) -> Call:
        return Call(sample.run_packed, torch.tensor(lengths[n], device="cuda"), "cuda")

    plan = traced(make, n=Range(1, 2))
    assert {unit.specialization[3]["t"][1]: points_of(unit) for unit in plan.units} == {8: {1}, 64: {2}}
    for n, starts in lengths.items():
        asked = asked_for(lambda starts=starts: sample.run_packed(torch.tensor(starts), "cpu"))
        assert asked == {key for key, points in reached(plan).items() if n in points}


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "item()": lambda x: x[0].item(),
    "tolist()": lambda x: x.tolist(),
    "int()": lambda x: int(x.max()),
    "bool()": lambda x: bool((x > 3).any()),
    "if": lambda x: 1 if x[1] > 3 else 0,
    "a mask": lambda x: x[x > 3].shape[0],
    "nonzero()": lambda x: x.nonzero().shape[0],
    "cpu()": lambda x: x.cpu().tolist(),
    "a slice by a value": lambda x: x[: x[1]].shape[0],
}


@pytest.mark.parametrize("what", READS)
def test_values_that_are_not_declared_are_named(what: str) -> None:
    def host(n: int, device: str) -> None:
        READS[what](torch.randint(0, 9, (4,), device=device) if n else torch.empty(4, dtype=torch.int64, device=device))

    for n in (0, 1):
        with pytest.raises(DataDependent) as caught:
            traced_host(host, n)
        assert f"'case' at n={n}" in str(caught.value)
        assert "torch.tensor([...], device='cuda')" in str(caught.value)


@pytest.mark.parametrize("what", READS)
def test_values_that_are_declared_are_read(what: str) -> None:
    values = [7, 2, 9, 1]

    def host(n: int, device: str) -> None:
        assert READS[what](torch.tensor(values, device=device)) == READS[what](torch.tensor(values)), what

    traced_host(host, 1)


def test_writing_what_nobody_knows_forgets_the_values() -> None:
    def host(n: int, device: str) -> None:
        x = torch.tensor([1, 2, 3], device=device)
        x.copy_(torch.empty(3, dtype=torch.int64, device=device))
        x.tolist()

    with pytest.raises(DataDependent):
        traced_host(host, 1)


def test_a_view_sees_what_is_written_through_another() -> None:
    """A value that is read must be the one that a GPU would give, or none."""

    def host(n: int, device: str) -> None:
        x = torch.zeros(4, dtype=torch.int64, device=device)
        view = x[1:3]
        view += 5
        assert x.tolist() == [0, 5, 5, 0]

    with contextlib.suppress(DataDependent):  # to refuse is right as well
        traced_host(host, 1)


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "grad", "inference"), [("inference", False, True), ("no_grad", False, False), ("grad", True, False)]
)
def test_host_code_sees_the_mode(mode: str, grad: bool, inference: bool) -> None:
    def host(n: int, device: str) -> None:
        assert torch.is_grad_enabled() == grad and torch.is_inference_mode_enabled() == inference
        assert not torch.is_autocast_enabled("cuda")
        sample.run_scale(n, device)

    plan = traced_host(host, 5, mode=mode)
    assert len(plan.units) == 1 and plan.cases[0].mode == mode


def test_host_code_sees_autocast() -> None:
    def host(n: int, device: str) -> None:
        assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.bfloat16
        x = torch.empty(n, n, device=device) @ torch.empty(n, n, device=device)
        sample.scale[(1,)](x, x, n, BLOCK=16)

    plan = traced_host(host, 5, autocast="bfloat16")
    assert plan.units[0].specialization[0]["t"][0] == "*bf16"
    assert plan.cases[0].autocast == "bfloat16"


@pytest.mark.parametrize("kind", ["custom_op", "triton_op", "scale", "tuned"])
@pytest.mark.parametrize("mode", ["no_grad", "grad"])
def test_kinds_in_other_modes(kind: str, mode: str) -> None:
    plan = traced_host(sample.KINDS[kind], 5, 16, mode=mode)
    assert reached(plan) == asked_at(sample.KINDS[kind], 5, 16)


# --- errors of the recipe ---------------------------------------------------------------------------------------------


def test_an_error_says_where() -> None:
    def host(n: int, device: str) -> None:
        if n == 3:
            raise ValueError("three is\nnot allowed")

    with pytest.raises(DeclarationError) as caught:
        traced_host(host, 1, 2, 3, 4)
    line = host.__code__.co_firstlineno + 2
    for part in ("'case'", "n=3", "ValueError: three is", f"{__file__}:{line}"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_case_that_makes_no_call() -> None:
    with pytest.raises(DeclarationError, match=r"aot_cache\.Call"):
        traced(lambda n: None, n=Values(1))  # type: ignore[arg-type, return-value]


def test_host_code_that_ends_the_process() -> None:
    def host(n: int, device: str) -> None:
        os._exit(7)

    with pytest.raises(TraceError, match="exit code 7"):
        traced_host(host, 1)


def test_host_code_that_exits_is_named_with_its_place() -> None:
    def host(n: int, device: str) -> None:
        raise SystemExit(7)

    with pytest.raises(DeclarationError, match="SystemExit: 7") as caught:
        traced_host(host, 1)
    assert f"{__file__}:{host.__code__.co_firstlineno + 1}" in str(caught.value)


def test_a_recipe_that_launches_nothing() -> None:
    plan = traced_host(lambda n, device: None, 1, 2)
    assert plan.units == [] and plan.cases[0].points == 2


def test_blocks_of_points_make_one_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """However the points are dealt to children, the plan is the same bytes."""
    numbers = range(1, 41)
    whole = traced_host(sample.run_tuned, *numbers)
    monkeypatch.setattr(tracing, "BLOCK", 7)
    recipe = Recipe("test", [Case("case", lambda n: Call(sample.run_tuned, n, "cuda"), {"n": Values(*numbers)})])
    parts = tracing.trace(recipe, "h200", lambda *_: None, workers=3).plan
    assert json.dumps(parts.to_json()) == json.dumps(whole.to_json())


def test_tracing_launches_and_compiles_nothing() -> None:
    with asking() as missed:
        traced_host(sample.run_scale, 3)
        tracing.functions_at(Case("case", lambda n: Call(sample.run_scale, n, "cuda"), {}), {"n": 3})
    assert not missed


# --- host code that reads a tuner's choice ----------------------------------------------------------------------------


def direct(n: int, place: str) -> None:
    """As vLLM launches kernels of its Mamba layers: the tuner once, and from then on the kernel itself with its choice."""
    x = torch.zeros(256, device=place)
    sample.tuned[(1,)](x, 64, n)
    config = sample.tuned.best_config
    sample.tuned.fn[(1,)](x, 64, n + 1, **config.all_kwargs())


def test_a_choice_that_host_code_reads_may_be_any_candidate() -> None:
    """Which config is best only a GPU knows: what is launched with it is planned with each of them."""
    plan = traced_host(direct, 16)
    (tuning,) = plan.tunings
    blocks = {json.dumps(config, sort_keys=True) for config in tuning.candidates}
    by_tuner = [unit for unit in plan.units if unit.via != [[-1, -1]]]
    alone = [unit for unit in plan.units if [-1, -1] in unit.via]
    assert len(by_tuner) == len(blocks) > 1 and len(alone) == len(blocks), "n is a multiple of 16, and then it is not"
