"""Reads the weights of a released checkpoint, or one rank's part of them.

Names: `model.language_model.layers.…` or `model.layers.…` for the target as transformers saves it, `mtp.…` for the draft as
it is released (`fc`, `pre_fc_norm_embedding`, `pre_fc_norm_hidden`, `norm`; vLLM's `qwen3_5_mtp.py` reads the same). The experts
of a layer are one tensor (`experts.gate_up_proj`, `experts.down_proj`), or one tensor each (`experts.0.gate_proj.weight`), as
transformers saves them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from aot_cache.errors import DeclarationError
from aot_cache.models.qwen3_5.modules import Net
from aot_cache.models.qwen3_5.settings import Settings

_DRAFT = {
    "fc": "eh_proj",
    "pre_fc_norm_embedding": "enorm",
    "pre_fc_norm_hidden": "hnorm",
    "norm": "post_norm",
    "layers.0": "mtp_block",
}
_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "in_proj_z", "in_proj_b", "in_proj_a")
_COLUMNS = ("o_proj", "down_proj", "out_proj")
_BY_HEAD = ("A_log", "dt_bias")
_MIXED = ("in_proj_qkv", "conv1d")
_EXPERTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def read(net: Net, settings: Settings, folder: str, rank: int = 0) -> None:
    """Fill `net` with the weights in `folder`.

    Raises:
        DeclarationError: there is no safetensors file, one is broken, or a weight is missing or has another shape.
    """
    with torch.no_grad():
        found = dict(_found(Path(folder)))
        for name, target in wanted(net):
            value = part(name, _value(name, found, len(target), folder), settings, rank)
            if value.shape != target.shape:
                raise DeclarationError(
                    f"weight {name} of shape {list(target.shape)}", f"{list(value.shape)} in {folder}"
                )
            target.copy_(value)


def _value(name: str, found: Mapping[str, Any], count: int, folder: str) -> Tensor:
    """A weight. If the weight of all `count` experts is not there as one tensor, it is made from the single experts' tensors."""
    before, _, last = name.rpartition("experts.")
    names = [name]
    if name not in found and last in _EXPERTS:
        names = [f"{before}experts.{n}.{one}.weight" for n in range(count) for one in _EXPERTS[last]]
    for one in names:
        if one not in found:
            raise DeclarationError(f"no weight {one} in {folder}", hint="give the folder of this model's checkpoint")
    values: list[Tensor] = [found[one]() for one in names]
    if names == [name]:
        return values[0]
    if len(shapes := {tuple(value.shape) for value in values}) > 1:
        raise DeclarationError(f"experts of one shape for weight {name}", f"{sorted(shapes)} in {folder}")
    return torch.cat(values).view(count, -1, values[0].shape[-1])


def wanted(net: Net) -> Iterator[tuple[str, Tensor]]:
    """The parameters of a model, by their names in a checkpoint."""
    named: dict[str, nn.Module] = {f"model.layers.{n}.": layer for n, layer in enumerate(net.layers)}
    named |= {"model.embed_tokens.": net.embed, "model.norm.": net.norm}
    if net.head.weight is not net.embed.weight:
        named["lm_head."] = net.head
    for theirs, ours in _DRAFT.items() if net.mtp is not None else ():
        named[f"mtp.{theirs}."] = getattr(net.mtp, ours)
    for prefix, module in named.items():
        for name, weight in module.named_parameters():
            yield prefix + name, weight


def part(name: str, value: Tensor, settings: Settings, rank: int) -> Tensor:
    """One rank's part of a weight: whole heads, and columns of the MLP or of each expert. Norms, embeddings, head, router and the
    draft's projection are replicated on every rank."""
    owner = name.split(".")[-2]
    if settings.tp == 1:
        return value
    if name.endswith("experts.gate_up_proj"):
        return torch.cat([half.chunk(settings.tp, 1)[rank] for half in value.chunk(2, 1)], 1)
    if name.endswith("experts.down_proj"):
        return value.chunk(settings.tp, 2)[rank]
    if owner in _ROWS or name.endswith(_BY_HEAD):
        return value.chunk(settings.tp, 0)[rank]
    if owner in _COLUMNS:
        return value.chunk(settings.tp, 1)[rank]
    if owner in _MIXED:
        text = settings.text
        keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
        values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
        return torch.cat([one.chunk(settings.tp, 0)[rank] for one in torch.split(value, [keys, keys, values])])
    return value


def _found(folder: Path) -> Iterator[tuple[str, object]]:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise DeclarationError(f"no *.safetensors in {folder}", hint="give the folder of a checkpoint")
    for file in files:
        try:
            opened: Any = safe_open(file, framework="pt")
        except SafetensorError as error:
            raise DeclarationError(f"cannot read {file}: {error}", hint="download it again") from error
        for name in [*opened.keys()]:
            yield name.replace("model.language_model.", "model."), _reader(opened, name)


def _reader(opened: Any, name: str) -> Any:
    return lambda: opened.get_tensor(name)


def names(net: Net) -> Mapping[str, Tensor]:
    """The contiguous weights of `wanted`, to be saved in the form that `read` reads."""
    return {name: weight.contiguous() for name, weight in wanted(net)}
