"""What the tests of rehearsals build: cases that hit, and cases whose host code does as the environment says."""

from __future__ import annotations

import os
import signal
import time
from functools import cache

import torch

from aot_cache import Call, Range, Recipe, declare, device

WIDTH = 8
N = Range(2, 5)


def factor() -> int:
    return 2


if os.environ.get("SAMPLE_DIE") == "at once":
    os._exit(7)
if os.environ.get("SAMPLE_BREAK"):  # only while it is built: what is compiled is not what is written
    from torch._inductor.decomposition import decompositions

    decompositions[torch.ops.aten.silu.default] = lambda x: x * 0.25


@torch.compile
def doubled(x: torch.Tensor) -> torch.Tensor:
    return x * factor() + 1


@torch.compile
def activated(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) * 3


class Counter(torch.nn.Module):
    """A model with a state that each call changes, made once and kept."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(WIDTH, device=device()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.state += x.sum(0)
        return x + self.state


@cache
def counter() -> Counter:
    made = Counter()
    made.compile()
    return made


def _rows(n: int) -> torch.Tensor:
    return torch.empty(n, WIDTH, device=device())


@declare(n=N)
def good(n: int) -> Call:
    return Call(doubled, _rows(n))


@declare(n=N)
def kept(n: int) -> Call:
    return Call(counter(), _rows(n))


@declare(n=N)
def wrong(n: int) -> Call:
    return Call(activated, _rows(n))


def _host(x: torch.Tensor) -> torch.Tensor:
    """Host code that goes wrong where the environment names a size."""
    if os.environ.get("SAMPLE_DIE") == str(len(x)):
        os.kill(os.getpid(), signal.SIGSEGV)
    if os.environ.get("SAMPLE_SLEEP") == str(len(x)):
        time.sleep(600)
    if os.environ.get("SAMPLE_RAISE") == str(len(x)):
        raise ValueError("only where no GPU is")
    found: torch.Tensor = doubled(x)
    return found


@declare(n=N)
def odd(n: int) -> Call:
    if os.environ.get("SAMPLE_NOT_MADE") == str(n):
        raise KeyError("no such weight")
    return Call(_host, _rows(n))


recipe = Recipe("rehearsed", [good, kept, wrong, odd])
