"""A rehearsal on a real GPU: first calls inside captures, of kernels and of compiled functions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aot_cache.artifact import rehearsed
from aot_cache.builder.pipeline import Request, build
from aot_cache.rehearsal import rehearse
from aot_cache.runtime import host_gpu
from aot_cache.upstream.hooks import torch_capture

ROOT = Path(__file__).resolve().parents[2]

MODULE = """
import torch
import triton
import triton.language as tl

from aot_cache import Call, Range, Recipe, declare

@triton.jit
def scale(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)

@torch.compile
def double(x):
    return torch.nn.functional.gelu(x) * 2

def launched(x):
    scale[(triton.cdiv(x.numel(), 64),)](x, x.numel(), BLOCK=64)
    return x

def rows(n):
    return torch.empty(n, 16, device="cuda")

kernel = declare(name="kernel", n=Range(1, 6))(lambda n: Call(launched, rows(n)))
graph = declare(name="graph", n=Range(2, 6))(lambda n: Call(double, rows(n)))
recipe = Recipe("both", [kernel, graph])
"""


def test_all_of_it_hits_inside_captures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "on_gpu.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    made = build(Request(target=host_gpu.native()[0], store=tmp_path / "store", model="on_gpu:recipe"))
    found = rehearse(made.path, points=None)
    assert found.passed, found.reasons()
    assert found.hits == 11 and all(point.captured for case in found.cases for point in case.points)
    assert not any(case.not_captured for case in found.cases)
    assert rehearsed.add(made.path, found.run()).runs[0].text() == f"proved 11 points on {found.device}"


def test_a_failed_capture_leaves_nothing_behind() -> None:
    """The stream that was current is current again, random numbers can be drawn, and the error is the one that broke it."""
    stream = torch.cuda.current_stream()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capturing"), torch_capture.captured(torch.cuda.CUDAGraph()):
            torch.randn(4, device="cuda").sum().item()
        assert torch.cuda.current_stream() == stream
        assert torch.randn(4, device="cuda").isfinite().all()
    graph = torch.cuda.CUDAGraph()
    with torch_capture.captured(graph):
        drawn = torch.randn(4, device="cuda")
    graph.replay()
    assert drawn.isfinite().all()
