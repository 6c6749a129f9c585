"""builder.kernels_compile and assemble: what fails is named, what an autotuner would skip is pruned, the rest is there."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from triton.backends.nvidia.compiler import CUDABackend

from aot_cache import Recipe
from aot_cache.artifact import target as targets
from aot_cache.artifact.key import UNITS
from aot_cache.artifact.manifest import Manifest, plain, split, whole
from aot_cache.artifact.plan import Plan, Tuning
from aot_cache.builder import assemble, kernels_compile, kernels_trace
from aot_cache.builder.kernels_compile import Outcome
from aot_cache.builder.workers import BuildResult
from aot_cache.runtime.kernels import KernelSet
from aot_cache.runtime.ledger import Ledger
from aot_cache.store import Store, read_bundle, write_bundle
from aot_cache.store.objects import LAYOUT
from aot_cache.upstream.codec import triton_jit
from aot_cache.upstream.virtual import triton_compile

SOURCE = """
import os, signal
import torch, triton
import triton.language as tl
from aot_cache import Call, Case, Recipe, Values

@triton.jit
def good(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0)

@triton.jit
def asserts(x, n, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK != 32, "BLOCK may not be 32")
    tl.store(x + tl.arange(0, BLOCK), 1.0)

@triton.jit
def undefined(x, n, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), no_such_name)

@triton.jit
def matmul(a, b, c, K, M: tl.constexpr, STAGE: tl.constexpr):
    rows, inner = tl.arange(0, M), tl.arange(0, STAGE)
    sum = tl.zeros((M, M), dtype=tl.float32)
    for k in range(0, K, STAGE):
        left = tl.load(a + rows[:, None] * K + k + inner[None, :])
        right = tl.load(b + (k + inner)[:, None] * M + rows[None, :])
        sum = tl.dot(left, right, sum)
    tl.store(c + rows[:, None] * M + rows[None, :], sum)

@triton.jit
def indifferent(x, HEADS: tl.constexpr, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 3.0)

def configs(*settings, **more):
    return [triton.Config(kwargs, **more) for kwargs in settings]

tuned = triton.autotune(configs({"BLOCK": 32}, {"BLOCK": 64}, {"BLOCK": 16}, num_warps=1), key=["n"])(asserts)
hopeless = triton.autotune(configs({"BLOCK": 16}, {"BLOCK": 64}, num_warps=1), key=["n"])(undefined)
# Three stages keep two of two tiles of 128 x 128 halves: 128 KiB of shared memory, too much for a consumer's GPU.
tuned_matmul = triton.autotune(
    configs({"M": 128, "STAGE": 128}, {"M": 32, "STAGE": 32}, num_warps=8, num_stages=3), key=["K"]
)(matmul)

def case(name, run):
    return Case(name, lambda n: Call(run, torch.empty(n, device="cuda", dtype=torch.float16)), {"n": Values(16)})

def run_matmul(x, tuner=tuned_matmul, **more):
    tuner[(1,)](x, x, x, 1024, **more)

dying = False

holder = {}

def run_made_tuner(x):
    # A tuner that no name of a module reaches.
    if not holder:
        holder["tuner"] = triton.autotune(configs({"BLOCK": 16}, {"BLOCK": 64}, num_warps=1), key=["n"])(asserts)
    holder["tuner"][(1,)](x, 3)

def make_dying():
    @triton.jit
    def made(x, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), 2.0)
    return made

def run_dying(x):
    if dying:
        os.kill(os.getpid(), signal.SIGKILL)
    make_dying()[(1,)](x, BLOCK=16)

