"""A missed kernel on a machine without a C compiler: served, with the same result."""

from __future__ import annotations

from pathlib import Path

from on_gpu import served

MODULE = """
import torch, triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, declare, device

@triton.jit
def scale(x, y, n, factor, pair, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at, at < n) * factor + pair[0], at < n)

def step(n, here, factor=2.0, pair=(3, 4)):
    x, y = torch.arange(n, device=here, dtype=torch.float32), torch.empty(n, device=here)
    scale[(triton.cdiv(n, 64),)](x, y, n, factor, pair, B=64)
    return y

@declare(n=Range(2, 64))
def steps(n):
    return Call(step, n, device())

recipe = Recipe("missing", [steps])
"""

SERVE = """
import json
import aot_cache.auto
import torch, missing
torch.zeros(1, device="cuda")
aot_cache.ready(strict=True)
aot_cache.seal()
built = missing.step(50, "cuda")
missed = missing.step(50, "cuda", 2, (0.5, 4))  # integers and a float instead: another signature
wanted = torch.arange(50, dtype=torch.float32) * 2
print(json.dumps([float((built.cpu() - wanted - 3).norm()), float((missed.cpu() - wanted - 0.5).norm()), aot_cache.stats()]))
"""


def test_a_missed_kernel_is_launched(tmp_path: Path) -> None:
    built_differs, missed_differs, stats = served(tmp_path, "missing", MODULE, SERVE, CC="/bin/false", CXX="/bin/false")
    assert built_differs == 0 and missed_differs == 0
    assert stats["after_seal"]["compile"] == 1
