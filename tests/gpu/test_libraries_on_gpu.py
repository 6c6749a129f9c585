"""What CUDA's libraries need before a capture: with it the first convolution and attention of a process are captured."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from limits import HANGS
from on_gpu import ROOT

CAPTURE = """
import json, sys, torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import conv1d, conv2d, linear, scaled_dot_product_attention

def tensor(dtype, *shape):
    return torch.randn(shape, device="cuda", dtype=dtype)

def attention(q, k):
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return scaled_dot_product_attention(q, k, k)

half, small, single = torch.float16, torch.bfloat16, torch.float32
CASES = {
    "a product": (linear, tensor(half, 4, 8), tensor(half, 16, 8)),
    "a convolution": (conv2d, tensor(half, 2, 8, 20, 20), tensor(half, 16, 8, 3, 3)),
    "one of images": (lambda x, w: conv2d(x, w, stride=2), tensor(single, 1, 3, 64, 64), tensor(single, 8, 3, 7, 7)),
    "one of each channel": (lambda x, w: conv1d(x, w, padding=3, groups=64), tensor(small, 2, 64, 99), tensor(small, 64, 1, 4)),
    "attention": (attention, tensor(small, 2, 4, 64, 64), tensor(small, 2, 4, 64, 64)),
}
call, *inputs = CASES[sys.argv[1]]
if sys.argv[2] == "ready":
    import aot_cache
    aot_cache.arm("fallback")
    aot_cache.ready()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
try:
    with torch.cuda.graph(graph):
        captured = call(*inputs)
    graph.replay()
    wanted = call(*inputs)
    print(json.dumps(float((captured - wanted).norm() / wanted.norm())))
except RuntimeError as error:
    print(json.dumps(f"failed: {error}"[:200]))
"""


def captured(case: str, how: str) -> float | str:
    command = [sys.executable, "-c", CAPTURE, case, how]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=HANGS)
    assert done.stdout, done.stderr[-2000:]
    found: float | str = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("case", ["a product", "a convolution", "one of images", "one of each channel", "attention"])
def test_the_first_one_of_a_process_is_captured(case: str) -> None:
    assert captured(case, "ready") == pytest.approx(0, abs=1e-3)


def test_without_it_a_convolution_breaks_the_capture() -> None:
    assert str(captured("a convolution", "as it is")).startswith("failed: ")