cases = {
    "good": case("good", lambda x: good[(1,)](x, BLOCK=16)),
    "indifferent": case(
        "indifferent", lambda x: [indifferent[(1,)](x, HEADS=heads, BLOCK=16) for heads in (16, 32, 48)]
    ),
    "asserts": case("asserts", lambda x: [asserts[(1,)](x, 3, BLOCK=block) for block in (16, 32)]),
    "undefined": case("undefined", lambda x: undefined[(1,)](x, 3, BLOCK=16)),
    "tuned": case("tuned", lambda x: tuned[(1,)](x, 3)),
    "hopeless": case("hopeless", lambda x: hopeless[(1,)](x, 3)),
    "both": case("both", lambda x: [tuned[(1,)](x, 3), asserts[(1,)](x, 3, **tuned.configs[0].all_kwargs())]),
    "matmul": case("matmul", run_matmul),
    "large": case("large", lambda x: run_matmul(x, matmul, M=128, STAGE=128, num_warps=8, num_stages=3)),
    "made tuner": case("made tuner", run_made_tuner),
    "dying": case("dying", run_dying),
}
"""


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[ModuleType]:
    """The module above, imported as `doomed_kernels`."""
    path = tmp_path / "doomed_kernels.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("doomed_kernels", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["doomed_kernels"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["doomed_kernels"]


@dataclass
class Made:
    """What came of a build in this process."""

    plan: Plan
    outcome: Outcome
    manifest: dict[str, Any]
    objects: dict[str, bytes]

    @property
    def failed(self) -> dict[str, str]:
        return {failure["kernel"]: failure["error"] for failure in self.manifest["failed"]}

    @property
    def kernels(self) -> set[str]:
        """The kernels of which there are units in the bundle."""
        return {self.manifest["kernels"][unit["kernel"]]["name"] for unit in self.manifest["units"]}


Build = Callable[..., Made]


@pytest.fixture
def build(kernels: ModuleType, clean_store: Store) -> Build:
    def build(*names: str, target: str = "h200", store: Store = clean_store) -> Made:
        recipe = Recipe("doomed", [kernels.cases[name] for name in names])
        plan = kernels_trace.trace(recipe, target, lambda *_: None, workers=2).plan
        return finish(plan, recipe, target, store)

    return build


def finish(plan: Plan, recipe: Recipe | None, target: str, store: Store) -> Made:
    outcome = kernels_compile.compile_plan(
        plan, recipe, targets.get(target), store, line_info=False, pythons=[], progress=lambda *_: None, workers=2
    )
    result = BuildResult(
        plan=plan,
        keys=outcome.keys,
        memory_keys=outcome.memory_keys,
        failed=outcome.failed,
        native=outcome.native,
        toolchain=outcome.toolchain,
    )
    manifest, objects = assemble.assemble(targets.get(target), "doomed_kernels:recipe", result, store)
    return Made(plan, outcome, manifest.to_json(), objects)


def test_a_kernel_that_does_not_compile_is_named_and_the_rest_is_built(build: Build) -> None:
    made = build("good", "asserts", "undefined")
    assert set(made.failed) == {"doomed_kernels:asserts", "doomed_kernels:undefined"}
    assert "BLOCK may not be 32" in made.failed["doomed_kernels:asserts"]
    assert "no_such_name" in made.failed["doomed_kernels:undefined"]
    assert all("\n" not in error for error in made.failed.values())
    # Of `asserts` the one that compiles is kept.
    assert made.kernels == {"doomed_kernels:good", "doomed_kernels:asserts"} and len(made.manifest["units"]) == 2
    assert made.manifest["complete"] is False
    reached = {unit.id: unit.reached for unit in made.plan.units}
    assert made.manifest["failed"] == [{"reached": reached[f["unit"]], **f} for f in map(plain, made.outcome.failed)]
    ids = {unit.id for unit in made.plan.units}
    assert all(failure.unit in ids for failure in made.outcome.failed)


@pytest.mark.parametrize("line_info", [False, True])
def test_units_of_one_ir_are_assembled_once(
    kernels: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line_info: bool
) -> None:
    """A constexpr that nothing reads: three units, one binary, and one run of LLVM and the assembler to make it."""
    plan = kernels_trace.trace(
        Recipe("doomed", [kernels.cases["indifferent"]]), "h200", lambda *_: None, workers=1
    ).plan
    runs = tmp_path / "runs"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))

    def counted(self: Any, *args: Any) -> Any:
        with runs.open("a") as file:
            file.write("one\n")
        return make_cubin(self, *args)

    make_cubin = CUDABackend.make_cubin
    monkeypatch.setattr(CUDABackend, "make_cubin", counted)
    store = Store(tmp_path / "store")
    arguments = {"line_info": line_info, "pythons": [], "progress": lambda *_: None, "workers": 1}
    outcome = kernels_compile.compile_plan(plan, None, targets.get("h200"), store, **arguments)
    assert outcome.compiled == 3 and not outcome.failed
    # With line numbers kept, two units of one IR may still differ in them.
    assert len(runs.read_text().split()) == (3 if line_info else 1)
    kept = [store.get_record(UNITS, key) for key in outcome.keys]
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "another"))
    for unit, record in zip(plan.units, kept):
        function = triton_jit.unwrap(triton_jit.find(unit.kernel))
        pairs = [triton_jit.decode_pair(pair) for pair in unit.specialization]
        options = {name: triton_jit.decode(value) for name, value in unit.options.items()}
        alone = triton_compile.compile_specialization(function, pairs, options, targets.get("h200"))
        assert record is not None and record["metadata"] == json.loads(json.dumps(alone.metadata))
        assert line_info or store.get(record["object"]) == alone.binary


def test_what_failed_is_tried_again_and_what_did_not_is_not(build: Build) -> None:
    assert build("good", "undefined").outcome.compiled == 1
    again = build("good", "undefined")
    assert again.outcome.compiled == 0 and set(again.failed) == {"doomed_kernels:undefined"}


def test_a_candidate_that_asserts_is_pruned(build: Build) -> None:
    made = build("tuned")
    assert not made.failed and made.manifest["complete"] is True
    ((pruned),) = made.manifest["pruned"]
    assert pruned["kernel"] == "doomed_kernels:asserts" and pruned["via"] == [[0, 0]]
    assert "BLOCK may not be 32" in pruned["why"]
    (tuning,) = made.manifest["tunings"]
    assert tuning["candidates"][tuning["default"]]["BLOCK"] == 64, "the first that compiles"
    assert len(made.manifest["units"]) == 2
    assert build("tuned").outcome.compiled == 0, "that a candidate is pruned is remembered"


def test_a_candidate_that_asserts_fails_where_it_is_launched_itself(build: Build) -> None:
    made = build("both")
    assert set(made.failed) == {"doomed_kernels:asserts"} and made.manifest["complete"] is False


def test_what_was_pruned_before_fails_where_it_is_launched_itself(build: Build) -> None:
    """The store remembers why a candidate was skipped; a launch without a tuner cannot skip it."""
    assert build("tuned").manifest["pruned"]
    made = build("both")
    assert made.manifest["complete"] is False
    assert "BLOCK may not be 32" in made.failed["doomed_kernels:asserts"]


def test_a_tuner_of_which_nothing_compiles(build: Build) -> None:
    made = build("good", "hopeless")
    (tuning,) = made.manifest["tunings"]
    assert tuning["default"] is None
    assert set(made.failed) == {"doomed_kernels:undefined"} and made.kernels == {"doomed_kernels:good"}


def test_a_candidate_that_needs_too_much_shared_memory(build: Build, clean_store: Store) -> None:
    large = build("matmul", target="h200")
    assert not large.failed and not large.manifest["pruned"] and large.manifest["tunings"][0]["default"] == 0
    small = build("matmul", target="rtx4090")
    assert not small.failed and small.manifest["complete"] is True
    (pruned,) = small.manifest["pruned"]
    needed = 128 * 1024
    limit = targets.get("rtx4090").shared_memory_per_block_optin
    assert "shared memory" in pruned["why"] and f"rtx4090 has {limit}" in pruned["why"]
    assert int(pruned["why"].split()[1]) >= needed > limit
    assert small.manifest["tunings"][0]["default"] == 1


def test_too_much_shared_memory_without_a_tuner_is_no_secret(build: Build) -> None:
    """The launch will fail on the GPU, whatever we do: the build must not say that all is well."""
    made = build("large", target="rtx4090")
    assert made.manifest["complete"] is False and "shared memory" in made.failed["doomed_kernels:matmul"]


def test_a_compiler_that_dies_loses_one_unit(build: Build, kernels: ModuleType, clean_store: Store) -> None:
    recipe = Recipe("doomed", [kernels.cases["dying"], kernels.cases["good"]])
    plan = kernels_trace.trace(recipe, "h200", lambda *_: None, workers=2).plan
    kernels.dying = True  # children are forked from here
    made = finish(plan, recipe, "h200", clean_store)
    assert made.failed == {"doomed_kernels:make_dying.<locals>.made": "its process was killed by SIGKILL"}
    assert made.kernels == {"doomed_kernels:good"}


def test_a_plan_of_other_source_is_refused(build: Build, clean_store: Store) -> None:
    plan = build("good").plan
    closures: dict[str, Any] = json.loads(json.dumps(plan.closures))
    closures["doomed_kernels:good"]["doomed_kernels:good"]["src"] = "0" * 32
    plan = replace(plan, closures=closures, units=[replace(plan.units[0], source="0" * 64), *plan.units[1:]])
    made = finish(plan, None, "h200", clean_store)
    assert "the source of doomed_kernels:good differs" in made.failed["doomed_kernels:good"]


def test_a_plan_of_a_kernel_that_is_not_here(build: Build, clean_store: Store) -> None:
    plan = build("good").plan
    gone = replace(plan.units[0], kernel="gone:kernel", source="0" * 64)
    plan = replace(plan, closures={**plan.closures, "gone:kernel": {}}, units=[*plan.units, gone])
    made = finish(plan, None, "h200", clean_store)
    assert set(made.failed) == {"gone:kernel"} and "installed" in made.failed["gone:kernel"]
    assert made.kernels == {"doomed_kernels:good"}


@pytest.mark.parametrize("target", ["a100", "rtx5090", "mi300x"])
def test_other_targets(build: Build, target: str) -> None:
    """What was traced for one GPU compiles for others, AMD's too; their bundles have other keys."""
    recipe_plan = build("good")
    made = build("good", target=target)
    assert not made.failed and made.kernels == {"doomed_kernels:good"}
    assert {u["key"] for u in made.manifest["units"]}.isdisjoint(u["key"] for u in recipe_plan.manifest["units"])


