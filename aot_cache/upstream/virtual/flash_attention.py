"""Shape rules of FlashAttention's operators, which engines compile into libraries of their own, and which have none there.

Upstream: FlashAttention 2 and 3 (`flash_attn/flash_attn_interface.py`, `hopper/flash_attn_interface.py`), and what
`hopper/flash_api.cpp` makes as scheduler metadata: 32 bit integers, four vectors over the requests, rounded up to four, and
one number.
"""

from __future__ import annotations

from typing import Any

import torch


def attention(out: torch.Tensor | None, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the output, the logarithms of its sums: [heads, tokens] for q of [tokens, heads, width])"""
    made = torch.empty_like(q) if out is None else out
    return made, q.new_empty(q.shape[-2], q.shape[0], dtype=torch.float32)


def forward_2(q: Any, k: Any, v: Any, out: Any = None, *_: Any, **__: Any) -> list[torch.Tensor]:
    """FlashAttention 2's `varlen_fwd`."""
    return list(attention(out, q))


def forward_3(
    q: Any, k: Any, v: Any, k_new: Any = None, v_new: Any = None, q_v: Any = None, out: Any = None, *_: Any, **__: Any
) -> list[torch.Tensor]:
    """FlashAttention 3's `fwd`."""
    return [*attention(out, q), q.new_empty(0), q.new_empty(0)]


_FIXED = 8
"""Where `seqused_k` stands among the arguments of `get_scheduler_metadata`."""


def metadata_3(batch_size: int, *given: Any, seqused_k: Any = None, **_: Any) -> torch.Tensor:
    """FlashAttention 3's `get_scheduler_metadata`."""
    lengths = seqused_k if seqused_k is not None else given[_FIXED - 1]
    rounded = -(-batch_size // 4) * 4
    made: torch.Tensor = lengths.new_empty(1 + 4 * rounded, dtype=torch.int32)
    return made
