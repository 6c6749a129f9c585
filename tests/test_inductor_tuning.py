"""Kernels of Inductor's with several configs, compiled for a GPU that is not there; and Triton kernels inside graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from one_module import ROOT, built_for_h200

from aot_cache.artifact import manifest
from aot_cache.builder.pipeline import Built
from aot_cache.store import Bundle, read_bundle
from aot_cache.tuning import kernels as tuning_kernels

MODULE = """
import torch, triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, declare, device

@triton.jit
def twice(x): return x * 2

@triton.autotune([triton.Config({"B": 128}), triton.Config({"B": 256}), triton.Config({"B": 512}, num_warps=8)], key=[])
@triton.jit
def scale(x, y, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, twice(tl.load(x + at, at < n)), at < n)

@torch.compile
def launches(x):
    y = torch.empty_like(x)
    scale[lambda meta: (triton.cdiv(x.numel(), meta["B"]),)](x, y, x.numel())
    return y.relu()

@torch.compile
def transposed(x, y): return (x.t() + y).relu()

def rows(n): return torch.ones(n, 1024, device=device())

recipe = Recipe("several", [
    declare(name="launches", n=Range(2, 64))(lambda n: Call(launches, rows(n))),
    declare(name="transposed", n=Range(2, 64))(lambda n: Call(transposed, rows(n), rows(n).t().contiguous())),
])
"""

# Loads the artifact of one function with choices, on a device that only notes what is loaded onto it.
LOAD = """
import json, os, sys
import torch
from torch._dynamo import device_interface
from torch._inductor import codecache
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.runtime import static_triton_launcher, triton_heuristics
from aot_cache.store import read_bundle
from aot_cache.upstream.hooks import inductor_artifact, inductor_tuning

loaded = []
if not hasattr(torch._C, '_cuda_getCurrentRawStream'):  # a build of torch without CUDA
    torch._C._cuda_getCurrentRawStream = None
def load_kernel(self, device):
    self.function, self.n_regs, self.n_spills = 1, 1, 0
    loaded.append(self.hash)
static_triton_launcher.StaticallyLaunchedTritonKernel.load_kernel = load_kernel
guard = device_interface.DeviceGuard
guard.__enter__, guard.__exit__ = lambda self: None, lambda self, *error: None
folder, kept, hashed = inductor_artifact._folder_of(os.getpid()), [], []
whole = codecache.build_code_hash
codecache.build_code_hash = lambda *arguments: (hashed.append(1), whole(*arguments))[1]
facts = []
for digest, choices in json.loads(sys.argv[2]):
    loaded.clear()
    before = {*folder.rglob("*")}
    with inductor_tuning.choosing(choices) as several:
        kept.append(inductor_artifact.load_graph(read_bundle(sys.argv[1]).object(digest)))
    facts.append({
        "configs": {kernel.key: kernel.configs for kernel in several},
        "runs": {kernel.key: [str(r.config) for r in kernel._tuner.compile_results] for kernel in several},
        "files": any(kernel._tuner.inductor_meta["autotune_local_cache"] for kernel in several),
        "loaded": len(loaded), "different": len(set(loaded)),
        "written": sorted(path.suffix for path in {*folder.rglob("*")} - before if path.is_file()),
        "compilers": AsyncCompile.process_pool.cache_info().currsize, "hashed": len(hashed),
    })
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built_for_h200(tmp_path_factory.mktemp("several"), "several_configs", MODULE)


@pytest.fixture(scope="module")
def bundle(built: Built) -> Bundle:
    return read_bundle(built.path)


@pytest.fixture(scope="module")
def graphs(bundle: Bundle) -> dict[str, dict[str, Any]]:
    return {graph["function"]: graph for graph in manifest.whole(bundle).to_json()["graphs"]}


def candidates(graph: dict[str, Any]) -> dict[str, Any]:
    (found,) = graph["candidates"].values()
    return dict(found)


def test_a_triton_kernel_inside_a_compiled_function(built: Built, graphs: dict[str, dict[str, Any]]) -> None:
    """With all that its autotuner tries, and named by its source and that of what it calls."""
    assert built.failed == [] and set(graphs) == {"launches", "transposed"}
    tried = {found["kernel"]: found["configs"] for found in candidates(graphs["launches"]).values()}
    (own,) = (configs for name, configs in tried.items() if name.startswith("scale"))
    assert [config.split(",")[0] for config in own] == ["B: 128", "B: 256", "B: 512"]
    names = [name for _, expression, name in graphs["launches"]["identities"] if expression == "G['scale']"]
    assert len(names) == 1 and names[0].startswith("kernel ") and names[0].endswith(" several_configs:scale")


def test_what_inductor_tries_by_default(graphs: dict[str, dict[str, Any]]) -> None:
    (found,) = candidates(graphs["transposed"]).values()
    assert len(found["configs"]) > 1 and len(set(found["configs"])) == len(found["configs"])
    assert graphs["transposed"]["choices"] == {}


def test_one_config_is_loaded_or_the_chosen_one_or_all(built: Built, graphs: dict[str, dict[str, Any]]) -> None:
    (digest,) = graphs["transposed"]["graphs"].values()
    ((key, found),) = candidates(graphs["transposed"]).items()
    asked: list[Any] = [[digest, {}], [digest, {key: 2}], [digest, None]]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LOAD, str(built.path), json.dumps(asked)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, third, every = json.loads(done.stdout)
    configs = found["configs"]
    assert first["configs"] == third["configs"] == every["configs"] == {key: configs}
    assert (first["runs"], third["runs"], every["runs"]) == ({key: configs[:1]}, {key: [configs[2]]}, {key: configs})
    assert [facts["loaded"] for facts in (first, third, every)] == [1, 1, len(configs)]
    for number, facts in ((1, first), (1, third), (len(configs), every)):
        assert facts["written"] == [".cubin"] * number + [".py"], "of Triton's files only the binaries that are served"
        assert facts["compilers"] == 0, "compile workers started"
    # Not for `every`: tuning asks upstream's own cache, whose keys have that hash.
    assert (first["hashed"], third["hashed"]) == (0, 0), "torch's sources are hashed, for a key"
    assert every["different"] == len(configs) and not every["files"], (
        "no file tells upstream what was fastest elsewhere"
    )


def test_a_tuned_bundle_keeps_its_graphs(bundle: Bundle) -> None:
    whole = manifest.whole(bundle)
    needed = tuning_kernels._needed(whole)  # what `tune` writes into the new bundle
    assert {digest for graph in whole.graphs for digest in graph.graphs.values()} <= needed
    assert {*needed, bundle.manifest["details"]} == set(bundle.manifest["objects"])
