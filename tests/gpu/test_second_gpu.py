"""A rank that uses `cuda:1`, with graphs that were built for `cuda:0`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HANGS

from aot_cache.builder.pipeline import Request, build

TESTS = Path(__file__).resolve().parents[1]

MODULE = """
import torch, triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, declare, device

@triton.jit
def scale(x, y, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at, at < n) * 2, at < n)

@torch.compile
def step(x, w, at):
    y = torch.softmax(x @ w, -1)
    z = torch.empty_like(y)
    scale[(triton.cdiv(y.numel(), 64),)](y, z, y.numel(), B=64)
    places = torch.arange(x.shape[0], device=x.device) + at
    ordered = (torch.full((3,), 2.0, device=x.device) * z[0, :3]).sort()[0]
    return z.cumsum(-1), places, ordered

def arguments(n, here):
    return torch.randn(n, 64, device=here), torch.randn(64, 64, device=here), torch.zeros(n, dtype=torch.int64, device=here)

@declare(n=Range(2, 64))
def steps(n):
    return Call(step, *arguments(n, device()))

recipe = Recipe("second", [steps])
"""

SERVE = """
import json, sys
import aot_cache.auto
import torch
torch.cuda.set_device(1)
import second
aot_cache.ready(strict=True)
aot_cache.seal()
from torch._dynamo.utils import counters
distances = []
for n in (2, 3, 16, 64):
    given = second.arguments(n, "cuda:1")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():  # the first call: nothing may be loaded in it
        made = second.step(*given)
    graph.replay()
    with torch.compiler.set_stance("force_eager"):
        wanted = second.step(*given)
    torch.cuda.synchronize()
    assert all(tensor.device == torch.device("cuda:1") for tensor in made)
    distances += [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in zip(made, wanted)]
print(json.dumps({
    "stats": aot_cache.stats(), "frames": counters["stats"]["unique_graphs"], "distance": max(distances),
    "on the first": torch.cuda.memory_allocated(0),
}))
"""


def test_graphs_run_on_the_second_gpu(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    from aot_cache.runtime.host_gpu import native

    (tmp_path / "second.py").write_text(MODULE)
    paths = os.pathsep.join([str(tmp_path), str(TESTS.parent), os.environ.get("PYTHONPATH", "")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", paths)
        built = build(Request(target=native()[0], store=tmp_path / "store", model="second:recipe"))
    assert built.failed == []
    caches = {"TRITON_CACHE_DIR": f"{tmp_path}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{tmp_path}/inductor"}
    given = {"PYTHONPATH": paths, "AOT_CACHE": str(built.path), "AOT_CACHE_POLICY": "error", **caches}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SERVE],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["frames"] == 0 and found["stats"]["total"]["graph"] > 0
    assert not any(found["stats"]["after_seal"][kind] for kind in ("compile", "module_load", "frame", "graph_compile"))
    assert found["distance"] < 1e-5 and found["on the first"] == 0
