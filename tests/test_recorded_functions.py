"""Compiled functions of a recorded program: built from the plan alone, without a recipe, and served.

Recording, build and serving are real, on the CPU. What was traced is counted by torch, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from limits import HANGS

from aot_cache.artifact import target as targets
from aot_cache.artifact.compiled_function import CompiledFunction, merged
from aot_cache.artifact.plan import Plan
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.render import bundle as render_bundle
from aot_cache.errors import DeclarationError, TraceError
from aot_cache.upstream.codec import call_arguments, torch_settings
from aot_cache.upstream.hooks import dynamo_calls, dynamo_frames

HERE = Path(__file__).parent
PATHS = os.pathsep.join([str(HERE.parent), str(HERE)])
PROGRAM = str(HERE / "recorded_calls_program.py")


def python(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, "PYTHONPATH": PATHS, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), **variables},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


def build(folder: Path, *plans: Path, model: str | None = None) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", PATHS)
        return pipeline.build(
            Request(
                target=targets.get("cpu"),
                store=folder / "store",
                model=model,
                plans=plans,
                out=folder / "b.safetensors",
            )
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recorded")


@pytest.fixture(scope="module")
def plan(folder: Path) -> Path:
    out = folder / "program.plan.json"
    done = python(folder, "-m", "aot_cache", "record", "--out", str(out), "--", sys.executable, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert "4 compiled functions for cpu" in done.stderr
    assert "Module._wrapped_call_impl needs a recipe: it is a method of a recorded_steps.Model" in done.stderr
    return out


@pytest.fixture(scope="module")
def built(folder: Path, plan: Path) -> Built:
    return build(folder, plan)


def test_what_is_recorded(plan: Path) -> None:
    found = Plan.read(plan)
    calls = dict.fromkeys(("step", "plain", "overlap", "Counts.greater"), 0)
    for function in found.functions:
        if not function.why:
            calls[function.function.removeprefix("recorded_steps:")] += len(function.calls)
    assert calls == {"step": 8, "plain": 4, "overlap": 4, "Counts.greater": 4}
    why = [function.why for function in found.functions if function.why]
    assert sum("method of a" in one for one in why) == 1 and sum("another backend" in one for one in why) == 1
    assert sum("program's own file" in one for one in why) == 1, "a lambda of the program"
    assert found.target == "cpu" and found.origin == "recorded"
    lines = [text for name, text in render_bundle._summary(bundle_facts.plan(found, plan)) if name == "recorded"]
    assert "recorded_steps:overlap: 4 kinds of call" in lines and len(lines) == len(found.functions)


def test_a_build_calls_them_again(built: Built) -> None:
    assert not built.failed and built.graphs > 0 and built.covered == built.declared == 20


def test_they_are_served(built: Built, folder: Path) -> None:
    """No call is traced, of sizes between those of the recording neither, and all are equal to eager."""
    variables = {"AOT_CACHE": str(built.path), "AOT_CACHE_POLICY": "error", "AOT_CACHE_STRICT": "1"}
    done = python(folder, PROGRAM, "serve", **variables)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["traced"] == 0 and found["distance"] == 0.0
    total = found["stats"]["total"]
    assert 0 < total["graph"] <= built.graphs and not any(total[kind] for kind in ("frame", "graph_compile", "refused"))


def test_it_is_rehearsed_with_the_plan(built: Built, plan: Path, folder: Path) -> None:
    done = python(folder, "-m", "aot_cache", "rehearse", str(built.path), "--json", AOT_CACHE_CONFIG=str(plan))
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["passed"]


def test_beside_a_recipe_it_is_said_what_is_not_built(plan: Path, tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(
        "import recorded_steps as s, torch\n"
        "from aot_cache import Call, Range, Recipe, declare\n"
        "@declare(n=Range(2, 3), mode='no_grad')\n"
        "def case(n):\n"
        "    buffer = torch.zeros(20, device='cpu')\n"
        "    return Call(s.overlap, buffer, buffer[3 : 3 + n])\n"
        "recipe = Recipe('other', [case])\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        found = build(tmp_path, plan, model="other:recipe")
    assert found.not_built == [f"recorded_steps:{name}" for name in ("Counts.greater", "plain", "step")]


def test_two_plans_with_functions_are_merged_first(plan: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.plan.json"
    other.write_bytes(plan.read_bytes())
    with pytest.raises(DeclarationError, match="one plan with compiled functions"):
        build(tmp_path, plan, other)
    out = tmp_path / "all.plan.json"
    done = python(tmp_path, "-m", "aot_cache", "merge", str(plan), str(other), "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert Plan.read(out).functions == Plan.read(plan).functions


def test_merging_keeps_each_call_once() -> None:
    one = CompiledFunction(function="m:f", arguments={"args": [], "kwargs": []}, calls=[[[2, 1, 0]], [[10, 1, 0]]])
    two = replace(one, calls=[[[2, 1, 0]], [[3, 1, 0]]])
    (found,) = merged([one, two])
    assert found.calls == [[[2, 1, 0]], [[3, 1, 0]], [[10, 1, 0]]], "smallest first"
    assert len(merged([one, replace(two, mode="grad")])) == 2


# --- arguments --------------------------------------------------------------------------------------------------------


def again(args: list[object], kwargs: dict[str, object]) -> tuple[list[object], dict[str, object]]:
    """Arguments through JSON."""
    arguments, sizes = json.loads(json.dumps(call_arguments.written(args, kwargs, ["x", "y"])))
    return call_arguments.made(arguments, sizes, lambda device: device)


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(SHAPES)
    with torch.inference_mode(draw(st.booleans())):
        whole = torch.zeros([size + 2 for size in shape], dtype=dtype)
        how = draw(st.sampled_from(["whole", "sliced", "turned", "parameter"]))
        if how == "whole":
            return whole
        if how == "parameter" and dtype == torch.float32 and not whole.is_inference():
            return torch.nn.Parameter(whole, requires_grad=draw(st.booleans()))
        found = whole[tuple(slice(draw(st.integers(0, 2)), None) for _ in shape)]
        return found.permute(tuple(reversed(range(found.dim())))) if how == "turned" else found


VALUES = st.recursive(
    st.one_of(
        tensors(),
        st.integers(-(2**40), 2**40),
        st.booleans(),
        st.none(),
        st.text(max_size=3),
        st.floats(allow_nan=False),
        st.sampled_from([torch.float16, torch.device("cpu")]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.tuples(inner, inner), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


def alike(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        facts = [
            (
                type(x),
                x.dtype,
                x.shape,
                x.stride(),
                x.storage_offset(),
                x.is_inference(),
                x.requires_grad,
                x._base is None,
            )
            for x in (a, b)
        ]
        return facts[0] == facts[1]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(alike, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return list(a) == list(b) and all(map(alike, a.values(), b.values()))
    return type(a) is type(b) and a == b


@pytest.mark.contract("call_arguments")
@given(st.lists(VALUES, max_size=3), st.dictionaries(st.text(max_size=3), VALUES, max_size=2))
def test_arguments_come_back(args: list[object], kwargs: dict[str, object]) -> None:
    made_args, made_kwargs = again(args, kwargs)
    assert alike(args, made_args) and alike(kwargs, made_kwargs)


@pytest.mark.contract("call_arguments")
def test_what_shares_memory_shares_it_again() -> None:
    x = torch.zeros(20)
    with torch.inference_mode():
        y = torch.zeros(6)
        z = y[2:]
    args, _ = again([x[3:8], x, [x[1:], x], y, z, x.detach(), x.view(torch.int32)], {})
    view, base, (rest, same), first, second, detached, bits = args  # type: ignore[misc]  # made of JSON
    assert view._base is base is same and rest._base is base
    assert (detached._base, bits._base) == (x.detach()._base, x.view(torch.int32)._base) == (None, None)
    of_x = {t.untyped_storage().data_ptr() for t in (view, base, rest, detached, bits)}
    assert len(of_x) == 1 and first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert second.data_ptr() - first.data_ptr() == 8 and bits.dtype == torch.int32


@pytest.mark.contract("call_arguments")
def test_marks_of_dimensions_come_back() -> None:
    x = torch.zeros(4, 4)
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.decorators.mark_unbacked(x, 1)
    ((found,), _) = again([x], {})
    assert isinstance(found, torch.Tensor)
    assert call_arguments.written([found], {}, []) == call_arguments.written([x], {}, [])
    assert call_arguments.written([found], {}, [])[0]["args"][0]["marks"] == {"mark_dynamic": [0], "mark_unbacked": [1]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (torch.nn.Linear(2, 2), "y is a torch.nn.modules.linear.Linear"),
        ([1, {"a": print}], r"y\[1\]\['a'\] is a builtins.builtin_function_or_method"),
        (torch.ones(2, requires_grad=True) * 2, "in the middle of a gradient's graph"),
        (torch.eye(2).to_sparse(), "layout torch.sparse_coo"),
    ],
    ids=["a module", "a function inside", "a gradient", "sparse"],
)
def test_what_cannot_be_made_again_is_named(value: object, says: str) -> None:
    with pytest.raises(TraceError, match=says):
        call_arguments.written([1, value], {}, ["x", "y"])


# --- what upstream has ------------------------------------------------------------------------------------------------


@pytest.mark.contract("dynamo_calls")
def test_each_call_is_told_once_with_what_was_passed() -> None:
    seen: list[object] = []

    def add(x: torch.Tensor, *, n: int) -> torch.Tensor:
        return x + n

    compiled = torch.compile(add, backend="eager", fullgraph=True)

    def note(function: object, args: tuple[object, ...], kwargs: dict[str, object], callback: object) -> None:
        seen.append(
            [dynamo_calls.is_compiled(compiled, function), len(args), kwargs, dynamo_frames.is_fullgraph(callback)]
        )

    stop = dynamo_calls.note_calls(note)
    for n in (1, 1):
        compiled(torch.ones(2), n=n)
    stop()
    compiled(torch.ones(2), n=1)
    assert seen == [[True, 1, {"n": 1}, True]] * 2
    assert not dynamo_calls.is_compiled(add) and dynamo_calls.is_compiled(compiled)


@pytest.mark.contract("dynamo_calls")
def test_options_that_can_be_written_down() -> None:
    found: list[bool] = []
    stop = dynamo_calls.note_calls(lambda f, a, k, callback: found.append(dynamo_calls.has_plain_options(callback)))
    try:
        with torch.compiler.set_stance("force_eager"):  # the callback is that of the call all the same
            torch.compile(torch.sin, options={"epilogue_fusion": False})(torch.ones(2))
            torch.compile(torch.sin, options={"post_grad_custom_pre_pass": lambda graph: None})(torch.ones(2))
    finally:
        stop()
    assert found == [True, False]


@pytest.mark.contract("torch_settings")
def test_settings_are_set_as_they_were() -> None:
    assert torch_settings.changed() == {} and torch_settings.autocast() == ""
    wanted = {"float32_matmul_precision": "high", "deterministic_algorithms": True, "default_dtype": "bfloat16"}
    before = {"float32_matmul_precision": "highest", "deterministic_algorithms": False, "default_dtype": "float32"}
    torch_settings.set_all(wanted)
    try:
        assert torch_settings.changed() == wanted
        assert torch.get_default_dtype() == torch.bfloat16 and torch.are_deterministic_algorithms_enabled()
    finally:
        torch_settings.set_all(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch_settings.autocast() == "bfloat16"
