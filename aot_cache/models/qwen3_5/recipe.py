"""The recipe `qwen3.5`: everything that serving runs, for every prompt length and every batch size."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch

from aot_cache.models.qwen3_5 import modules
from aot_cache.models.qwen3_5.model import Batch, Model
from aot_cache.models.qwen3_5.settings import CHUNK, SIZES, Settings, settings
from aot_cache.recipes.declare import Call, Case, Recipe, declare, device
from aot_cache.recipes.dimensions import Range

LAYERS = ("linear_attention", "full_attention")
"""Decoder layers that a build runs: one of each type, because all layers of a type share its graphs."""


def recipe(
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
) -> Recipe:
    """Qwen3.5 by transformers, its gated delta rule by fla-core, its MTP layer as the draft.

    Args:
        size: of the released models.
        config: a model's config.json instead.
        spec: `mtp` or `none`.
        num_speculative_tokens: drafts a step, with `mtp`; 0 for the default.
        max_batch: requests that run at a time.
        max_model_len: tokens of a request, prompt and output.
        prefill_chunk: tokens of a prompt taken in at once.
        tp: ranks that share each layer.
        dtype: of weights and activations.

    Raises:
        AotCacheError: as `settings` says.
    """
    found = settings(
        size=size,
        config=config,
        spec=spec,
        num_speculative_tokens=num_speculative_tokens,
        max_batch=max_batch,
        max_model_len=max_model_len,
        prefill_chunk=prefill_chunk,
        tp=tp,
        dtype=dtype,
    )
    return of(found)


def of(found: Settings) -> Recipe:
    """The recipe for these settings."""

    @cache
    def model() -> Model:
        return Model(modules.make(found, device(), LAYERS), found, device())

    cases = [_prompt(found, model), _step(found, model, "decode", 1)]
    if found.drafts:
        cases += [_step(found, model, "verify", found.width), _step(found, model, "draft", found.width)]
    what = f"{found.drafts} drafts by MTP" if found.drafts else "no speculation"
    other = {f"qwen3.5-{size}" for size in SIZES} - {"qwen3.5-0.8b"}
    name = found.name if found.name in other else "qwen3.5"  # in the bundle's name; a fixed option is not
    doc = f"Qwen3.5 ({found.name}, {found.dtype}, {found.tp} ranks), {what}"
    return Recipe(name, cases, doc, settings=found, ranks=found.tp)


def _prompt(found: Settings, model: Callable[[], Model]) -> Case:
    @declare(name="prefill", tokens=Range(1, found.prefill_chunk), mode="no_grad")
    def prefill(tokens: int) -> Call:
        """A part of a prompt, of any length up to a chunk, and the draft's cache with it."""
        here = device()
        prompt = torch.zeros(1, tokens, dtype=torch.int64, device=here)
        ints = [torch.zeros(1, dtype=torch.int64, device=here) for _ in range(3)]
        temperature = torch.zeros(1, dtype=torch.float32, device=here)
        return Call(model().prompt, prompt, ints[0], ints[1], temperature, ints[2], None)

    return prefill


def _step(found: Settings, model: Callable[[], Model], name: str, width: int) -> Case:
    about = {
        "decode": "One token of each request, without speculation.",
        "verify": "The pending token of each request and its drafts; what holds is kept, the state follows.",
        "draft": "The MTP layer's drafts, one after the other.",
    }

    def step(batch: int) -> Call:
        made: Batch = model().batch(batch, width)
        return Call(getattr(model(), name), made)

    step.__doc__ = about[name]
    return declare(name=name, batch=Range(1, found.max_batch), mode="no_grad")(step)


tiny = partial(recipe, size="tiny")
tiny_moe = partial(recipe, size="tiny-moe")
b0_8 = partial(recipe, size="0.8b")
b4 = partial(recipe, size="4b")
b9 = partial(recipe, size="9b")
b27 = partial(recipe, size="27b")
b35_a3b = partial(recipe, size="35b-a3b")
