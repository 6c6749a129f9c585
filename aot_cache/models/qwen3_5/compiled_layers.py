"""The compiled functions. Each is one graph for all layers of its type, because what differs between layers is an argument.

Shapes: `b` requests, in the first `b` slots; `t` tokens of each (1 to decode, 1 + drafts to verify); prompts come in parts of `p`
tokens, of one request in any slot. Caches are whole buffers, written in place: keys and values [slots, key-value heads,
positions, width], the convolution's last inputs [slots, channels, 4], the delta rule's state [slots, value heads, width, width]
in float32. Everything that differs between requests is data (`starts`, `count`), so a captured graph stays valid.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from aot_cache.models.qwen3_5 import ops  # noqa: F401  # registers torch.ops.aot_qwen3_5

Module = Any
Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


# --- parts of the two layer types ----------------------------------------------------------------------------------------


def _sum_over_ranks(x: Tensor, split: bool) -> Tensor:
    """The sum over the ranks that share a layer."""
    return torch.ops.aot_qwen3_5.all_reduce(x) if split else x


def _mlp(layer: Module, x: Tensor, split: bool) -> Tensor:
    return x + _sum_over_ranks(layer.mlp(layer.post_attention_layernorm(x)), split)


def _projected(mixer: Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mixed q, k, v, the gate z, log of the decay g, beta) of the delta rule."""
    g = -mixer.A_log.float().exp() * functional.softplus(mixer.in_proj_a(x).float() + mixer.dt_bias)
    return mixer.in_proj_qkv(x), mixer.in_proj_z(x), g, mixer.in_proj_b(x).sigmoid()