def test_whatever_is_in_a_bundle_comes_back(build: Build, tmp_path: Path) -> None:
    """manifest.split and whole, through a file."""
    made = build("good", "tuned", "asserts", "matmul")
    lean, details = split(Manifest.from_json(made.manifest))
    path = tmp_path / "bundle.safetensors"
    write_bundle(path, lean, {**made.objects, lean["details"]: details})
    bundle = read_bundle(path)
    back = whole(bundle).to_json()
    for name, value in made.manifest.items():
        assert back[name] == value, name
    assert bundle.check_all() == []


def test_records_in_the_store_are_what_the_bundle_has(build: Build, clean_store: Store) -> None:
    made = build("good")
    (key,) = made.outcome.keys
    record = clean_store.get_record(UNITS, key)
    assert record is not None and record["object"] in made.objects
    assert clean_store.get(record["object"]).startswith(b"\x7fELF")


def test_an_object_that_is_gone_is_compiled_again(build: Build, clean_store: Store) -> None:
    made = build("good")
    before = dict(made.objects)
    for path in (clean_store.root / LAYOUT / "objects").rglob("*"):
        if path.is_file():
            path.unlink()
    again = build("good")
    assert again.outcome.compiled == 1 and again.objects == before


def test_tuner_choices_reach_tuners(build: Build, kernels: ModuleType, tmp_path: Path) -> None:
    """Installed, the tuner takes the first candidate that is in the bundle."""
    made = build("tuned")
    lean, details = split(Manifest.from_json(made.manifest))
    path = tmp_path / "bundle.safetensors"
    write_bundle(path, lean, {**made.objects, lean["details"]: details})
    KernelSet(read_bundle(path), Ledger()).install(0)
    (choice,) = kernels.tuned.cache.values()
    assert choice.kwargs["BLOCK"] == 64


