"""What can miss inside a capture, one case each: for `check_guard.py`, `bench_guard.py` and the recipe of its loop.

Each case has a call of something that this process has never called, what the same is in eager, and what the guard must
count for it: `fallback` where nothing is compiled, `unsafe` where a Triton kernel without a twin compiles after all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

import aot_cache

Tensor = torch.Tensor
SIZE = 4096


@torch.compile
def compiled(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * 3 + x.mean()


@torch.compile(fullgraph=True)
def fullgraph(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x) * 5 + x.amax()


@torch.compiler.disable
def pause() -> None:
    """A graph break."""


@torch.compile
def parted(x: Tensor, drafts: bool) -> Tensor:
    """Two frames: the rest after the graph break is another one for drafts."""
    y = x * 2
    pause()
    return y.tanh() + 1 if drafts else y.relu()


@torch.compile
def inner(x: Tensor) -> Tensor:
    return x.sigmoid() * 7 - x


@torch.library.custom_op("guard_cases::opaque", mutates_args=())
def opaque(x: Tensor) -> Tensor:
    return inner(x)


@opaque.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.compile
def late(x: Tensor) -> Tensor:
    return x.cos() * 2 + 1


@torch.library.custom_op("guard_cases::other_in_capture", mutates_args=())
def other_in_capture(x: Tensor) -> Tensor:
    """Takes another way where a graph is captured than where it is warmed up: what seeds of this project are about."""
    return late(x) if torch.cuda.is_current_stream_capturing() else x.cos() * 2 + 1


@other_in_capture.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.compile(mode="reduce-overhead")
def in_trees(x: Tensor) -> Tensor:
    return other_in_capture(x * 2) + 1


@triton.jit
def scale_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * 2.5, mask=at < n)


def scale(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    scale_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256)
    return out


@triton.jit
def drafts_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) + 0.5, mask=at < n)


@triton.jit
def twin_kernel(x, out, n, factor, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)


@aot_cache.fallback(twin_kernel)
def twin(x: Tensor, out: Tensor, factor: float) -> None:
    torch.mul(x, factor, out=out)


def with_twin(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    twin_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), 1.5, BLOCK=256)
    return out


@triton.autotune([triton.Config({"BLOCK": block}) for block in (64, 128, 256)], key=["n"], reset_to_zero=["out"])
@triton.jit
def add_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(out + at, tl.load(x + at, mask=at < n), mask=at < n)


def add(x: Tensor) -> Tensor:
    """Adds to what is there: a reset that measuring makes, recorded into a graph, would be seen."""
    out = torch.ones_like(x)
    add_kernel[lambda meta: (triton.cdiv(x.numel(), meta["BLOCK"]),)](x, out, x.numel())
    return out


def step(x: Tensor, drafts: bool) -> Tensor:
    """A model's step, target and draft: with drafts it launches what a warm-up without them has never seen."""
    if not drafts:
        return x * 3
    out = torch.empty_like(x)
    drafts_kernel[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256)
    return late(out)


@dataclass(frozen=True)
class Case:
    """One thing that misses.

    Args:
        call, eager: what is captured, and the same without a compiler.
        counts: what the guard counts for its first call inside a capture.
        compiles: whether Triton compiles there.
        warm: what was called before the capture.
        measuring: what upstream itself gives where it measures; the same as `eager` by default.
    """

    call: Callable[[Tensor], Tensor]
    eager: Callable[[Tensor], Tensor]
    counts: dict[str, int]
    compiles: bool = False
    warm: Callable[[Tensor], Any] | None = None
    measuring: Callable[[Tensor], Tensor] | None = None


def _silu(x: Tensor) -> Tensor:
    return torch.nn.functional.silu(x) * 3 + x.mean()


def _gelu(x: Tensor) -> Tensor:
    return torch.nn.functional.gelu(x) * 5 + x.amax()


FALLBACK = {"fallback": 1}
CASES = {
    "compiled": Case(compiled, _silu, FALLBACK),
    "fullgraph": Case(fullgraph, _gelu, FALLBACK),
    "inside a custom op": Case(opaque, lambda x: x.sigmoid() * 7 - x, FALLBACK),
    "rest after a graph break": Case(
        lambda x: parted(x, True), lambda x: (x * 2).tanh() + 1, FALLBACK, warm=lambda x: parted(x, False)
    ),
    "kernel": Case(scale, lambda x: x * 2.5, {"unsafe": 1}, True),
    "autotuned kernel": Case(
        add,
        lambda x: x + 1,
        {"fallback": 1, "unsafe": 1},
        True,
        measuring=lambda x: x,  # upstream resets the tensor, and does not put back what was in it
    ),
    "kernel with a twin": Case(with_twin, lambda x: x * 1.5, FALLBACK),
    "drafts only in the capture": Case(
        lambda x: step(x, True),
        lambda x: (x + 0.5).cos() * 2 + 1,
        {"fallback": 1, "unsafe": 1},
        True,
        warm=lambda x: step(x, False),
    ),
}
