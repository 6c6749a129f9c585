"""Calls as users write them, and unmodified models of transformers: built, and rehearsed with real tensors in a fresh process.

What a kind of call (`sample_calls`), or a family of models (`sample_hf`), hits and how far it is from eager is what the
rehearsal says, which shares no code with the builder.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import sample_calls
from limits import HANGS

from aot_cache.artifact.manifest import whole
from aot_cache.store import read_bundle

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def aot_cache(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aot_cache", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, HERE, ROOT))), **environment},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


def built(folder: Path, recipe: str, *arguments: str) -> dict[str, Any]:
    run = aot_cache(folder, *f"build --model {recipe} --target cpu --store store --json".split(), *arguments)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    bundle: dict[str, Any] = json.loads(run.stdout)["bundles"][0]
    return bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return built(tmp_path_factory.mktemp("calls"), "sample_calls:recipe")


@pytest.fixture(scope="module")
def calls(bundle: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Case → what its rehearsal found."""
    assert bundle["coverage"].startswith(f"proved {bundle['declared']} points on cpu")
    return {case["name"]: case for case in bundle["rehearsal"]["cases"]}


@pytest.mark.parametrize("name", [case.name for case in sample_calls.CASES])
def test_a_call_hits_and_is_what_eager_gives(calls: dict[str, dict[str, Any]], name: str) -> None:
    case = calls[name]
    assert (case["declared"], case["run"], case["hits"], case["events"]) == (3, 3, 3, {})
    assert case["distance"] is not None and case["distance"] < 1e-5


@pytest.mark.parametrize("name", ["mark_dynamic", "maybe_mark_dynamic", "mark_unbacked"])
def test_one_graph_serves_all_sizes_that_the_program_marks(bundle: dict[str, Any], name: str) -> None:
    graphs = [graph for graph in whole(read_bundle(bundle["path"])).graphs if name in graph.reached]
    assert len(graphs) == 1


def test_models_of_transformers_hit(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    bundle = built(tmp_path, "sample_hf:recipe")
    found = {case["name"]: (case["hits"], case["events"]) for case in bundle["rehearsal"]["cases"]}
    families = "qwen3 llama gemma3 qwen3_moe mamba2 vit bert whisper qwen3-decode llama-decode gemma3-decode".split()
    assert found == dict.fromkeys(families, (4, {}))
    assert all(case["distance"] < 1e-5 for case in bundle["rehearsal"]["cases"])


def test_tensors_of_other_types_hit(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    bundle = built(tmp_path, "sample_subclasses:recipe")
    found = {case["name"]: (case["hits"], case["events"]) for case in bundle["rehearsal"]["cases"]}
    assert found == {"int8_weights": (5, {}), "static_dtensors": (2, {})}
    assert all(case["distance"] < 1e-5 for case in bundle["rehearsal"]["cases"])
    assert "torch._inductor.config.coordinate_descent_tuning" in bundle["sets"]["int8_weights"], "it is said"


def test_what_torch_cannot_write_down_is_named(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    run = aot_cache(tmp_path, *"build --model sample_subclasses:dynamic --target cpu --store store --json".split())
    assert run.returncode == 4
    (failure,) = json.loads(run.stdout)["bundles"][0]["failed"]
    assert failure["kernel"] == "sample_subclasses:product"
    assert "WeakValueDictionary" in failure["error"] and "declare those sizes with Values" in failure["error"]


# --- a builder that is wrong on purpose ---------------------------------------------------------------------------------

BROKEN = """
import os

import torch
from aot_cache import Call, Range, Recipe, declare, device

if os.environ.get("BREAK") and "aot_cache.upstream.codec.guard_facts" in __import__("sys").modules:
    from aot_cache.upstream.codec import guard_facts
    guard_facts.type_in_serving = type  # what the builder's own tensors are

@torch.compile
def doubled(x):
    return x * 2

recipe = Recipe("broken", [declare(name="doubled", n=Range(2, 4), mode="inference")(
    lambda n: Call(doubled, torch.ones(n, 4, device=device())))])
"""
BUILD = "build --model broken:recipe --target cpu --store store --out b.safetensors --json".split()
UNSEEN = (
    "import sys; from aot_cache.artifact import scan; from aot_cache.cli.main import main; "
    "scan.findings = lambda *_: []; sys.argv[1:1] = {}; main()"
)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    (tmp_path / "broken.py").write_text(BROKEN)
    return tmp_path


def test_a_guard_on_a_type_of_the_builder_fails_the_build(broken: Path) -> None:
    run = aot_cache(broken, *BUILD, BREAK="1")
    assert run.returncode == 4
    (failure,) = json.loads(run.stdout)["bundles"][0]["failed"]
    assert failure["kernel"] == "broken:doubled"
    assert (
        "guard TENSOR_MATCH on L['x'] compares with class torch._subclasses.fake_tensor:FakeTensor" in failure["error"]
    )


def test_a_guard_on_a_type_of_the_builder_fails_the_rehearsal(broken: Path) -> None:
    """The same bundle, had nobody scanned it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (broken, ROOT))), "BREAK": "1"}
    script = UNSEEN.format([*BUILD, "--no-rehearse"])
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=broken, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run = aot_cache(broken, "rehearse", "b.safetensors", "--json")
    assert run.returncode == 5
    (case,) = json.loads(run.stdout)["cases"]
    assert (case["hits"], case["passed"]) == (0, False)
    missed = [miss for point in case["points"] for miss in point["misses"]]
    assert {miss["name"] for miss in missed} == {"broken:doubled"}
    assert all("L['x'] was class torch._subclasses.fake_tensor:FakeTensor" in miss["why"] for miss in missed)