def _heads(mixer: Module, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = mixed.shape[:2], mixer.head_k_dim
    q, k, v = torch.split(mixed, [mixer.key_dim, mixer.key_dim, mixer.value_dim], dim=-1)
    q, k = (one.reshape(*rows, mixer.num_k_heads, width).contiguous() for one in (q, k))
    return q, k, v.reshape(*rows, mixer.num_v_heads, mixer.head_v_dim).contiguous()


def _mixed_out(layer: Module, x: Tensor, core: Tensor, z: Tensor, split: bool) -> Tensor:
    """The rest of a layer after the delta rule."""
    mixer = layer.linear_attn
    gated = mixer.norm(core.reshape(-1, mixer.head_v_dim), z.reshape(-1, mixer.head_v_dim))
    x = x + _sum_over_ranks(mixer.out_proj(gated.reshape(*x.shape[:2], mixer.value_dim)), split)
    return _mlp(layer, x, split)


class _Slots:
    """A layer's static cache for the first slots, with the `update` that transformers' attention calls."""

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor) -> None:
        self.keys, self.values, self.places = keys, values, places

    def update(self, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        batch = k.shape[0]
        slots = torch.arange(batch, device=k.device)[:, None]
        self.keys[slots, :, self.places] = k.transpose(1, 2)
        self.values[slots, :, self.places] = v.transpose(1, 2)
        return self.keys[:batch], self.values[:batch]


class _OneSlot:
    """Like `_Slots`, for a part of a prompt in any one slot."""

    def __init__(self, keys: Tensor, values: Tensor, places: Tensor, slot: Tensor) -> None:
        self.keys, self.values, self.places, self.slot = keys, values, places, slot

    def update(self, k: Tensor, v: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.keys[self.slot[:, None], :, self.places] = k.transpose(1, 2)
        self.values[self.slot[:, None], :, self.places] = v.transpose(1, 2)
        return self.keys[self.slot], self.values[self.slot]


def _attention(
    layer: Module, x: Tensor, turn: tuple[Tensor, Tensor], places: Tensor, cache: Any, split: bool
) -> Tensor:
    """A full attention layer: each token sees its own position and all before it."""
    seen = torch.arange(cache.keys.shape[2], device=x.device) <= places[..., None]
    out, _ = layer.self_attn(layer.input_layernorm(x), turn, seen[:, None, None], cache)
    return _mlp(layer, x + _sum_over_ranks(out, split), split)


def _positions(starts: Tensor, tokens: Tensor) -> Tensor:
    return starts[:, None] + torch.arange(tokens.shape[1], device=tokens.device)


def _rope_cos_sin(rotary: Module, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [b, t]. For text, all three position axes (for images) are equal."""
    cos, sin = rotary(x, positions[None].expand(3, -1, -1))
    return cos, sin


# --- the target ----------------------------------------------------------------------------------------------------------


@torch.compile(fullgraph=True)
def begin(embed: Module, rotary: Module, tokens: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, cosines and sines for tokens [b, t]; the first tokens are at positions `starts` [b]."""
    x = embed(tokens)
    cos, sin = _rope_cos_sin(rotary, x, _positions(starts, tokens))
    return x, cos, sin


@torch.compile(fullgraph=True)
def prompt_delta(
    layer: Module, x: Tensor, starts: Tensor, slot: Tensor, conv: Tensor, state: Tensor, split: bool
) -> Tensor:
    """A gated delta rule layer over a part of a prompt. Updates `conv` and `state` of the slot.

    If the part is the first (`starts` [1] is 0), the slot's state belongs to an earlier request and is taken as zero.
    """
    mixer, has_initial_state = layer.linear_attn, (starts > 0)[:, None, None]
    mixed, z, g, beta = _projected(mixer, layer.input_layernorm(x))
    before = conv[slot] * has_initial_state
    inputs = torch.cat([before, mixed.transpose(1, 2)], dim=-1)
    conv[slot] = inputs[..., -before.shape[-1] :]
    seen = inputs[..., 1:].transpose(1, 2).contiguous()
    summed = torch.ops.aot_qwen3_5.prompt_conv(seen, mixer.conv1d.weight.squeeze(1))[:, before.shape[-1] - 1 :]
    q, k, v = _heads(mixer, summed)
    core, last = torch.ops.aot_qwen3_5.prompt(q, k, v, g, beta, state[slot] * has_initial_state[..., None])
    state[slot] = last
    return _mixed_out(layer, x, core, z, split)


@torch.compile(fullgraph=True)
def prompt_attention(
    layer: Module,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    starts: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    split: bool,
) -> Tensor:
    """A full attention layer over a part of a prompt and all before it."""
    places = _positions(starts, x[..., 0])
    return _attention(layer, x, (cos, sin), places, _OneSlot(keys, values, places, slot), split)


@torch.compile(fullgraph=True)
def decode_delta(layer: Module, x: Tensor, conv: Tensor, state: Tensor, split: bool) -> Tensor:
    """A gated delta rule layer over one token of each request. Updates `conv` and `state`."""
    mixer, batch = layer.linear_attn, x.shape[0]
    mixed, z, g, beta = _projected(mixer, layer.input_layernorm(x))
    mixed = torch.ops.aot_qwen3_5.update_conv(mixed, conv[:batch], mixer.conv1d.weight.squeeze(1))
    core, last = torch.ops.aot_qwen3_5.decode(*_heads(mixer, mixed), g, beta, state[:batch])
    state[:batch] = last
    return _mixed_out(layer, x, core, z, split)


@torch.compile(fullgraph=True)
def verify_delta(layer: Module, x: Tensor, conv: Tensor, state: Tensor, split: bool) -> tuple[Tensor, Kept]:
    """A gated delta rule layer over 1 + drafts tokens. Only reads the state, and also returns what `commit` needs."""
    mixer, (batch, tokens) = layer.linear_attn, x.shape[:2]
    mixed, z, g, beta = _projected(mixer, layer.input_layernorm(x))
    inputs = torch.cat([conv[:batch, :, 1:], mixed.transpose(1, 2)], dim=-1).float()
    weight = mixer.conv1d.weight.squeeze(1).float()
    summed = sum(inputs[..., at : at + tokens] * weight[:, at, None] for at in range(weight.shape[-1]))
    q, k, v = _heads(mixer, functional.silu(summed).to(x.dtype).transpose(1, 2))
    core = torch.ops.aot_qwen3_5.read(q, k, v, g, beta, state[:batch])
    return _mixed_out(layer, x, core, z, split), (mixed, k, v, g, beta)


@torch.compile(fullgraph=True)
def cached_attention(
    layer: Module, x: Tensor, cos: Tensor, sin: Tensor, starts: Tensor, keys: Tensor, values: Tensor, split: bool
) -> Tensor:
    """A full attention layer over the tokens of each request and all before them.

    The next step overwrites the keys and values of rejected drafts before any token sees them.
    """
    places = _positions(starts, x[..., 0])
    return _attention(layer, x, (cos, sin), places, _Slots(keys, values, places), split)


@torch.compile(fullgraph=True)
def commit(
    conv: Tensor, state: Tensor, mixed: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, count: Tensor
) -> None:
    """Advance a layer's state by the pending token and the `count` [b] accepted drafts; rejected drafts leave no trace."""
    batch, tokens = mixed.shape[:2]
    holds = (torch.arange(tokens, device=count.device) <= count[:, None])[..., None]
    state[:batch] = torch.ops.aot_qwen3_5.advance(k, v, g * holds, beta * holds, state[:batch])
    inputs = torch.cat([conv[:batch], mixed.transpose(1, 2)], dim=-1)
    last = count[:, None] + 1 + torch.arange(conv.shape[-1], device=count.device)
    conv[:batch] = inputs.gather(2, last[:, None].expand(-1, conv.shape[1], -1))


@torch.compile(fullgraph=True)
def accept(
    norm: Module, head: Module, x: Tensor, tokens: Tensor, starts: Tensor, temperature: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The target's own tokens, the number of leading drafts that equal them, and the hidden states.

    The target samples at every position, and a draft is accepted if it is the token that the target sampled. So a request with
    a given seed gets the same tokens with or without speculation.

    Args:
        tokens: [b, t], the pending token and its drafts; the pending tokens are at positions `starts` [b].
        temperature: [b], float32; 0 is greedy. seed: [b].

    Returns:
        ([b, t], [b], [b, t, hidden]).
    """
    hidden = norm(x)
    said = _sampled(head(hidden), _positions(starts, tokens), temperature, seed)
    count = (said[:, :-1] == tokens[:, 1:]).long().cumprod(1).sum(1)
    return said, count, hidden


@torch.compile(fullgraph=True)
def finish_prompt(
    norm: Module, head: Module, x: Tensor, starts: Tensor, temperature: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """The token [1, 1] that follows the last token of a part of a prompt, and all hidden states."""
    hidden = norm(x)
    last = _positions(starts, x[..., 0])[:, -1:]
    return _sampled(head(hidden[:, -1:]), last, temperature, seed), hidden


def _sampled(logits: Tensor, positions: Tensor, temperature: Tensor, seed: Tensor) -> Tensor:
    """Sample with the Gumbel trick: the argmax of logits plus noise. The noise is a hash of seed, position and token."""
    mixed = seed[:, None] * 0x9E3779B1 + positions * 0x85EBCA77
    # No product with the arange: Inductor would treat it as index arithmetic, in 32 bits.
    mixed = mixed[..., None] ^ torch.arange(logits.shape[-1], device=logits.device)
    for factor in (0xBF58476D1CE4E5B, 0x94D049BB133111E):
        mixed = mixed * factor
        mixed = mixed ^ ((mixed >> 29) & 0x7FFFFFFFF)
    # 23 bits plus one half are exact in float32. With one more bit, the value could round up to 1, which is infinite noise: that
    # token would win whatever its logit is, even at temperature 0.
    uniform = (((mixed >> 41) & 0x7FFFFF).float() + 0.5) * 2.0**-23
    noise = -(-uniform.log()).log()
    return (logits.float() + temperature[:, None, None] * noise).argmax(-1)


# --- the draft -----------------------------------------------------------------------------------------------------------


def _drafting(mtp: Module, embed: Module, tokens: Tensor, hidden: Tensor) -> Tensor:
    found: Tensor = mtp.eh_proj(torch.cat([mtp.enorm(embed(tokens)), mtp.hnorm(hidden)], dim=-1))
    return found


@torch.compile(fullgraph=True)
def prompt_draft(
    mtp: Module,
    embed: Module,
    rotary: Module,
    tokens: Tensor,
    hidden: Tensor,
    starts: Tensor,
    slot: Tensor,
    keys: Tensor,
    values: Tensor,
    split: bool,
) -> None:
    """Fill the draft's cache for a part of a prompt. Tokens [1, p] are shifted by one: each follows its hidden state's token."""
    x = _drafting(mtp, embed, tokens, hidden)
    places = _positions(starts, tokens)
    _attention(
        mtp.mtp_block, x, _rope_cos_sin(rotary, x, places + 1), places, _OneSlot(keys, values, places, slot), split
    )


@torch.compile(fullgraph=True)
def draft(
    mtp: Module,
    embed: Module,
    rotary: Module,
    head: Module,
    tokens: Tensor,
    hidden: Tensor,
    starts: Tensor,
    count: Tensor,
    keys: Tensor,
    values: Tensor,
    split: bool,
) -> tuple[Tensor, Tensor]:
    """One draft of each request.

    Args:
        tokens: [b, t], each with the hidden state [b, t, hidden] of the token before it; index `count` [b] is the last accepted
            pair.
        starts: [b], positions in the draft's cache; the token's own position is one more.

    Returns:
        The token [b, 1], and the hidden state [b, 1, hidden] from which the next draft is made.
    """
    x = _drafting(mtp, embed, tokens, hidden)
    places = _positions(starts, tokens)
    x = _attention(mtp.mtp_block, x, _rope_cos_sin(rotary, x, places + 1), places, _Slots(keys, values, places), split)
    last = mtp.post_norm(x.gather(1, count[:, None, None].expand(-1, 1, x.shape[-1])))
    return head(last).argmax(-1), last
