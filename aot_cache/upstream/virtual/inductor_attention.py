"""Scaled dot product attention on the virtual device: use the fused kernel that the real device would use.

torch chooses the attention kernel in C++, by asking the device. Without a device it falls back to matrix products and a
softmax, which Inductor then compiles: correct, but 2.4 times slower on an H200 at 1024 tokens. Here the choice depends on the
target: flash attention, which is first in torch's order, if its conditions hold; all else is left to torch.

Upstream: `aten/src/ATen/native/transformers/cuda/sdp_utils.cpp` (`can_use_flash_attention`), `torch/_ops.py` (`py_impl`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from aot_cache.artifact.target import Target

_MOST_HEAD = 256
_OLDEST = (8, 0)


def choose_for(target: Target) -> None:
    """Make this process trace attention as it would run on `target`."""
    if target.backend != "cuda" or target.capability < _OLDEST:
        return
    attention: Any = torch.ops.aten.scaled_dot_product_attention.default
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention

    key = torch._C.DispatchKey.CompositeImplicitAutograd

    @attention.py_impl(key)  # type: ignore[untyped-decorator]
    def _(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        if not _flash_runs(q, k, v, attn_mask):
            # The implementation in C++; `attention.decompose` would call this function again.
            return attention._op_dk(key, q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        if enable_gqa and k.shape[-3] != q.shape[-3]:
            groups = q.shape[-3] // k.shape[-3]
            k, v = k.repeat_interleave(groups, -3), v.repeat_interleave(groups, -3)
        return flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]


def _flash_runs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> bool:
    return (
        mask is None
        and q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.dim() == 4
        and q.shape[-1] == k.shape[-1] == v.shape[-1]
        and q.shape[-1] <= _MOST_HEAD
        and q.shape[-1] % 8 == 0  # torch pads other head sizes first
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)))
    )
