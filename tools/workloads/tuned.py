"""Compiled functions whose kernels Inductor tries several configs of: by its own defaults, and a user's autotuned kernel."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from aot_cache import Call, Range, Recipe, declare, device

WIDTH = 2048


@triton.autotune(
    [triton.Config({"B": 128}), triton.Config({"B": 1024}), triton.Config({"B": 1024}, num_warps=8)], key=[]
)
@triton.jit
def scale(x, y, n, B: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, tl.load(x + at, at < n) * 2 + 1, at < n)


@torch.compile
def transposed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return (x.t() + y).relu()


@torch.compile
def with_a_kernel(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    scale[lambda meta: (triton.cdiv(x.numel(), meta["B"]),)](x, y, x.numel())
    return y.relu() + 2


@torch.compile
def norm(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype)


def case_of(function: Any, inputs: Any) -> Any:
    case = declare(name=function.__name__, n=Range(2, 1024), hint={"n": 1024})
    return case(lambda n: Call(function, *inputs(n)))


def rows(n: int) -> tuple[torch.Tensor]:
    return (torch.randn(n, WIDTH, device=device(), dtype=torch.bfloat16),)


def both(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (*rows(n), torch.randn(WIDTH, n, device=device(), dtype=torch.bfloat16))


recipe = Recipe("tuned", [case_of(transposed, both), case_of(with_a_kernel, rows), case_of(norm, rows)])
