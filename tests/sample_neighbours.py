"""Kernels whose integers come in all classes that Triton compiles for."""

import torch
import triton
import triton.language as tl

from aot_cache import Call, Range, Recipe, declare


@triton.jit
def plain(x, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, BLOCK), n)


@triton.jit
def typed(x, n: tl.int64, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, BLOCK), n)


@triton.jit(do_not_specialize_on_alignment=["n"])
def unaligned(x, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, BLOCK), n)


@triton.jit
def not_of_one(x, n, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.static_assert(n is not None and n.type == tl.int32)
    tl.store(x + tl.arange(0, BLOCK), n)


@triton.jit
def sized(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x + tl.arange(0, BLOCK), 1.0)


def step(n: int, device: str = "cuda") -> None:
    x = torch.zeros(64, device=device)
    for kernel in (plain, typed, unaligned):
        kernel[(1,)](x, n, BLOCK=64)
    if n != 1:
        not_of_one[(1,)](x, n, BLOCK=64)
    sized[(1,)](x, BLOCK=1 if n == 1 else 16 if n % 16 == 0 else 32)


@declare(n=Range(1, 48))
def steps(n: int) -> Call:
    return Call(step, n)


recipe = Recipe("neighbours", [steps])
