"""What tests of Qwen3.5 share: a tiny model of each kind as engines and as transformers' own, and requests side by side."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe

from aot_cache.models.qwen3_5 import modules, weights
from aot_cache.models.qwen3_5.engine import Engine
from aot_cache.models.qwen3_5.model import Model
from aot_cache.models.qwen3_5.settings import DENSE, MOE, SIZES, Settings, settings

Propose = Callable[[int, int], Sequence[int]]
"""(slot, tokens that its request has) → drafts."""


def tiny(drafts: int = 0, size: str = "tiny", **options: Any) -> Settings:
    """Settings of a tiny model in float32: two ways to compute it differ by rounding alone."""
    spec = {"spec": "mtp", "num_speculative_tokens": drafts} if drafts else {}
    return settings(size=size, dtype="float32", **{"max_batch": 4, "max_model_len": 256, **spec, **options})


@cache
def weighted(size: str = "tiny") -> modules.Net:
    """The one model of a size of which all are made."""
    torch.manual_seed(0)
    return modules.make(tiny(1, size), "cpu")


def model(drafts: int = 0, size: str = "tiny", **options: Any) -> Model:
    """Caches of its own, and the same weights as every other."""
    made = weighted(size) if drafts else replace(weighted(size), mtp=None)
    return Model(made, tiny(drafts, size, **options), "cpu")


def engine(drafts: int = 0, **options: Any) -> Engine:
    return Engine(model(drafts, **options))


@cache
def original(size: str = "tiny") -> Any:
    """transformers' model with the same weights, its own attention, experts and caches."""
    modeling: Any = {DENSE: modeling_qwen3_5, MOE: modeling_qwen3_5_moe}[tiny(size=size).kind]
    # Without these it looks for kernels of a GPU, and does not find them where fla-core is installed.
    for name in ("chunk_gated_delta_rule", "recurrent_gated_delta_rule"):
        setattr(modeling, f"torch_{name}", inspect.unwrap(getattr(modeling, f"torch_{name}")))
    for name in ("causal_conv1d_fn", "causal_conv1d_update"):
        setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))
    main = modeling.Qwen3_5MoeForCausalLM if modeling is modeling_qwen3_5_moe else modeling.Qwen3_5ForCausalLM
    fields = {k: v for k, v in SIZES[size].items() if k != "model_type"}
    config = main.config_class(**fields, experts_implementation="eager")
    config.num_mtp_layers, config.mtp_layer_types = 1, ["full_attention"]
    made = main(config).eval()
    named = {name: value for name, value in weights.names(weighted(size)).items() if not name.startswith("mtp.")}
    lost = made.load_state_dict(named, strict=False)
    assert not lost.unexpected_keys and lost.missing_keys == ["lm_head.weight"], lost  # which is the embedding
    made.tie_weights()
    return made


@cache
def expected(prompt: tuple[int, ...], count: int, size: str = "tiny") -> list[int]:
    """What transformers' own `generate` says, greedily."""
    tokens = torch.tensor([prompt])
    said = original(size).generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False, eos_token_id=None
    )
    return [int(token) for token in said[0, len(prompt) :]]


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(1000 * length + seed)
    return tuple(torch.randint(0, SIZES["tiny"]["vocab_size"], (length,), generator=generator).tolist())


def serve(
    made: Engine,
    requests: Mapping[int, tuple[Sequence[int], int]],
    propose: Propose | None = None,
    **sampling: Any,
) -> dict[int, list[int]]:
    """Serve slot → (prompt, tokens wanted) side by side; slot → tokens. A slot is free as soon as its request has all."""
    out = {slot: [made.start(slot, tokens, **sampling)] for slot, (tokens, _) in requests.items()}
    while running := [slot for slot in sorted(out) if len(out[slot]) < requests[slot][1]]:
        drafts = {slot: propose(slot, len(out[slot])) for slot in running} if propose else None
        for slot, new in zip(running, made.step(running, drafts), strict=True):
            out[slot] += new
            if len(out[slot]) >= requests[slot][1]:
                made.stop(slot)
    return {slot: tokens[: requests[slot][1]] for slot, tokens in out.items()}


def guesses(coming: Sequence[int], right: int, drafts: int) -> list[int]:
    """So many right drafts, and wrong ones behind."""
    padded = [*coming, *[0] * drafts][:drafts]
    return [token if n < right else (token + 1) % SIZES["tiny"]["vocab_size"] for n, token in enumerate(padded)]
