"""Real layers as a recipe: what `check_graphs.py` builds and serves.

Both kinds of decoder layer of transformers' Qwen3.5 at two sizes, with fla's gated delta rule as a custom operator (opaque
to Dynamo, as in vLLM); its norms; a net of twelve gated MLPs; and a function that is compiled inside a custom operator.
Weights are random. Needs the extras `fla` and transformers >= 5.17.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from fla.ops.gated_delta_rule import fused_recurrent_gated_delta_rule
from net import Net, with_weights
from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

from aot_cache import Call, Case, Range, Recipe, declare, device

TOKENS = Range(1, 256)
LAYERS = 2
"""Instances of each kind of layer: one graph serves all of them."""

# hidden, MLP, attention heads, key-value heads, value heads of the delta rule: Qwen3.5's model cards
SIZES = {"0.8b": (1024, 3584, 8, 2, 16), "27b": (5120, 17408, 24, 4, 48)}
HEAD, DELTA_HEAD, DELTA_KEYS = 256, 128, 16
ROTARY = HEAD // 4


@torch.library.custom_op("aot_layers::gated_delta", mutates_args=())
def gated_delta(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """fla's recurrent kernel, for any number of tokens."""
    q, k, v, g, beta = (t.contiguous() for t in (q, k, v, g.float(), beta))
    return fused_recurrent_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]


@gated_delta.register_fake
def _(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, g: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(v, memory_format=torch.contiguous_format)


def _delta(q: Any, k: Any, v: Any, g: Any = None, beta: Any = None, **_: Any) -> tuple[torch.Tensor, None]:
    return torch.ops.aot_layers.gated_delta(q, k, v, g, beta), None


def _conv(x: torch.Tensor, weight: torch.Tensor, bias: Any = None, **_: Any) -> torch.Tensor:
    width, tokens = weight.shape[-1], x.shape[-1]
    y = torch.nn.functional.conv1d(x, weight.unsqueeze(1), bias, padding=width - 1, groups=x.shape[1])[..., :tokens]
    return torch.nn.functional.silu(y)


# transformers puts its own choice of kernels behind torch.compiler.disable, where a full graph ends.
qwen.torch_chunk_gated_delta_rule = _delta
qwen.causal_conv1d_fn = _conv


def decoder_layer(layer: torch.nn.Module, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One decoder layer on one sequence."""
    return layer.forward(x, (cos, sin))


compiled_layer = torch.compile(decoder_layer, fullgraph=True)


@cache
def layers(kind: str, size: str) -> list[torch.nn.Module]:
    """Decoder layers of one kind, which differ in their weights and their place in the model."""
    hidden, mlp, heads, kv, values = SIZES[size]
    config = Qwen3_5TextConfig(
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=4 * LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=HEAD,
        linear_num_key_heads=DELTA_KEYS,
        linear_num_value_heads=values,
        attn_implementation="sdpa",
    )
    places = [n for n, name in enumerate(config.layer_types) if name == kind][:LAYERS]
    made = []
    for place in places:
        with torch.device("meta"):
            layer = qwen.Qwen3_5DecoderLayer(config, place)
        made.append(with_weights(layer))
    return made


def each_layer(kind: str, size: str, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Host code as an engine has it: one layer after another."""
    for layer in layers(kind, size):
        x = compiled_layer(layer, x, cos, sin)
    return x


def _layer_case(kind: str, size: str) -> Case:
    @declare(name=f"{kind}-{size}", tokens=TOKENS, mode="inference")
    def case(tokens: int) -> Call:
        angle = torch.randn(1, tokens, ROTARY, dtype=torch.bfloat16, device=device())
        x = torch.randn(1, tokens, SIZES[size][0], dtype=torch.bfloat16, device=device())
        return Call(each_layer, kind, size, x, angle.cos(), angle.sin())

    return case


# --- norms, a net of gated MLPs, a compiled function inside a custom operator ------------------------------------------


def norms(norm: torch.nn.Module, gated: torch.nn.Module, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """The two norms of the model, one after the other."""
    return gated.forward(norm.forward(x), gate)


compiled_norms = torch.compile(norms, fullgraph=True)


@cache
def _norm_modules() -> tuple[torch.nn.Module, torch.nn.Module]:
    with torch.device("meta"):
        pair = qwen.Qwen3_5RMSNorm(DELTA_HEAD), qwen.Qwen3_5RMSNormGated(DELTA_HEAD)
    return with_weights(pair[0]), with_weights(pair[1])


@declare(rows=Range(1, 512), mode="inference")
def norm(rows: int) -> Call:
    x = torch.randn(rows, DELTA_HEAD, dtype=torch.bfloat16, device=device())
    return Call(compiled_norms, *_norm_modules(), x, torch.randn_like(x))


@cache
def net_module() -> Any:
    """The net, compiled as a module."""
    with torch.device("meta"):
        net = Net()
    return torch.compile(with_weights(net))


@declare(batch=Range(1, 512), mode="no_grad")
def net(batch: int) -> Call:
    return Call(net_module(), torch.randn(batch, 1024, dtype=torch.bfloat16, device=device()))


@torch.compile(fullgraph=True)
def rearrange(mixed: torch.Tensor, heads: int) -> torch.Tensor:
    """Mixed projections to q, k and v one after another, as vLLM's layer has it."""
    q, k, v = mixed.split([heads * 128, heads * 128, 2 * heads * 128], dim=-1)
    return torch.cat([part.reshape(part.shape[0], -1, 128).transpose(0, 1).reshape(-1, 128) for part in (q, k, v)])


@torch.library.custom_op("aot_layers::core", mutates_args=())
def core(mixed: torch.Tensor) -> torch.Tensor:
    return rearrange(mixed, 4)


@core.register_fake
def _(mixed: torch.Tensor) -> torch.Tensor:
    return mixed.new_empty(mixed.shape[0] * 16, 128)


def around(mixed: torch.Tensor) -> torch.Tensor:
    return torch.ops.aot_layers.core(mixed * 2) + 1


compiled_around = torch.compile(around)


@declare(batch=Range(1, 512), mode="no_grad")
def nested(batch: int) -> Call:
    return Call(compiled_around, torch.randn(batch, 16 * 128, dtype=torch.bfloat16, device=device()))


recipe = Recipe(
    "layers",
    [
        *(_layer_case(kind, size) for size in SIZES for kind in ("full_attention", "linear_attention")),
        norm,
        net,
        nested,
    ],
)
small = Recipe("layers-small", [case for case in recipe.cases if not case.name.endswith("27b")])
