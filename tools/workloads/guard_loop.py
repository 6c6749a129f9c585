"""A recipe that declares too little, on purpose: `check_guard.py` serves more than it has, and builds again from the misses."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

import aot_cache
from aot_cache import Call, Range, Recipe, declare

Tensor = torch.Tensor
DECLARED, SERVED, WIDTH = 8, 16, 256


@triton.jit
def rows_kernel(x, out, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(out + at, tl.load(x + at) * width)


@triton.autotune([triton.Config({"BLOCK": block}) for block in (128, 256)], key=["n"])
@triton.jit
def shift_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) + 1, mask=at < n)


@torch.compile
def gated(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * weight + x.mean(-1, keepdim=True)


def step(x: Tensor, weight: Tensor) -> Tensor:
    """Host code: a compiled function, a kernel whose constexpr follows from the number of rows, a tuned kernel."""
    y = gated(x, weight)
    rows = triton.next_power_of_2(x.shape[0])
    padded = torch.nn.functional.pad(y, (0, 0, 0, rows - x.shape[0]))
    scaled = torch.empty_like(padded)
    rows_kernel[(1,)](padded, scaled, WIDTH, ROWS=rows, WIDTH=WIDTH)
    out = torch.empty_like(y)
    shift_kernel[lambda meta: (triton.cdiv(y.numel(), meta["BLOCK"]),)](scaled, out, y.numel())
    return out


def in_eager(x: Tensor, weight: Tensor) -> Tensor:
    return (torch.nn.functional.silu(x) * weight + x.mean(-1, keepdim=True)) * WIDTH + 1


@cache
def weight() -> Tensor:
    return torch.randn(WIDTH, device=aot_cache.device())


@declare(tokens=Range(1, DECLARED), mode="inference")
def decode(tokens: int) -> Call:
    return Call(step, torch.randn(tokens, WIDTH, device=aot_cache.device()), weight())


recipe = Recipe("guard-loop", [decode])
