"""The kernel of `experts.grouped`. Imports Triton: for GPUs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, DEPTH = 16, 64, 64
"""Tile sizes: the fewest rows that tensor cores take, because an expert has few rows. A chunk of 512 tokens, each routed to 8 of
256 experts, gives 16 rows per expert; a decoding step gives fewer. So weights are read about once, which dominates the time."""

STAGES = 4
"""Pipeline stages. In float32 the tiles in flight take 60 KiB of shared memory, and the smallest target has 64."""


def launch(x: Tensor, weight: Tensor, pairs: Tensor, ends: Tensor) -> Tensor:
    """See `experts.grouped`. The host knows the number of pairs, not their experts, so it launches the maximum of tiles."""
    count, (experts, columns, width) = len(pairs), weight.shape
    out = torch.empty(count, columns, dtype=x.dtype, device=x.device)
    tiles = min(count, experts) + count // ROWS
    grouped_gemm_kernel[(tiles, triton.cdiv(columns, COLUMNS))](
        x.contiguous(),
        weight,
        out,
        pairs,
        ends,
        each=count // len(x),
        experts=experts,
        columns=columns,
        width=width,
        padded=triton.next_power_of_2(experts),
        tile_rows=ROWS,
        tile_columns=COLUMNS,
        tile_depth=DEPTH,
        num_warps=4,
        num_stages=STAGES,
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def grouped_gemm_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    pairs,
    ends,
    each: tl.constexpr,
    experts: tl.constexpr,
    columns: tl.constexpr,
    width: tl.constexpr,
    padded: tl.constexpr,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
    tile_depth: tl.constexpr,
):
    # Whose tile this is: experts have whole tiles, one after the other; behind the last there is nothing to do.
    number = tl.arange(0, padded)
    known = number < experts
    until = tl.load(ends + number, mask=known, other=0)
    since = tl.load(ends + number - 1, mask=known & (number > 0), other=0)
    upto = tl.cumsum((until - since + tile_rows - 1) // tile_rows * known, 0)
    tile = tl.program_id(0)
    expert = tl.sum(((upto <= tile) & known).to(tl.int32), 0)
    if expert < experts:
        before = tl.max(tl.where(number < expert, upto, 0), 0)
        first = tl.max(tl.where(number < expert, until, 0), 0)
        row = first + (tile - before) * tile_rows + tl.arange(0, tile_rows)
        held = row < tl.load(ends + expert)
        pair = tl.load(pairs + row, mask=held, other=0)
        column = tl.program_id(1) * tile_columns + tl.arange(0, tile_columns)
        exists = column < columns
        depth = tl.arange(0, tile_depth)
        left = x + (pair // each)[:, None] * width + depth[None, :]
        # In 64 bits: the weights of 512 experts are more than 2^31 numbers.
        right = weight + expert.to(tl.int64) * columns * width + column[None, :] * width + depth[:, None]
        total = tl.zeros((tile_rows, tile_columns), dtype=tl.float32)
        for at in range(0, width, tile_depth):
            inside = depth < width - at
            a = tl.load(left + at, mask=held[:, None] & inside[None, :], other=0)
            b = tl.load(right + at, mask=exists[None, :] & inside[:, None], other=0)
            total = tl.dot(a, b, total, input_precision="ieee")
        told = out + pair[:, None] * columns + column[None, :]
        tl.store(told, total.to(out.dtype.element_ty), mask=held[:, None] & exists[None, :])
