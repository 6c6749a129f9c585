"""Unmodified models of transformers, tiny, with random weights: each is declared in a few lines, as their users would."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as hf

from aot_cache import Call, Range, Recipe, declare, device

SMALL: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT = {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 8}
MAMBA = {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "expand": 2, "chunk_size": 8}
WHISPER = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "num_mel_bins": 8}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MAKE = {
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**TEXT)),
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**TEXT, sliding_window=8)),
    "qwen3_moe": lambda: hf.Qwen3MoeForCausalLM(
        hf.Qwen3MoeConfig(**TEXT, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2)
    ),
    "mamba2": lambda: hf.Mamba2ForCausalLM(
        hf.Mamba2Config(vocab_size=64, hidden_size=32, num_hidden_layers=1, **MAMBA)
    ),
    "vit": lambda: hf.ViTModel(hf.ViTConfig(**{**SMALL, "intermediate_size": 64}, image_size=32, patch_size=8)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL, intermediate_size=64)),
    "whisper": lambda: hf.models.whisper.modeling_whisper.WhisperEncoder(
        hf.WhisperConfig(**WHISPER, **TOKENS, vocab_size=64, max_source_positions=16)
    ),
}


@functools.cache
def model(name: str) -> Any:
    torch.manual_seed(0)
    with torch.device(device()):
        made = MAKE[name]().eval().requires_grad_(False)
    made.forward = torch.compile(made.forward, dynamic=True)
    return made


@functools.cache
def cache(name: str) -> Any:
    return hf.StaticCache(config=model(name).config, max_cache_len=32)


def tokens(name: str, n: int) -> Call:
    model(name)  # a server has it before its first call
    ids = torch.randint(0, 64, (1, n), device=device())
    return Call(lambda: model(name)(input_ids=ids, **({} if name == "bert" else {"use_cache": False}))[0])


def pictures(name: str, n: int) -> Call:
    model(name)
    x = torch.randn(n, 3, 32, 32, device=device()) if name == "vit" else torch.randn(n, 8, 32, device=device())
    return Call(lambda: model(name)(x)[0])


def decode(name: str, n: int) -> Call:
    """One token of `n` requests, with a static cache that is empty each time."""
    cache(name).reset()
    ids, place = torch.randint(0, 64, (1, 1), device=device()), torch.tensor([n], device=device())
    given = {"past_key_values": cache(name), "position_ids": place[None], "use_cache": True}
    return Call(lambda: model(name)(input_ids=ids, **given).logits)


WAYS = {"vit": pictures, "whisper": pictures}


def case(name: str, call: Any, suffix: str = "") -> Any:
    return declare(name=name + suffix, n=Range(2, 5), mode="inference")(lambda n: call(name, n))


cases = [case(name, WAYS.get(name, tokens)) for name in MAKE]
cases += [case(name, decode, "-decode") for name in ("qwen3", "llama", "gemma3")]
recipe = Recipe("transformers", cases)
captured = Recipe("transformers", [one for one in cases if one.name in ("qwen3", "llama", "bert", "llama-decode")])
