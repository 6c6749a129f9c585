"""The gated delta rule and its convolution as custom operators, which Dynamo does not trace into; vLLM does the same.

On a GPU they are fla-core's kernels, on a CPU transformers' own functions. transformers itself uses the recurrent kernel only
for a single token, and has both kernels behind `torch.compiler.disable`, where a full graph would break.

A verification of 1 + n tokens runs the recurrent kernel over all of them from the slot's state, which it only reads (`read`).
The accepted drafts are known after the last layer. Then the same kernel runs again over the same keys and values, with rejected
ones neutral (decay 1, weight 0), and writes the state (`advance`). So a rollback costs one read and one write, and needs no copy
of the state per draft (vLLM keeps 1 + n states; the chunked kernel has no intermediate ones).
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.models.qwen3_5 import modeling_qwen3_5 as modeling

_ON_CPU: dict[str, Any] = {
    "fused_recurrent_gated_delta_rule": inspect.unwrap(modeling.torch_recurrent_gated_delta_rule),
    "chunk_gated_delta_rule": inspect.unwrap(modeling.torch_chunk_gated_delta_rule),
}


def _rule(name: str, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, **more: object) -> tuple[Tensor, Tensor]:
    """Call fla's function `name`, or on a CPU the transformers function with the same arguments."""
    if q.device.type == "cpu":
        # transformers 5.17 needs one key head per value head; later releases accept both.
        groups = v.shape[2] // k.shape[2]
        q, k = q.repeat_interleave(groups, 2), k.repeat_interleave(groups, 2)
        run = _ON_CPU[name]
    else:
        from fla.ops import gated_delta_rule

        run = getattr(gated_delta_rule, name)
    out, state = run(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True, **more)
    return out, state


def _recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, final: bool
) -> tuple[Tensor, Tensor]:
    more = {"initial_state": state, "output_final_state": final}
    return _rule("fused_recurrent_gated_delta_rule", q, k, v, g, beta, **more)


@torch.library.custom_op("aot_qwen3_5::read", mutates_args=())
def read(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """Outputs for a few tokens of each request, from its state, which is not changed.

    Args:
        q, k: [batch, tokens, key heads, 128]; v: [batch, tokens, value heads, 128].
        g: log of the decay, float32, and beta: [batch, tokens, value heads].
        state: [batch, value heads, 128, 128], float32.

    Returns:
        The outputs, with the shape of v.
    """
    return _recurrent(q, k, v, g, beta, state, final=False)[0]


@read.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


@torch.library.custom_op("aot_qwen3_5::decode", mutates_args=())
def decode(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Like `read`; also returns the state after the last token."""
    return _recurrent(q, k, v, g, beta, state, final=True)


@decode.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)


@torch.library.custom_op("aot_qwen3_5::advance", mutates_args=())
def advance(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    """The state after the tokens. A token with g = 0 and beta = 0 does not change it."""
    return _recurrent(k, k, v, g, beta, state, final=True)[1]


@advance.register_fake
def _(k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> Tensor:
    return torch.empty_like(state)


@torch.library.custom_op("aot_qwen3_5::prompt", mutates_args=())
def prompt(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs of a part of a prompt, and the state after it, computed in chunks of 64 tokens. Arguments as for `read`."""
    more = {"initial_state": state, "output_final_state": True}
    out, state = _rule("chunk_gated_delta_rule", q, k, v, g, beta, **more)
    return out, state.float()


@prompt.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(state)


@torch.library.custom_op("aot_qwen3_5::prompt_conv", mutates_args=())
def prompt_conv(x: Tensor, weight: Tensor) -> Tensor:
    """The causal convolution of a prompt, followed by silu.

    Args:
        x: [batch, tokens, channels]; weight: [channels, 4].
    """
    if x.device.type == "cpu":
        width, tokens = weight.shape[-1], x.shape[1]
        padded = torch.nn.functional.conv1d(
            x.transpose(1, 2), weight.unsqueeze(1), padding=width - 1, groups=x.shape[-1]
        )
        return torch.nn.functional.silu(padded[..., :tokens]).transpose(1, 2).contiguous()
    from fla.modules.causal_conv1d import causal_conv1d

    out: Tensor = causal_conv1d(x=x, weight=weight, activation="silu")[0]
    return out


@prompt_conv.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("aot_qwen3_5::update_conv", mutates_args=("state",))
def update_conv(x: Tensor, state: Tensor, weight: Tensor) -> Tensor:
    """The causal convolution of one token of each request, followed by silu. Updates `state` in place.

    Args:
        x: [batch, 1, channels]; state: the last 4 inputs, [batch, channels, 4]; weight: [channels, 4].
    """
    if x.device.type == "cpu":
        state.copy_(torch.cat([state[..., 1:], x.transpose(1, 2)], dim=-1))
        return torch.nn.functional.silu((state * weight).sum(-1))[:, None]
    from fla.modules.causal_conv1d import causal_conv1d_update

    out: Tensor = causal_conv1d_update(x, state, weight=weight, activation="silu")[0]
    return out


@update_conv.register_fake
def _(x: Tensor, state: Tensor, weight: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.custom_op("aot_qwen3_5::all_reduce", mutates_args=())
def all_reduce(x: Tensor) -> Tensor:
    """The sum over the ranks that share the model."""
    out = x.clone()
    dist.all_reduce(out)
    return out


@all_reduce.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)
