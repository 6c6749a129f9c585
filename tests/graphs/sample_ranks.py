"""A recipe of a job with several ranks: what asks for its rank, what keeps it, and what is the same for all."""

from __future__ import annotations

import torch
import torch.distributed as dist

import aot_cache
from aot_cache import Call, Range, Recipe, declare

Tensor = torch.Tensor


@torch.compile
def alike(x: Tensor) -> Tensor:
    return x.sin() + 1


def offset() -> int:
    return dist.get_rank() * 100 if dist.is_initialized() else 0


@torch.compile
def asking(x: Tensor) -> Tensor:
    return x * 2 + offset()


class Shard(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rank = dist.get_rank()

    def forward(self, x: Tensor) -> Tensor:
        return x * 3 + self.rank


@torch.compile
def of_the_last(x: Tensor) -> Tensor:
    """The same on all ranks but one, which is not among the first two."""
    return x - 7 if dist.get_rank() == 2 else x + 0.5


def run(x: Tensor) -> Tensor:
    return torch.compile(Shard())(asking(of_the_last(alike(x))))


@declare(n=Range(2, 4), mode="inference")
def step(n: int) -> Call:
    return Call(run, torch.randn(n, 8, device=aot_cache.device()))


recipe = Recipe("ranks", [step])


def failing(x: Tensor) -> Tensor:
    if dist.get_rank() == 2:
        raise RuntimeError("the last stage has no such layer")
    return alike(x)


@declare(n=Range(2, 4), mode="inference")
def late(n: int) -> Call:
    return Call(failing, torch.randn(n, 8, device=aot_cache.device()))


broken = Recipe("broken", [late])


# --- a layer that two ranks share ---------------------------------------------------------------------------------------


@torch.library.custom_op("sample_ranks::summed", mutates_args=())
def summed(x: Tensor) -> Tensor:
    out = x.clone()
    dist.all_reduce(out)
    return out


@summed.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.compile
def half(x: Tensor) -> Tensor:
    return torch.ops.sample_ranks.summed(x.cos()) + 1


@declare(n=Range(2, 4), mode="inference")
def layer(n: int) -> Call:
    return Call(half, torch.randn(n, 8, device=aot_cache.device()))


shared = Recipe("shared", [layer], ranks=2)
