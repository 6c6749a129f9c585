"""Real Triton kernels, one for each way in which a launch is made, the host code around them, and their recipe.

Host code takes the device as an argument, so that the same lines run on the virtual device and, with CPU tensors, in
front of Triton's own binder. All imports of torch and Triton are the module's: import it only where they may be.
"""

from __future__ import annotations

import enum
from collections import namedtuple
from typing import Any

import torch
import triton
import triton.language as tl

from aot_cache import Call, Case, Range, Recipe, Values, declare

DEVICE = "cuda"

# --- a plain kernel ---------------------------------------------------------------------------------------------------


@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def run_scale(n: int, device: str) -> None:
    x = torch.empty(n, device=device)
    scale[(triton.cdiv(n, 64),)](x, torch.empty_like(x), n, BLOCK=64, num_warps=2)


# --- heuristics -------------------------------------------------------------------------------------------------------


@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def scale_even(x, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(x + at, tl.load(x + at) * 2)
    else:
        tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def run_heuristics(n: int, device: str) -> None:
    scale_even[(1,)](torch.empty(n, device=device), n, BLOCK=8)


# --- autotuners -------------------------------------------------------------------------------------------------------


def no_benchmark(kernel_call: Any, quantiles: Any) -> list[float]:
    """Launch once and measure nothing: there is no GPU, and no test is about time."""
    kernel_call()
    return [1.0, 1.0, 1.0]


def fitting_blocks(configs: list[Any], named: dict[str, Any], **rest: Any) -> list[Any]:
    """Blocks larger than the row are never tried; one config is always left."""
    return [c for c in configs if c.kwargs["BLOCK"] <= max(named["width"], 16)]


TUNED_CONFIGS = [
    triton.Config({"BLOCK": 64}, num_warps=4, num_stages=2),
    triton.Config({"BLOCK": 32}, num_warps=2),
    triton.Config({"BLOCK": 16}, num_warps=1),
]


@triton.autotune(
    TUNED_CONFIGS, key=["width"], prune_configs_by={"early_config_prune": fitting_blocks}, do_bench=no_benchmark
)
@triton.jit
def tuned(x, width, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) + width, mask=at < n)


def run_tuned(n: int, device: str) -> None:
    # 17 gives the key 32 and so on: fewer keys than points, as real host code does it.
    tuned[(1,)](torch.empty(n, device=device), triton.next_power_of_2(n), n)


