"""What the tests build for ROCm: a reduction, a pointwise function of the libraries' mathematics, and products beside them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from aot_cache import Call, Range, Recipe, declare, device

WIDTH = 256
ROWS = Range(1, 16)


@torch.compile
def normed(x: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@torch.compile
def curved(x: torch.Tensor) -> torch.Tensor:
    return torch.erf(x) + F.gelu(x, approximate="tanh") * torch.tanh(x)


@torch.compile
def gated(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(x @ gate) * (x @ up)


def _tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.bfloat16, device=device())


@declare(n=ROWS)
def norm(n: int) -> Call:
    return Call(normed, _tensor(n, WIDTH))


@declare(n=ROWS)
def curve(n: int) -> Call:
    return Call(curved, _tensor(n, WIDTH))


@declare(n=ROWS)
def gate(n: int) -> Call:
    return Call(gated, _tensor(n, WIDTH), _tensor(WIDTH, WIDTH), _tensor(WIDTH, WIDTH))


recipe = Recipe("rocm-graphs", [norm, curve, gate])
