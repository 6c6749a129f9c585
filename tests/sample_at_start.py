"""Kernels with a constant that a server knows only when its cache is made, and one that is chosen by a tuner."""

import torch
import triton
import triton.language as tl

from aot_cache import Call, Range, Recipe, declare


@triton.jit
def conv(x, n, num_lines: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) + num_lines, mask=at < n)


@triton.autotune([triton.Config({"BLOCK": block}) for block in (16, 32)], key=[])
@triton.jit
def update(x, num_lines: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at) * num_lines)


@triton.jit
def other(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, BLOCK), 1.0)


def step(n: int, lines: int = 384, device: str = "cuda") -> None:
    x = torch.zeros(64, device=device)
    conv[(1,)](x, n, num_lines=lines, BLOCK=64)
    update[(1,)](x, num_lines=lines)
    other[(1,)](x, BLOCK=64)


@declare(n=Range(1, 32))
def steps(n: int) -> Call:
    return Call(step, n)


recipe = Recipe("at-start", [steps])
