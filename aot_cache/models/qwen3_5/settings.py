"""Settings: the size of the model, and how it is served. Imports no torch.

Sources of the sizes' numbers: NVIDIA's Model-Optimizer recipes (0.8B, 4B, 9B), THUDM's slime scripts (27B) and transformers'
Qwen3_5MoeTextConfig, whose defaults are those of the 35B-A3B. Other sizes are not known for sure and need a config.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from aot_cache.errors import DeclarationError, UnknownName, did_you_mean
from aot_cache.store import Json

DENSE, MOE = "qwen3_5_text", "qwen3_5_moe_text"
KINDS = {"qwen3_5": DENSE, DENSE: DENSE, "qwen3_5_moe": MOE, MOE: MOE}
"""A config's `model_type` → the type of its text model. An MoE model differs from a dense one only in its MLPs."""
SPECS = ("none", "mtp")
DTYPES = ("bfloat16", "float16", "float32")
CHUNK = 512
"""Maximum of prompt tokens processed at once. Each length up to this is declared; longer prompts take several chunks."""

_ALIGNED = 64
DRAFTS = 2
"""Default number of drafted tokens per step, as in vLLM's recipe for this family."""

_COMMON: Mapping[str, Json] = {
    "vocab_size": 248320,
    "head_dim": 256,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "mtp_num_hidden_layers": 1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10_000_000,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
    },
}


def _dense(hidden: int, layers: int, heads: int, kv: int, value_heads: int, mlp: int, tied: bool) -> Mapping[str, Json]:
    return {
        **_COMMON,
        "model_type": DENSE,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "linear_num_value_heads": value_heads,
        "intermediate_size": mlp,
        "tie_word_embeddings": tied,
    }


def _moe(
    hidden: int, layers: int, heads: int, kv: int, value_heads: int, experts: int, chosen: int, mlp: int, tied: bool
) -> Mapping[str, Json]:
    text = {**_dense(hidden, layers, heads, kv, value_heads, mlp, tied), "model_type": MOE}
    del text["intermediate_size"]
    sizes = {"moe_intermediate_size": mlp, "shared_expert_intermediate_size": mlp}
    return {**text, "num_experts": experts, "num_experts_per_tok": chosen, **sizes}


_TINY: Mapping[str, Json] = {
    "vocab_size": 512,
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "rope_parameters": {**_COMMON["rope_parameters"], "mrope_section": [2, 1, 1]},
}

SIZES: Mapping[str, Mapping[str, Json]] = MappingProxyType(
    {
        # not released models: for tests, and for trials on a machine without a GPU
        "tiny": {**_dense(64, 4, 4, 2, 4, 128, True), **_TINY},
        "tiny-moe": {**_moe(64, 4, 4, 2, 4, 8, 2, 32, True), **_TINY},
        "0.8b": _dense(1024, 24, 8, 2, 16, 3584, True),
        "4b": _dense(2560, 32, 16, 4, 32, 9216, True),
        "9b": _dense(4096, 32, 16, 4, 32, 12288, False),
        "27b": _dense(5120, 64, 24, 4, 48, 17408, False),
        "35b-a3b": _moe(2048, 40, 16, 2, 32, 256, 8, 512, False),
    }
)

_SHAPES = {DENSE: SIZES["tiny"], MOE: SIZES["tiny-moe"]}
_OPTIONAL = ("model_type", "mtp_num_hidden_layers")
_HEADS = ("num_attention_heads", "num_key_value_heads", "linear_num_key_heads", "linear_num_value_heads")
SHARED_BY_RANKS: Mapping[str, tuple[str, ...]] = {
    DENSE: (*_HEADS, "intermediate_size"),
    MOE: (*_HEADS, "moe_intermediate_size", "shared_expert_intermediate_size"),
}
"""Model type → the fields that are divided among the ranks. Every rank has a part of every expert."""


