"""Graphs on a GPU with another number than the one that they were built for."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from on_gpu import ROOT, served
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
HERE = "cuda:NUMBER"
torch.cuda.set_device(HERE)
import second
aot_cache.ready(strict=True)
aot_cache.seal()
from torch._dynamo.utils import counters
from aot_cache.upstream.codec import gpu_number
distances = []
for n in (2, 3, 16, 64):
    given = second.arguments(n, HERE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.inference_mode():  # the first call: nothing may be loaded in it
        made = second.step(*given)
    graph.replay()
    with torch.compiler.set_stance("force_eager"):
        wanted = second.step(*given)
    torch.cuda.synchronize()
    assert all(tensor.device == torch.device(HERE) for tensor in made)
    distances += [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in zip(made, wanted)]
print(json.dumps({
    "stats": aot_cache.stats(), "frames": counters["stats"]["unique_graphs"], "distance": max(distances),
    "on the first": torch.cuda.memory_allocated(0), "built for": gpu_number.BUILT_FOR,
}))
"""


def check(folder: Path, number: int) -> Any:
    """Serve on that GPU, under policy `error`."""
    script = SERVE.replace("NUMBER", str(number))
    found = served(folder, "second", MODULE + STEP, script, AOT_CACHE_POLICY="error")
    assert found["frames"] == 0 and found["stats"]["total"]["graph"] > 0
    assert not any(found["stats"]["after_seal"][kind] for kind in ("compile", "module_load", "frame", "graph_compile"))
    assert found["distance"] < 1e-5
    return found


def test_graphs_run_on_the_second_gpu(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    found = check(tmp_path, 1)
    assert found["built for"] == 0 and found["on the first"] == 0


def test_graphs_of_the_second_gpu_run_on_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One GPU is enough to see graphs moved: they are built by a copy of the package whose virtual GPU is the second of two."""
    shutil.copytree(ROOT / "aot_cache", tmp_path / "aot_cache", ignore=shutil.ignore_patterns("__pycache__"))
    for file, was, becomes in (
        ("codec/gpu_number.py", "BUILT_FOR = 0", "BUILT_FOR = 1"),
        ("virtual/this_gpu.py", '_device = torch.device("cuda", 0)', '_device = torch.device("cuda", 1)'),
        ("virtual/this_gpu.py", "_count = 1", "_count = 2"),
    ):
        path = tmp_path / "aot_cache" / "upstream" / file
        text = path.read_text()
        assert text.count(was) == 1, file
        path.write_text(text.replace(was, becomes))
    monkeypatch.chdir(tmp_path)  # where Python looks first
    assert check(tmp_path, 0)["built for"] == 1
