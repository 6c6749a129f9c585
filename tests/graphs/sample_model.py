"""A small model with one of each thing that torch.compile is put around. The tests copy it: it knows no path of its own."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

WIDTH = 16
SHIFT = 0.5


def helper(x: torch.Tensor, factor: float = 3.0) -> torch.Tensor:
    """Inlined into what calls it."""
    return x * factor + SHIFT


@torch.compile
def decorated(x: torch.Tensor) -> torch.Tensor:
    return helper(F.silu(x))


@torch.compile
def nested(x: torch.Tensor) -> torch.Tensor:
    return F.silu(x) * 2


@torch.library.custom_op("sample_graphs::opaque", mutates_args=())
def opaque(x: torch.Tensor) -> torch.Tensor:
    return nested(x)


@opaque.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def broken(x: torch.Tensor) -> torch.Tensor:
    y = x.sin() + 1
    torch._dynamo.graph_break()
    z = torch.ops.sample_graphs.opaque(y)
    return z.cos() * y


def scaled(x: torch.Tensor, n: int) -> torch.Tensor:
    return x * n + x.shape[0]


def tiled(x: torch.Tensor) -> torch.Tensor:
    return torch.softmax(x, -1) * x.shape[0]


def weighted(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.tanh(x * weight).sum()


def pushed(cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Writes to an argument."""
    cache.add_(x)
    return x * 2


def elsewhere(x: torch.Tensor) -> torch.Tensor:
    """Compiled by a backend that is not Inductor."""
    return x * 5


class Norm(nn.Module):
    """Parameters, a buffer, a submodule, a class attribute, and a number that tells one layer from another."""

    scale = 1.25

    def __init__(self, layer: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("offset", torch.full((WIDTH,), 0.25))
        self.layer = layer

    def bend(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x) * self.scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return helper(self.bend(self.linear(x)) * self.gain + self.offset)


class Step:
    """No module: its method is compiled."""

    def __init__(self) -> None:
        self.table = torch.linspace(0, 1, WIDTH)

    def run(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.table).exp()


compiled_broken = torch.compile(broken)
compiled_scaled = torch.compile(scaled)
compiled_tiled = torch.compile(tiled)
compiled_weighted = torch.compile(weighted)
compiled_pushed = torch.compile(pushed)
compiled_elsewhere = torch.compile(elsewhere, backend="eager")