@dataclass(frozen=True)
class Settings:
    """A model and how it is served. The recipe's declarations and the engine's allocations depend only on this.

    Args:
        text: fields of transformers' text config.
        drafts: tokens that the MTP layer drafts per step; 0: no speculation.
        max_batch: maximum of requests that run at a time.
        max_model_len: maximum of tokens of a request, prompt and output.
        prefill_chunk: maximum of prompt tokens processed at once.
        tp: number of ranks that share the heads and the MLPs.
        dtype: of weights and activations; the gated delta rule's state is always float32.
    """

    text: Mapping[str, Json]
    drafts: int = 0
    max_batch: int = 256
    max_model_len: int = 4096
    prefill_chunk: int = CHUNK
    tp: int = 1
    dtype: str = "bfloat16"
    name: str = field(default="", compare=False)

    @property
    def kind(self) -> str:
        """`DENSE` or `MOE`."""
        return str(self.text["model_type"])

    @property
    def width(self) -> int:
        """Tokens per request in a verification: the pending token and the drafts."""
        return 1 + self.drafts

    @property
    def cache_len(self) -> int:
        """Positions of a slot in the key-value cache. The last verification may write beyond the last token; and the length is
        aligned, because matrix products of other lengths are slower."""
        return -(-(self.max_model_len + self.width) // _ALIGNED) * _ALIGNED

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution on one rank."""
        heads = 2 * self.text["linear_num_key_heads"] * self.text["linear_key_head_dim"]
        return int(heads + self.text["linear_num_value_heads"] * self.text["linear_value_head_dim"]) // self.tp


def settings(
    *,
    size: str = "0.8b",
    config: str = "",
    spec: str = "none",
    num_speculative_tokens: int = 0,
    max_batch: int = 256,
    max_model_len: int = 4096,
    prefill_chunk: int = CHUNK,
    tp: int = 1,
    dtype: str = "bfloat16",
) -> Settings:
    """Make settings from command-line options.

    Args:
        size: one of `SIZES`; ignored if `config` is given.
        config: path of a model's config.json.
        spec: `mtp` drafts with the model's MTP layer, `none` does not speculate.
        num_speculative_tokens: drafts per step; 0 with `mtp` means `DRAFTS`.
        max_batch, max_model_len, prefill_chunk, tp, dtype: see `Settings`.

    Raises:
        UnknownName: there is no such size.
        DeclarationError: an option's value is invalid, or does not fit another option or the model.
    """
    if not config and size not in SIZES:
        known = ", ".join(f"qwen3.5-{one}" for one in SIZES)
        hint = did_you_mean(size, SIZES, "give --model PATH/config.json for another size")
        raise UnknownName(f"unknown size {size!r} of qwen3.5; known: {known}", hint=hint)
    text = read_config(Path(config)) if config else SIZES[size]
    _one_of("--spec", spec, SPECS)
    _one_of("--dtype", dtype, DTYPES)
    _at_least("--max-batch", max_batch, 1)
    _at_least("--num-speculative-tokens", num_speculative_tokens, 0)
    drafts = num_speculative_tokens or DRAFTS
    if spec == "none":
        if num_speculative_tokens:
            raise DeclarationError(
                "--spec mtp with --num-speculative-tokens", "--spec none", "omit one of them, or give --spec mtp"
            )
        drafts = 0
    elif text.get("mtp_num_hidden_layers", 0) != 1:
        found = f"{text.get('mtp_num_hidden_layers', 'no')} mtp_num_hidden_layers in its config"
        raise DeclarationError("a model with one MTP layer for --spec mtp", found, "build it with --spec none")
    _at_least("--max-model-len", max_model_len, 2 + drafts)
    _check_split(text, tp)
    _at_least("prefill_chunk", prefill_chunk, 1)
    chunk = min(prefill_chunk, max_model_len - 1)
    return Settings(text, drafts, max_batch, max_model_len, chunk, tp, dtype, config or f"qwen3.5-{size}")


def read_config(path: Path) -> Mapping[str, Json]:
    """The text model's fields of a config.json.

    Raises:
        DeclarationError: it cannot be read, is of another model, lacks a field, or has a wrong value.
    """
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise DeclarationError(f"cannot read config file {path}: {why}", hint="correct the path or the file") from error
    if not isinstance(found, dict):
        raise DeclarationError(f"a JSON object in {path}", f"JSON of type {type(found).__name__}")
    text = found.get("text_config", found)
    if not isinstance(text, dict):
        raise DeclarationError(f"an object as text_config in {path}", repr(text))
    kind = KINDS.get(str(text.get("model_type")))
    if kind is None:
        raise DeclarationError(f"the config of a Qwen3.5 in {path}", f"model_type {text.get('model_type')!r}")
    text = {**text, "model_type": kind}
    if "rope_parameters" not in text and "rope_scaling" in text:
        text["rope_parameters"] = text["rope_scaling"]
    needed = sorted({*_SHAPES[kind]} - {*_OPTIONAL})
    missing = [name for name in needed if name not in text and name not in found]
    if missing:
        raise DeclarationError(f"config file {path} lacks {', '.join(missing)}", hint="complete the file")
    text = {**{name: found[name] for name in needed if name in found}, **text}
    for name in needed:
        _check_field(name, text[name], type(_SHAPES[kind][name]), path)
    if kind == MOE and text["num_experts_per_tok"] > text["num_experts"]:
        expected = f"num_experts_per_tok of at most num_experts = {text['num_experts']} in {path}"
        raise DeclarationError(expected, str(text["num_experts_per_tok"]))
    return text


def _check_field(name: str, value: Json, kind: type, path: Path) -> None:
    fits = isinstance(value, Mapping) if kind is dict else type(value) is kind
    if not fits or (kind is int and value < 1):
        what = {int: "a number of 1 or more", bool: "true or false", dict: "an object"}[kind]
        raise DeclarationError(f"{what} as {name} in {path}", repr(value))


def _check_split(text: Mapping[str, Json], tp: int) -> None:
    _at_least("--tp", tp, 1)
    for name in SHARED_BY_RANKS[text["model_type"]]:
        if text[name] % tp:
            raise DeclarationError(f"a --tp that divides {name} = {text[name]}", f"--tp {tp}")


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise DeclarationError(f"one of {', '.join(known)} as {option}", repr(value), did_you_mean(value, known))


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise DeclarationError(f"{option} of at least {least}", str(value))
