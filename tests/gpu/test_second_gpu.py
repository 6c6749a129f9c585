"""A rank that uses `cuda:1`, with graphs that were built for `cuda:0`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from on_gpu import served
from two_gpus import MODULE

STEP = """
@torch.compile
def step(x, w, at):
    z, places, ordered = body(x, w, at)
    return z.cumsum(-1), places, ordered
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
    found = served(tmp_path, "second", MODULE + STEP, SERVE, AOT_CACHE_POLICY="error")
    assert found["frames"] == 0 and found["stats"]["total"]["graph"] > 0
    assert not any(found["stats"]["after_seal"][kind] for kind in ("compile", "module_load", "frame", "graph_compile"))
    assert found["distance"] < 1e-5 and found["on the first"] == 0
