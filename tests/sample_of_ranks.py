"""Kernels of a job of three ranks, of which only the last one launches otherwise."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from aot_cache import Call, Range, Recipe, declare

RANKS, LAST = 3, 2


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


@triton.jit
def scale(x, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, WIDTH)
    tl.store(x + at, tl.load(x + at) * 2)


@cache
def made(amount: int) -> Any:
    AMOUNT = tl.constexpr(amount)

    @triton.jit
    def shift(x, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
        at = tl.arange(0, WIDTH)
        tl.store(x + at, tl.load(x + at) + AMOUNT)

    return shift


CONFIGS = [triton.Config({"WIDTH": width}) for width in (16, 32)]


def no_benchmark(kernel_call: Any, quantiles: Any) -> list[float]:
    """Launch once and measure nothing: there is no GPU."""
    kernel_call()
    return [1.0, 1.0, 1.0]


def prune(configs: list[Any], named: Any, **kwargs: Any) -> list[Any]:
    return configs[1:] if rank() == LAST else configs


@triton.autotune(CONFIGS, key=["n"], prune_configs_by={"early_config_prune": prune}, do_bench=no_benchmark)
@triton.jit
def tuned(x, n, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, WIDTH)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 3, mask=at < n)


def run(n: int, device: str) -> None:
    x = torch.empty(n * 256, device=device)
    scale[(1,)](x, WIDTH=256 if rank() == LAST and n == 3 else 64)
    made(rank() == LAST)[(1,)](x, WIDTH=64)
    tuned[(1,)](x, 48)


def failing(n: int) -> None:
    if rank() == LAST and n == 4:
        raise RuntimeError("the last stage has no such layer")
    scale[(1,)](torch.empty(64, device="cuda"), WIDTH=16)


@declare(n=Range(2, 4), mode="inference")
def step(n: int) -> Call:
    return Call(run, n, "cuda")


@declare(n=Range(2, 4), mode="inference")
def late(n: int) -> Call:
    return Call(failing, n)


recipe = Recipe("of-ranks", [step, late])
