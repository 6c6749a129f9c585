"""After a verification a slot's caches are those of plain decoding over what holds, whatever was refused; others stay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import qwen
import torch
from torch import Tensor

from aot_cache.models.qwen3_5.engine import Engine
from aot_cache.models.qwen3_5.model import Model

CLOSE = {"rtol": 1e-3, "atol": 1e-4}
"""float32, sums in another order: one token after the other, several at a time, or in chunks of 64; seen: 2e-5."""

COUNTS = [(drafts, right) for drafts in (1, 2, 3) for right in range(drafts + 1)]


def held(model: Model, slot: int, length: int) -> list[Tensor]:
    """What a slot's caches say of a request of which `length` tokens were taken in."""
    found = []
    for layer, (one, other) in zip(model.net.layers, model.caches, strict=True):
        if layer.block_type == "linear_attention":
            found += [one[slot], other[slot]]
        else:
            found += [one[slot, :, :length], other[slot, :, :length]]
    return found


def drafted(model: Model, slot: int, length: int) -> list[Tensor]:
    assert model.draft_cache is not None
    return [one[slot, :, :length] for one in model.draft_cache]


def everything(model: Model) -> list[Tensor]:
    caches = [*model.caches, *([model.draft_cache] if model.draft_cache else [])]
    return [tensor for pair in caches for tensor in pair]


def taken_in(prompt: tuple[int, ...], drafts: int = 1) -> Model:
    """A model that has this prompt in slot 0."""
    made = qwen.engine(drafts)
    made.start(0, prompt)
    return made.model


def verified(made: Engine, slot: int, prompt: tuple[int, ...], counts: list[int]) -> int:
    """Serve steps in which so many drafts hold; how many tokens were taken in."""
    coming = qwen.expected(prompt, 16)
    at = 1
    assert made.start(slot, prompt) == coming[0]
    for right in counts:
        (new,) = made.step([slot], {slot: qwen.guesses(coming[at:], right, made.speculative)})
        assert new == coming[at : at + 1 + right], "not as many drafts hold as are right"
        at += len(new)
    return len(prompt) + at - 1


@pytest.mark.parametrize(("drafts", "right"), COUNTS)
@pytest.mark.parametrize("length", [2, 65])
def test_caches_after_a_verification(length: int, drafts: int, right: int) -> None:
    prompt = qwen.prompt(length)
    made, plain = qwen.engine(drafts), qwen.engine()
    reached = verified(made, 1, prompt, [right])
    verified(plain, 1, prompt, [0] * (reached - length))
    torch.testing.assert_close(held(made.model, 1, reached), held(plain.model, 1, reached), **CLOSE)


@pytest.mark.parametrize("counts", [[0, 3, 1, 2], [3, 0, 0, 3], [1, 1, 2, 0]])
def test_caches_after_several(counts: list[int]) -> None:
    prompt = qwen.prompt(30)
    made, plain = qwen.engine(3), qwen.engine()
    reached = verified(made, 1, prompt, counts)
    verified(plain, 1, prompt, [0] * (reached - 30))
    torch.testing.assert_close(held(made.model, 1, reached), held(plain.model, 1, reached), **CLOSE)


@pytest.mark.parametrize("counts", [[0], [1], [2], [3], [2, 0, 3, 1]])
def test_the_drafts_cache_follows(counts: list[int]) -> None:
    """As if all had been one prompt: the first draft after a verification brings it up to date."""
    prompt = qwen.prompt(20)
    made = qwen.engine(3)
    reached = verified(made, 1, prompt, counts)
    made.step([1])
    whole = taken_in((*prompt, *qwen.expected(prompt, 16)[: reached - 20]))
    torch.testing.assert_close(drafted(made.model, 1, reached), drafted(whole, 0, reached), **CLOSE)


def test_a_prompt_leaves_what_decoding_leaves() -> None:
    prompt = qwen.prompt(70)
    made = qwen.engine()
    verified(made, 1, prompt[:40], [])
    batch = made.model.batch(2, 1)
    for place, token in enumerate(prompt[40:], 40):
        batch.tokens[1], batch.lengths[1] = token, place
        made.model.decode(batch)
    torch.testing.assert_close(held(made.model, 1, 70), held(taken_in(prompt), 0, 70), **CLOSE)


@pytest.mark.parametrize("what", ["decode", "verify", "draft"])
def test_a_step_writes_to_its_slots_only(what: str) -> None:
    model = qwen.model(2)
    for tensor in everything(model):
        tensor.normal_()
    before = [tensor.clone() for tensor in everything(model)]
    getattr(model, what)(model.batch(2, 1 if what == "decode" else 3))
    for was, tensor in zip(before, everything(model), strict=True):
        assert torch.equal(was[2:], tensor[2:])
    changed = [not torch.equal(was[:2], tensor[:2]) for was, tensor in zip(before, everything(model), strict=True)]
    assert changed == ([False] * 8 + [True] * 2 if what == "draft" else [True] * 8 + [False] * 2)


def test_a_prompt_writes_to_its_slot_only() -> None:
    model = qwen.model(2, prefill_chunk=16)
    for tensor in everything(model):
        tensor.normal_()
    before = [tensor.clone() for tensor in everything(model)]
    Engine(model).start(2, qwen.prompt(40))
    for was, tensor in zip(before, everything(model), strict=True):
        assert torch.equal(was[[0, 1, 3]], tensor[[0, 1, 3]]) and not torch.equal(was[2], tensor[2])


@pytest.mark.parametrize("right", [0, 1, 2])
def test_neighbours_do_not_matter(right: int) -> None:
    """Each row of a verification has its own count."""
    prompts = {slot: qwen.prompt(length) for slot, length in enumerate((9, 33, 5))}
    made = qwen.engine(2)
    drafts = {}
    for slot, prompt in prompts.items():
        made.start(slot, prompt)
        drafts[slot] = qwen.guesses(qwen.expected(prompt, 16)[1:], (right + slot) % 3, 2)
    new = made.step([0, 1, 2], drafts)
    assert [len(tokens) - 1 for tokens in new] == [(right + slot) % 3 for slot in prompts]
    for slot, prompt in prompts.items():
        alone = qwen.engine(2)
        reached = verified(alone, slot, prompt, [(right + slot) % 3])
        torch.testing.assert_close(held(made.model, slot, reached), held(alone.model, slot, reached), **CLOSE)


def test_without_a_draft_there_is_none_to_make() -> None:
    model, drafting = qwen.model(), qwen.model(1)
    no_hidden = replace(drafting.batch(1, 2), hidden=None)
    with pytest.raises(ValueError, match="without a draft"):
        model.draft(model.batch(1, 1))
    with pytest.raises(ValueError, match="without a draft"):
        drafting.draft(no_hidden)