def test_a_choice_reaches_a_tuner_that_was_made_inside_a_function(
    build: Build, kernels: ModuleType, tmp_path: Path
) -> None:
    made = build("made tuner")
    lean, details = split(Manifest.from_json(made.manifest))
    path = tmp_path / "bundle.safetensors"
    write_bundle(path, lean, {**made.objects, lean["details"]: details})
    kernels.holder["tuner"] = kernels.triton.autotune(
        kernels.configs({"BLOCK": 16}, {"BLOCK": 64}, num_warps=1), key=["n"]
    )(kernels.asserts)
    installed = KernelSet(read_bundle(path), Ledger())
    installed.install(0)
    assert [config.kwargs["BLOCK"] for config in kernels.holder["tuner"].cache.values()] == [16]
    assert installed.report.unchosen == {}


def test_two_tuners_of_one_kernel_are_told_apart(build: Build) -> None:
    made = build("tuned", "made tuner")
    for unit in made.plan.units:
        for number, candidate in unit.via:
            tuning = made.plan.tunings[number]
            assert tuning.candidates[candidate]["BLOCK"] == unit.specialization[2]["t"][1]


def test_a_unit_of_a_plan_with_two_choices(build: Build) -> None:
    """`via` of a unit counts candidates of its own tuning."""
    plan = build("tuned", "matmul").plan
    tunings: list[Tuning] = plan.tunings
    for unit in plan.units:
        for number, candidate in unit.via:
            assert tunings[number].kernel == unit.kernel and candidate < len(tunings[number].candidates)


def test_children_do_not_outlive_a_build(build: Build) -> None:
    build("good")
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_workers_ignore_ctrl_c() -> None:
    """The parent answers it, once."""
    from aot_cache.builder import fork_map

    def handler(_: int) -> Any:
        return signal.getsignal(signal.SIGINT) == signal.SIG_IGN

    assert [result for _, result in fork_map.run(handler, [1, 2], 2)] == [True, True]
