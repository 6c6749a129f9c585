"""The modules: transformers' Qwen3.5 and its MTP draft, made on the meta device first, then given a device and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_layers import MtpModel
from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM
from transformers.models.qwen3_5_moe.configuration_qwen3_5_moe import Qwen3_5MoeTextConfig
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeForCausalLM

from aot_cache.models.qwen3_5.experts import EXPERTS
from aot_cache.models.qwen3_5.settings import DENSE, MOE, SHARED_BY_RANKS, Settings

ATTENTION = "aot_cache_static"
Config = Qwen3_5TextConfig | Qwen3_5MoeTextConfig
CLASSES: Mapping[str, tuple[type[Config], Any]] = {
    DENSE: (Qwen3_5TextConfig, Qwen3_5ForCausalLM),
    MOE: (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM),
}
"""Model type → transformers' configuration and model classes, the only difference here between the types."""
_NOT_FIELDS = ("model_type", "mtp_num_hidden_layers")


def attend(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: object
) -> tuple[Tensor, None]:
    """Attention over a static cache, with the signature by which transformers calls it.

    The heads of a group are rows of one matrix product, so that keys and values are read once and not repeated.

    Args:
        q: [batch, heads, tokens, width]; k, v: [batch, key-value heads, positions, width].
        mask: the positions that a token sees, [batch, 1, 1, tokens, positions].

    Returns:
        [batch, tokens, heads, width], and None for the attention weights.
    """
    batch, heads, tokens, width = q.shape
    shared = k.shape[1]
    rows = q.reshape(batch, shared, heads // shared * tokens, width)
    scores = (rows @ k.transpose(-1, -2)).float().mul(scaling)
    scores = scores.view(batch, shared, heads // shared, tokens, k.shape[2])
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype).flatten(2, 3)
    return (weights @ v).reshape(batch, heads, tokens, width).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attend)


@dataclass
class Net:
    """The parts that steps run.

    Args:
        layers: decoder layers of the target.
        mtp: the draft: norms, a projection and a decoder layer; None without speculation.
        split: whether several ranks share each layer, so that its two halves each end in an all-reduce.
    """

    embed: nn.Module
    rotary: nn.Module
    layers: list[Any]
    norm: nn.Module
    head: nn.Module
    mtp: object
    split: bool

    def modules(self) -> list[nn.Module]:
        """All parts that are modules."""
        draft = [] if self.mtp is None else [self.mtp]
        return [self.embed, self.rotary, *self.layers, self.norm, self.head, *draft]


def config_of(settings: Settings, layers: int | Sequence[str] | None = None) -> Config:
    """transformers' configuration for one rank's part.

    Args:
        layers: number of decoder layers instead of all, a multiple of 4; or their types, of which the last must be
            `full_attention`, because the draft is made like it.
    """
    fields = {name: value for name, value in settings.text.items() if name not in _NOT_FIELDS}
    for name in SHARED_BY_RANKS[settings.kind]:
        fields[name] = fields[name] // settings.tp
    if isinstance(layers, int):
        fields |= {"num_hidden_layers": layers, "layer_types": None}
    elif layers is not None:
        fields |= {"num_hidden_layers": len(layers), "layer_types": list(layers)}
    fields["attn_implementation"] = ATTENTION
    fields["experts_implementation"] = EXPERTS
    config = CLASSES[settings.kind][0](**fields)
    config.max_position_embeddings = max(config.max_position_embeddings, settings.cache_len)
    config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
    return config


def make(settings: Settings, device: str, layers: int | Sequence[str] | None = None) -> Net:
    """The model with random weights on `device`. On the virtual device of a build, weights have no memory."""
    with torch.device("meta"):
        main: Any = CLASSES[settings.kind][1](config_of(settings, layers))
        draft: object = MtpModel(main, 1) if settings.drafts else None
    net = of(main, draft, settings)
    dtype = getattr(torch, settings.dtype)
    for module in net.modules():
        _materialize(module, device, dtype)
    if settings.text["tie_word_embeddings"]:
        net.head.weight = net.embed.weight
    return net


def of(main: Any, draft: Any, settings: Settings) -> Net:
    """The parts of transformers' two models."""
    base = main.model
    mtp = None if draft is None else draft.layers[0].eval()
    main.eval()
    return Net(base.embed_tokens, base.rotary_emb, list(base.layers), base.norm, main.lm_head, mtp, settings.tp > 1)


def _materialize(module: nn.Module, device: str, dtype: torch.dtype) -> None:
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            values = _initial(part, name, weight.shape, device).to(dtype)
            setattr(part, name, nn.Parameter(values, requires_grad=False))
        for name in [name for name, _ in part.named_buffers(recurse=False)]:
            setattr(part, name, nn.Buffer(_frequencies(part, device), persistent=False))


def _initial(part: nn.Module, name: str, shape: torch.Size, device: str) -> Tensor:
    """Random weights for a model that behaves sensibly: each layer adds about as much as its input, and states decay."""
    if name == "A_log":
        return torch.empty(shape, device=device).uniform_(0.01, 16).log()
    if name == "dt_bias":
        return torch.ones(shape, device=device)
    if len(shape) == 1:  # norms: in transformers the gated ones are centred at one and all others at zero
        return 0.02 * torch.randn(shape, device=device) + ("Gated" in type(part).__name__)
    scale = 0.02 if isinstance(part, nn.Embedding) else float(shape[-1]) ** -0.5
    return scale * torch.randn(shape, device=device)


def _frequencies(rotary: Any, device: str) -> Tensor:
    found: Tensor = rotary.compute_default_rope_parameters(rotary.config)[0]
    return found.to(device)
