"""The gated delta rule of Qwen3.5 by fla-core: decode, verification and prefill, for the geometry of every model size.

Qwen3.5 has 16 key heads and 16 (0.8B), 32 (4B, 9B, 35B-A3B), 48 (27B) or 64 (122B, 397B) value heads of dimension 128, and a
causal convolution over 4 steps. Needs the extra `fla`.
"""

from __future__ import annotations

import torch
from fla.modules.causal_conv1d import causal_conv1d_update
from fla.modules.norm.l2norm import l2norm_fwd
from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
from fla.ops.gated_delta_rule.gate import fused_gdn_gate

from aot_cache.recipes.declare import Call, Case, Recipe, declare
from aot_cache.recipes.dimensions import Range, Values

KEY_HEADS = 16
HEAD_DIM = 128
CONV_WIDTH = 4
VALUE_HEADS = Values(16, 32, 48, 64)
MAX_BATCH = 512
MAX_TOKENS = 8192
MAX_PACKED = 64
MAX_VERIFIED = 4  # one token and up to three drafts


def _normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def _projections(batch: int, tokens: int, value_heads: int) -> tuple[torch.Tensor, ...]:
    """q, k, v, the decay g (log space, fp32, negative) and beta (0..1)."""
    return (
        _normal(batch, tokens, KEY_HEADS, HEAD_DIM),
        _normal(batch, tokens, KEY_HEADS, HEAD_DIM),
        _normal(batch, tokens, value_heads, HEAD_DIM),
        -_normal(batch, tokens, value_heads, dtype=torch.float32).abs(),
        _normal(batch, tokens, value_heads).sigmoid(),
    )


def _state(batch: int, value_heads: int) -> torch.Tensor:
    return _normal(batch, value_heads, HEAD_DIM, HEAD_DIM, dtype=torch.float32)


@declare(batch=Range(1, MAX_BATCH), tokens=Range(1, MAX_VERIFIED), value_heads=VALUE_HEADS)
def decode(batch: int, tokens: int, value_heads: int) -> Call:
    """Decode (1 token) and verification (1 + drafts) for a batch of requests."""
    q, k, v, g, beta = _projections(batch, tokens, value_heads)
    return Call(
        fused_recurrent_gated_delta_rule,
        q,
        k,
        v,
        g=g,
        beta=beta,
        initial_state=_state(batch, value_heads),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
    )


def _prefill(value_heads: int) -> Case:
    # One case per geometry, so that all 8192 lengths of each are enumerated. One case for all would only be sampled.
    @declare(name=f"prefill-{value_heads}", tokens=Range(1, MAX_TOKENS))
    def prefill(tokens: int) -> Call:
        q, k, v, g, beta = _projections(1, tokens, value_heads)
        return Call(
            chunk_gated_delta_rule,
            q,
            k,
            v,
            g=g,
            beta=beta,
            initial_state=_state(1, value_heads),
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )

    return prefill


@declare(requests=Range(1, MAX_PACKED), tokens=Values(17, 64, 1000), value_heads=VALUE_HEADS)
def prefill_packed(requests: int, tokens: int, value_heads: int) -> Call:
    """Prompts of several requests in one row, told apart by `cu_seqlens`, whose values the host code reads."""
    q, k, v, g, beta = _projections(1, requests * tokens, value_heads)
    starts = torch.tensor([n * tokens for n in range(requests + 1)], dtype=torch.int64, device="cuda")
    return Call(
        chunk_gated_delta_rule,
        q,
        k,
        v,
        g=g,
        beta=beta,
        initial_state=_state(requests, value_heads),
        output_final_state=True,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=starts,
    )


@declare(batch=Range(1, MAX_BATCH), value_heads=VALUE_HEADS)
def conv_update(batch: int, value_heads: int) -> Call:
    """One step of the causal convolution for a batch of requests."""
    channels = 2 * KEY_HEADS * HEAD_DIM + value_heads * HEAD_DIM
    return Call(
        causal_conv1d_update,
        _normal(batch, 1, channels),
        _normal(batch, channels, CONV_WIDTH),
        weight=_normal(channels, CONV_WIDTH),
        activation="silu",
    )


@declare(tokens=Range(1, MAX_TOKENS))
def l2norm(tokens: int) -> Call:
    """The norm of q and k on its own, as serving code calls it outside of the delta rule."""
    return Call(l2norm_fwd, _normal(1, tokens, KEY_HEADS, HEAD_DIM))


@declare(batch=Range(1, MAX_BATCH), tokens=Range(1, MAX_VERIFIED), value_heads=VALUE_HEADS)
def gate(batch: int, tokens: int, value_heads: int) -> Call:
    """The decay from its projection: -exp(A) * softplus(x + bias)."""
    return Call(
        fused_gdn_gate,
        _normal(batch, tokens, value_heads),
        _normal(value_heads, dtype=torch.float32),
        dt_bias=_normal(value_heads),
    )


_ABOUT = "Qwen3.5's gated delta rule, by fla-core: decode, verification, prefill, convolution, norm, gate"

recipe = Recipe(
    "gated-delta",
    [decode, *(_prefill(heads) for heads in VALUE_HEADS), prefill_packed, conv_update, l2norm, gate],
    _ABOUT,
)


def _one_size(name: str, value_heads: int) -> Recipe:
    heads = Values(value_heads)
    narrow = Recipe(name, [decode, prefill_packed, conv_update, gate]).narrowed({"value_heads": heads})
    return Recipe(name, [*narrow.cases, _prefill(value_heads), l2norm], f"{_ABOUT}; {value_heads} value heads")


small = _one_size("gated-delta-0.8b", 16)
"""The geometry of the 0.8B model alone: a quarter of the units."""
