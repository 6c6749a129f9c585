"""The kernel of `experts.grouped`. Imports Triton: for GPUs."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_SIZES = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64}
"""Tile sizes: the fewest rows that tensor cores take, because an expert has few rows. A chunk of 512 tokens, each routed to 8 of
256 experts, gives 16 rows per expert; a decoding step gives fewer. So weights are read about once, which dominates the time."""

STAGES = 4
"""Pipeline stages. In float32 the tiles in flight take 60 KiB of shared memory, and the smallest target has 64."""


def launch(x: Tensor, weight: Tensor, sorted_token_ids: Tensor, expert_offsets: Tensor) -> Tensor:
    """See `experts.grouped`. The host knows the number of pairs, not their experts, so it launches the maximum of tiles."""
    count, (experts, n, k) = len(sorted_token_ids), weight.shape
    out = torch.empty(count, n, dtype=x.dtype, device=x.device)
    tiles = min(count, experts) + count // BLOCK_SIZES["BLOCK_M"]
    grouped_gemm_kernel[(tiles, triton.cdiv(n, BLOCK_SIZES["BLOCK_N"]))](
        x.contiguous(),
        weight,
        out,
        sorted_token_ids,
        expert_offsets,
        TOP_K=count // len(x),
        NUM_EXPERTS=experts,
        N=n,
        K=k,
        PADDED_EXPERTS=triton.next_power_of_2(experts),
        **BLOCK_SIZES,
        num_warps=4,
        num_stages=STAGES,
    )
    return out


@triton.jit  # type: ignore[untyped-decorator]
def grouped_gemm_kernel(  # type: ignore[no-untyped-def]
    x,
    weight,
    out,
    sorted_token_ids,
    expert_offsets,
    TOP_K: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PADDED_EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # Whose tile this is: experts have whole tiles, one after the other; behind the last there is nothing to do.
    number = tl.arange(0, PADDED_EXPERTS)
    known = number < NUM_EXPERTS
    until = tl.load(expert_offsets + number, mask=known, other=0)
    since = tl.load(expert_offsets + number - 1, mask=known & (number > 0), other=0)
    upto = tl.cumsum((until - since + BLOCK_M - 1) // BLOCK_M * known, 0)
    tile = tl.program_id(0)
    expert = tl.sum(((upto <= tile) & known).to(tl.int32), 0)
    if expert < NUM_EXPERTS:
        before = tl.max(tl.where(number < expert, upto, 0), 0)
        first = tl.max(tl.where(number < expert, until, 0), 0)
        row = first + (tile - before) * BLOCK_M + tl.arange(0, BLOCK_M)
        held = row < tl.load(expert_offsets + expert)
        pair = tl.load(sorted_token_ids + row, mask=held, other=0)
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        exists = column < N
        depth = tl.arange(0, BLOCK_K)
        left = x + (pair // TOP_K)[:, None] * K + depth[None, :]
        # In 64 bits: the weights of 512 experts are more than 2^31 numbers.
        right = weight + expert.to(tl.int64) * N * K + column[None, :] * K + depth[:, None]
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for at in range(0, K, BLOCK_K):
            inside = depth < K - at
            a = tl.load(left + at, mask=held[:, None] & inside[None, :], other=0)
            b = tl.load(right + at, mask=exists[None, :] & inside[:, None], other=0)
            total = tl.dot(a, b, total, input_precision="ieee")
        place = out + pair[:, None] * N + column[None, :]
        tl.store(place, total.to(out.dtype.element_ty), mask=held[:, None] & exists[None, :])
