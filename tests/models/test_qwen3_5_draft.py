"""Drafts are those of transformers' own MTP model, and several follow from one another."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import qwen
import torch
from torch import Tensor
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

from aot_cache.models.qwen3_5.engine import Engine


@cache
def original(size: str) -> Any:
    """transformers' draft with the same weights."""
    made = MtpModel(qwen.original(size), 1).eval()
    made.layers[0].load_state_dict(dict(qwen.weighted(size).mtp.named_parameters()))  # all of them, by the same names
    # transformers 5.17 turns by positions on all three axes of an image only; later releases take one for text, too.
    made.rotary_emb.register_forward_pre_hook(_on_three_axes, with_kwargs=True)
    return made


def _on_three_axes(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    if "position_ids" in kwargs and kwargs["position_ids"].ndim == 2:  # so the draft calls it; the target has all three
        kwargs = {**kwargs, "position_ids": kwargs["position_ids"].expand(3, -1, -1)}
    return args, kwargs


def drafts_of_transformers(tokens: list[int], count: int, size: str = "tiny") -> list[int]:
    """What comes after `tokens`, of which the target has taken in all but the last: one draft after the other.

    The first is a call as its candidate generator makes it; further ones are made by the same layer from its own hidden
    state and its own token, as vLLM does it. (transformers has a layer of its own for each.)
    """
    mtp, seen = original(size), torch.tensor([tokens])
    hidden = qwen.original(size)(seen[:, :-1], output_hidden_states=True).hidden_states[-1]
    last: list[Tensor] = []
    hook = mtp.layers[0].register_forward_hook(lambda module, args, out: last.append(out[:, -1:]))
    caches = MtpCache(config=mtp.config)
    given, positions = seen[:, 1:], torch.arange(1, len(tokens))[None]
    found = []
    for _ in range(count):
        token, _, _ = mtp(
            input_ids=given,
            last_hidden_states=hidden,
            attention_mask=torch.ones_like(given),
            position_ids=positions,
            mtp_cache=caches,
        )
        found.append(int(token))
        given, hidden, positions = token, last[-1], positions[:, -1:] + 1
    hook.remove()
    return found


def drafts_of(made: Engine, slot: int) -> list[int]:
    """What the engine's next step verifies."""
    seen: list[list[int]] = []
    verify = made.model.verify

    def watched(batch: Any) -> Any:
        seen.append(batch.tokens[slot].tolist())
        return verify(batch)

    made.model.verify = watched  # type: ignore[method-assign]
    made.step([slot])
    del made.model.verify
    return seen[0]


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 90])
@pytest.mark.parametrize("drafts", [1, 2, 4])
def test_drafts_after_a_prompt(drafts: int, length: int) -> None:
    prompt = qwen.prompt(length)
    made = qwen.engine(drafts, prefill_chunk=32)
    pending = made.start(1, prompt)
    assert drafts_of(made, 1) == [pending, *drafts_of_transformers([*prompt, pending], drafts)]


def test_drafts_of_a_mixture_of_experts() -> None:
    prompt = qwen.prompt(70)
    made = qwen.engine(3, size="tiny-moe", prefill_chunk=32)
    pending = made.start(1, prompt)
    assert drafts_of(made, 1) == [pending, *drafts_of_transformers([*prompt, pending], 3, "tiny-moe")]


@pytest.mark.parametrize("counts", [[0], [1], [2], [3], [2, 0, 1], [3, 3, 0], [0, 0, 0, 2]])
def test_drafts_after_steps_of_which_some_held(counts: list[int]) -> None:
    prompt = qwen.prompt(21)
    coming = qwen.expected(prompt, 16)
    made = qwen.engine(3)
    said = [made.start(1, prompt)]
    for right in counts:
        (new,) = made.step([1], {1: qwen.guesses(coming[len(said) :], right, 3)})
        assert len(new) == 1 + right
        said += new
    assert drafts_of(made, 1) == [said[-1], *drafts_of_transformers([*prompt, *said], 3)]
