"""Samples depend on the request's seed alone, and follow the softmax; temperature 0 is greedy."""

from __future__ import annotations

import math

import pytest
import qwen
import torch
from torch import Tensor

from aot_cache.models.qwen3_5 import compiled_layers

VOCAB = 512
HOT = {"temperature": 0.8, "seed": 1234}


def sampled(logits: Tensor, temperature: float, seeds: Tensor, position: int = 5) -> Tensor:
    """One token for each seed."""
    count = len(seeds)
    given = logits.expand(count, 1, -1), torch.full((count, 1), position), torch.full((count,), temperature)
    return compiled_layers._sampled(*given, seeds)[:, 0]


# --- of a request ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_says_the_same_with_and_without_speculation() -> None:
    asked = {0: (qwen.prompt(9), 20)}
    plain = qwen.serve(qwen.engine(), asked, **HOT)
    assert plain != qwen.serve(qwen.engine(), asked), "not what is greedy"
    for drafts in (1, 3):
        assert qwen.serve(qwen.engine(drafts), asked, **HOT) == plain

        def oracle(slot: int, at: int, drafts: int = drafts) -> list[int]:
            return qwen.guesses(plain[0][at:], at % (drafts + 1), drafts)

        assert qwen.serve(qwen.engine(drafts), asked, oracle, **HOT) == plain


def test_a_right_draft_of_a_sample_holds() -> None:
    plain = qwen.serve(qwen.engine(), {0: (qwen.prompt(9), 20)}, **HOT)[0]
    made = qwen.engine(3)
    assert made.start(0, qwen.prompt(9), **HOT) == plain[0]
    assert made.step([0], {0: plain[1:4]}) == [plain[1:5]]


def test_slot_and_neighbours_do_not_matter() -> None:
    alone = qwen.serve(qwen.engine(), {0: (qwen.prompt(9), 12)}, **HOT)[0]
    made = qwen.engine(2, prefill_chunk=4)
    out = [made.start(2, qwen.prompt(9), **HOT)]
    made.start(0, qwen.prompt(30), 2.0, 77)
    made.start(3, qwen.prompt(3), 0.0, 5)
    while len(out) < 12:
        out += made.step([0, 2, 3])[1]
    assert out[:12] == alone


def test_another_seed_says_something_else() -> None:
    said = {tuple(qwen.serve(qwen.engine(), {0: (qwen.prompt(9), 8)}, temperature=1.0, seed=n)[0]) for n in range(5)}
    assert len(said) == 5


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 1e-30])
def test_temperatures_next_to_nothing_are_greedy(temperature: float) -> None:
    asked = {1: (qwen.prompt(9), 10)}
    said = qwen.serve(qwen.engine(2), asked, temperature=temperature, seed=2**63 - 1)
    assert said == {1: qwen.expected(qwen.prompt(9), 10)}


@pytest.mark.parametrize("temperature", [100.0, 1e30, 1e38, 1e300, math.inf])
@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_large_temperatures_say_anything(temperature: float, seed: int) -> None:
    said = qwen.serve(qwen.engine(2), {1: (qwen.prompt(9), 30)}, temperature=temperature, seed=seed)[1]
    assert all(0 <= token < VOCAB for token in said)
    assert len(set(said)) > 20, "not the first tokens of the vocabulary again and again"


# --- the noise ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("first", [0, 2**31, 2**63 - 8000])
def test_frequencies_follow_softmax(first: int, temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -1.0, -2.0, -60.0])
    seeds = first + torch.arange(8000)
    found = torch.bincount(sampled(logits, temperature, seeds), minlength=8)
    share = (logits / temperature).softmax(-1)
    assert found[7] == 0
    off = ((found - 8000 * share) ** 2 / (8000 * share))[:7].sum()
    assert off < 30, "chi-square of 6 degrees of freedom: 30 once in 25000 times"


def test_positions_are_independent() -> None:
    """One request, token after token, from logits that are all alike."""
    logits, places = torch.zeros(1, 8000, 8), torch.arange(8000)[None]
    said = compiled_layers._sampled(logits, places, torch.ones(1), torch.tensor([3]))[0]
    pairs = torch.bincount(said[:-1] * 8 + said[1:], minlength=64)
    assert ((pairs - 125.0) ** 2 / 125.0).sum() < 130, "chi-square of 63 degrees of freedom: 130 once in 10**6 times"


def test_no_token_wins_whatever_its_logit_is() -> None:
    """One in 2**24 had infinite noise, and a token in 68 of a large vocabulary was a random one, greedy ones too."""
    logits = torch.zeros(248_320)
    logits[7] = 100.0
    for part in torch.arange(200).split(20):
        assert (sampled(logits, 0.0, part) == 7).all()


def test_noise_reaches_far_enough() -> None:
    """Of a large vocabulary in which all are alike, all parts are said."""
    said = torch.cat([sampled(torch.zeros(248_320), 1.0, part) for part in torch.arange(200).split(20)])
    assert len(said.unique()) > 195
    parts = torch.bincount(said * 4 // 248_320, minlength=4)
    assert ((parts - 50.0) ** 2 / 50.0).sum() < 25, "chi-square of 3 degrees of freedom: 25 once in 60000 times"
