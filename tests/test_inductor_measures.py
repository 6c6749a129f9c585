"""What Inductor decides by measuring, where it compiles or where a graph is loaded: a build decides without, and loading compiles
nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from one_module import ROOT, built_for_h200

from aot_cache.artifact import manifest
from aot_cache.builder.pipeline import Built
from aot_cache.store import read_bundle

MODULE = """
import torch
from aot_cache import Call, Recipe, Values, declare, device

@torch.compile
def product(x, w): return (x @ w).relu()

@torch.compile
def summed(x): return (x.float() * 2).exp().sum(-1)

def of(*shape): return torch.ones(*shape, device=device(), dtype=torch.bfloat16)

recipe = Recipe("measures", [
    declare(name="product", n=Values(2048))(lambda n: Call(product, of(n, n - 1), of(n - 1, n))),
    declare(name="summed", n=Values(8192))(lambda n: Call(summed, of(n, 65536))),
])
"""

# Loads the artifact of one function on a device whose kernels take all registers there are: then a reduction's blocks do not
# fill it, and upstream would compile a smaller one.
LOAD = """
import json, sys
import torch
from torch._dynamo import device_interface
from torch._inductor.runtime import static_triton_launcher, triton_helpers, triton_heuristics
from aot_cache.store import read_bundle
from aot_cache.upstream.hooks import inductor_artifact, inductor_tuning

triton_helpers.set_driver_to_gpu = lambda: None
if not hasattr(torch._C, '_cuda_getCurrentRawStream'):  # a build of torch without CUDA
    torch._C._cuda_getCurrentRawStream = None
def load_kernel(self, device):
    self.function, self.n_regs, self.n_spills = 1, 255, 0
static_triton_launcher.StaticallyLaunchedTritonKernel.load_kernel = load_kernel
guard = device_interface.DeviceGuard
guard.__enter__, guard.__exit__ = lambda self: None, lambda self, *error: None
compiled = []
tuner = triton_heuristics.CachingAutotuner
def compile_config(self, config, *args, **kwargs):
    compiled.append(str(config))
    raise RuntimeError("compiled where it is loaded")
tuner._precompile_config = compile_config
asked = []
if sys.argv[3] == "as upstream":
    before = inductor_tuning.TritonBundler.__dict__["load_autotuners"]
    def again(cls, entries):
        for entry in entries or ():
            entry.kernel.inductor_meta = {**entry.kernel.inductor_meta, "dynamic_scale_rblock": True}
        return before.__func__(cls, entries)
    inductor_tuning.TritonBundler.load_autotuners = classmethod(again)
try:
    with inductor_tuning.choosing({}):
        inductor_artifact.load_graph(read_bundle(sys.argv[1]).object(sys.argv[2]))
except RuntimeError as error:
    assert "compiled where it is loaded" in str(error), error
print(json.dumps(compiled))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return built_for_h200(tmp_path_factory.mktemp("measures"), "what_is_measured", MODULE)


def test_a_product_whose_sizes_are_not_aligned_is_built(built: Built) -> None:
    """Inductor measures whether padding makes it faster, on the GPU that it compiles for; there is none."""
    assert built.failed == [] and built.graphs == 2


def compiled_while_loading(built: Built, how: str) -> list[str]:
    graphs = {graph["function"]: graph for graph in manifest.whole(read_bundle(built.path)).to_json()["graphs"]}
    (digest,) = graphs["summed"]["graphs"].values()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", LOAD, str(built.path), digest, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[str] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_reduction_that_fills_the_gpu_badly_is_not_compiled_again(built: Built) -> None:
    assert compiled_while_loading(built, "as upstream"), "upstream would compile nothing: this test shows nothing"
    assert compiled_while_loading(built, "as served") == []
