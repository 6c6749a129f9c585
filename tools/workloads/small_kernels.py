"""Two small recipes of one Triton kernel each, which build in seconds for any target."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aot_cache import Call, Range, Recipe, declare, device


@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def run_scale(n: int, block: int) -> None:
    x = torch.empty(n, device=device())
    scale[(triton.cdiv(n, block),)](x, torch.empty_like(x), n, BLOCK=block, num_warps=1)


def of_block(name: str, block: int) -> Recipe:
    @declare(name="scale", n=Range(15, 17))
    def case(n: int) -> Call:
        return Call(run_scale, n, block)

    return Recipe(name, [case])


small, large = of_block("small", 32), of_block("large", 64)
