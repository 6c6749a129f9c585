"""A net of twelve gated MLPs, bfloat16, 1024 wide: what `bench_cold_start.py` builds and serves. Needs torch alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

from aot_cache import Call, Range, Recipe, declare, device

MOST = 512


class GatedMLP(torch.nn.Module):
    """A norm and a gated MLP, with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(width)
        self.gate, self.up = (torch.nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


class Net(torch.nn.Module):
    """Twelve gated MLPs."""

    def __init__(self, width: int = 1024, depth: int = 12) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(GatedMLP(width) for _ in range(depth))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def with_weights(module: torch.nn.Module) -> torch.nn.Module:
    """`module` with normal weights in bfloat16 on the device."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            values = torch.randn(weight.shape, dtype=torch.bfloat16, device=device()) * 0.02
            setattr(part, name, torch.nn.Parameter(values, requires_grad=False))
    return module.eval()


def make() -> torch.nn.Module:
    """The net, not compiled."""
    with torch.device("meta"):
        net = Net()
    return with_weights(net)


@cache
def compiled() -> Any:
    """The net as the benchmark's server has it."""
    return torch.compile(make(), dynamic=True)


@declare(batch=Range(1, MOST), mode="no_grad")
def step(batch: int) -> Call:
    return Call(compiled(), torch.randn(batch, 1024, dtype=torch.bfloat16, device=device()))


recipe = Recipe("net", [step])