@triton.autotune(
    [triton.Config({"BLOCK": 16}, num_warps=1), triton.Config({"BLOCK": 32}, num_warps=1)],
    key=["n"],
    do_bench=no_benchmark,
)
@triton.heuristics({"EVEN": lambda args: args["n"] % args["BLOCK"] == 0})
@triton.jit
def tuned_even(x, n, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if EVEN:
        tl.store(x + at, tl.load(x + at) * 2)
    else:
        tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def run_tuned_even(n: int, device: str) -> None:
    tuned_even[(1,)](torch.empty(n, device=device), n)


# --- behind torch.ops -------------------------------------------------------------------------------------------------


@torch.library.custom_op("aot_cache_tests::scaled", mutates_args=())
def scaled(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    scale[(1,)](x, y, x.numel(), BLOCK=32, num_warps=1)
    return y


@scaled.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@torch.library.triton_op("aot_cache_tests::scaled_by_triton_op", mutates_args={})
def scaled_by_triton_op(x: torch.Tensor) -> torch.Tensor:
    y = torch.empty_like(x)
    torch.library.wrap_triton(scale)[(1,)](x, y, x.numel(), BLOCK=128, num_warps=1)
    return y


def run_custom_op(n: int, device: str) -> None:
    torch.ops.aot_cache_tests.scaled(torch.empty(n, device=device))


def run_triton_op(n: int, device: str) -> None:
    torch.ops.aot_cache_tests.scaled_by_triton_op(torch.empty(n, device=device))


# --- kinds of arguments -----------------------------------------------------------------------------------------------

Pair = namedtuple("Pair", ["first", "second"])


@triton.jit
def add_tuple(pointers, sizes, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    mask = at < sizes[0] + sizes[1]
    tl.store(pointers[1] + at, tl.load(pointers[0] + at, mask=mask), mask=mask)


def run_tuple(n: int, device: str) -> None:
    x = torch.empty(64, device=device)
    add_tuple[(1,)]((x, torch.empty_like(x)), (n, 1), BLOCK=16)


@triton.jit
def add_named(pointers, sizes, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    mask = at < sizes.first + sizes.second
    tl.store(pointers.second + at, tl.load(pointers.first + at, mask=mask), mask=mask)


def run_named_tuple(n: int, device: str) -> None:
    # A kernel of its own: Triton's key does not tell a named tuple from a plain one.
    x = torch.empty(64, device=device)
    add_named[(1,)](Pair(x, torch.empty_like(x)), Pair(n, 1), BLOCK=16)


@triton.jit
def cast(x, y, n, TO: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n).to(TO), mask=at < n)


def run_dtype(n: int, device: str) -> None:
    x = torch.empty(n, device=device)
    for dtype, to in ((torch.bfloat16, tl.bfloat16), (torch.float16, tl.float16)):
        cast[(1,)](x, torch.empty_like(x, dtype=dtype), n, to, BLOCK=16)


@triton.jit
def double(value):
    return value * 2


@triton.jit
def square(value):
    return value * value


@triton.jit
def apply(x, n, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, FUNCTION(tl.load(x + at, mask=at < n)), mask=at < n)


def run_nested(n: int, device: str) -> None:
    apply[(1,)](torch.empty(n, device=device), n, FUNCTION=double if n % 2 else square, BLOCK=16)


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["x"])
def unspecialized(x, n, m, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, n + m, mask=at < n)


def run_unspecialized(n: int, device: str) -> None:
    unspecialized[(1,)](torch.empty(64, device=device)[n % 2 :], n, n, BLOCK=16)


@triton.jit
def fill(x, value, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), value)


def run_offset(n: int, device: str) -> None:
    """Views: an element of bfloat16 is 2 bytes, so every eighth offset is a multiple of 16."""
    fill[(1,)](torch.empty(256, dtype=torch.bfloat16, device=device)[n:], 7, BLOCK=16)


@triton.jit
def masked(x, mask, bias, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    if bias is not None:
        value += tl.load(bias + at, mask=at < n)
    if mask is not None:
        value = tl.where(tl.load(mask + at, mask=at < n), value, 0.0)
    tl.store(x + at, value, mask=at < n)


def run_optional(n: int, device: str) -> None:
    x = torch.empty(n, device=device)
    mask = torch.empty(n, dtype=torch.bool, device=device) if n % 3 == 0 else None
    masked[(1,)](x, mask, x if n % 2 else None, n, BLOCK=16)


@triton.jit
def knows_its_warps(x, n, num_warps: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, num_warps, mask=at < n)


def run_own_warps(n: int, device: str) -> None:
    knows_its_warps[(1,)](torch.empty(n, device=device), n, num_warps=1 if n < 16 else 8, BLOCK=16)


def run_integers(n: int, device: str) -> None:
    x = torch.empty(64, dtype=torch.int64, device=device)
    for value in (n, 16 * n, n + 2**31, 16 * n + 2**33, -n, 2**63 + n, bool(n % 2), float(n)):
        fill[(1,)](x, value, BLOCK=16)


class Mode(enum.IntEnum):
    ONE = 1
    TWO = 2


def run_enum(n: int, device: str) -> None:
    fill[(1,)](torch.empty(64, device=device), n, BLOCK=Block.SMALL if n % 2 else Block.LARGE)


class Block(enum.IntEnum):
    SMALL = 16
    LARGE = 32


def block_of(number: int) -> int:
    """Two blocks, by whether the number is odd."""
    return 16 + 16 * (number % 2)


# --- kernels that are made inside functions ---------------------------------------------------------------------------


def make_kernel() -> Any:
    @triton.jit
    def made(x, n, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(x + at, 3.0, mask=at < n)

    return made


def make_adder(amount: int) -> Any:
    """Kernels of one name, told apart by what their source sees around it."""
    AMOUNT = tl.constexpr(amount)

    @triton.jit
    def adder(x, BLOCK: tl.constexpr):
        at = tl.arange(0, BLOCK)
        tl.store(x + at, tl.load(x + at) + AMOUNT)

    return adder


one_more, two_more = make_adder(1), make_adder(2)


def run_factory(n: int, device: str) -> None:
    x = torch.empty(n, device=device)
    one_more[(1,)](x, BLOCK=16)
    two_more[(1,)](x, BLOCK=16)


_made: dict[str, Any] = {}


def made_once() -> Any:
    """Libraries cache the kernels that they make."""
    if "kernel" not in _made:
        _made["kernel"] = make_kernel()
    return _made["kernel"]


def run_made(n: int, device: str) -> None:
    made_once()[(1,)](torch.empty(n, device=device), n, BLOCK=16)


# --- values that host code reads --------------------------------------------------------------------------------------


def run_packed(starts: torch.Tensor, device: str) -> None:
    """What varlen attention does: the longest sequence decides the block."""
    lengths = starts[1:] - starts[:-1]
    longest = int(lengths.max().item())
    total = starts.tolist()[-1]
    x = torch.empty(total, device=device)
    scale[(starts.numel() - 1,)](x, torch.empty_like(x), total, BLOCK=triton.next_power_of_2(longest), num_warps=1)


# --- the recipe -------------------------------------------------------------------------------------------------------

KINDS = {
    name.removeprefix("run_"): function
    for name, function in sorted(globals().items())
    if name.startswith("run_") and function is not run_packed
}
"""Host code that takes (n, device), by its kind."""

# Each has values on both sides of what Triton's key tells apart: 1, multiples of 16, and neither.
SIZES = Values(1, 2, 3, 16, 17, 48)


def case_of(kind: str) -> Case:
    @declare(name=kind, n=SIZES)
    def case(n: int) -> Call:
        return Call(KINDS[kind], n, DEVICE)

    return case


@declare(requests=Range(1, 3), tokens=Values(1, 5, 16))
def packed(requests: int, tokens: int) -> Call:
    return Call(run_packed, torch.tensor([n * tokens for n in range(requests + 1)], device=DEVICE), DEVICE)


recipe = Recipe("samples", [*(case_of(kind) for kind in KINDS), packed], "every way in which a launch is made")
