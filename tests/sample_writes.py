"""Kernels that write in all the ways that there are. Of each: the parameters through which it writes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def put(at, value):  # type: ignore[no-untyped-def]
    tl.store(at, value)


@triton.jit
def moved(at, by):  # type: ignore[no-untyped-def]
    return at + by


@triton.jit
def number_of(table, i):  # type: ignore[no-untyped-def]
    return tl.load(table + i)


@triton.jit
def plain(x, y, n, B: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.arange(0, B)
    tl.store(y + at, tl.load(x + at, mask=at < n), mask=at < n)


@triton.jit
def by_a_name(x, y, index, B: tl.constexpr):  # type: ignore[no-untyped-def]
    first = tl.load(index + tl.program_id(0))
    to = y + first * B
    to += tl.arange(0, B)
    tl.store(to, tl.load(x + tl.arange(0, B)))


@triton.jit
def by_keyword(x, y, B: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(value=tl.load(pointer=x + tl.arange(0, B)), pointer=y + tl.arange(0, B))


@triton.jit
def by_a_block(x, y, n, B: tl.constexpr):  # type: ignore[no-untyped-def]
    source = tl.make_block_ptr(x, (n,), (1,), (0,), (B,), (0,))
    to = tl.make_block_ptr(y, (n,), (1,), (0,), (B,), (0,))
    for _ in range(2):
        tl.store(to, tl.load(source, boundary_check=(0,)), boundary_check=(0,))
        to = tl.advance(to, (B,))


@triton.jit
def by_a_function(x, y, index, B: tl.constexpr):  # type: ignore[no-untyped-def]
    first = number_of(index, tl.program_id(0))
    put(moved(y + first, tl.arange(0, B)), tl.load(x + tl.arange(0, B)))


@triton.jit
def by_an_atomic(x, y, count, B: tl.constexpr):  # type: ignore[no-untyped-def]
    place = tl.atomic_add(count, 1)
    tl.atomic_max(y + place, tl.load(x))


@triton.jit
def by_either(x, y, z, ON: tl.constexpr):  # type: ignore[no-untyped-def]
    to = y
    if ON:
        to = z
    tl.store(to, tl.load(x))


@triton.jit
def by_a_tuple(x, y, B: tl.constexpr):  # type: ignore[no-untyped-def]
    source, to = x + tl.arange(0, B), y + tl.arange(0, B)
    tl.store(to, tl.load(source))


@triton.jit
def only_reads(x, y, B: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.device_assert(tl.load(x) > tl.load(y + B))


KERNELS = {
    plain: {"y"},
    by_a_name: {"y"},
    by_keyword: {"y"},
    by_a_block: {"y"},
    by_a_function: {"y"},
    by_an_atomic: {"y", "count"},
    by_either: {"y", "z"},
    by_a_tuple: {"y"},
    only_reads: set(),
}
"""Kernel → the pointers through which it may write."""
