"""Greedy tokens are those of transformers' own `generate`, whatever the drafts, the slots and the parts of a prompt."""

from __future__ import annotations

import pytest
import qwen

LENGTHS = (1, 2, 63, 64, 65, 150)
NEW = 14
WAYS = ("decode", "own drafts", "an oracle's drafts")
SLOTS = (6, 0, 3, 1, 9, 4)  # in the order of their starts; 2, 5, 7 and 8 are free


def requests(wanted: int = NEW) -> dict[int, tuple[tuple[int, ...], int]]:
    """A prompt of each length; they end one after the other."""
    return {
        slot: (qwen.prompt(length), wanted + number)
        for number, (slot, length) in enumerate(zip(SLOTS, LENGTHS, strict=True))
    }


def said(
    way: str, asked: dict[int, tuple[tuple[int, ...], int]], drafts: int = 2, size: str = "tiny", **options: int
) -> dict[int, list[int]]:
    made = qwen.engine(0 if way == "decode" else drafts, size=size, max_batch=10, **options)
    if way != "an oracle's drafts":
        return qwen.serve(made, asked)
    right = wanted(asked, size)

    def oracle(slot: int, at: int) -> list[int]:
        return qwen.guesses(right[slot][at:], (slot + at) % (drafts + 1), drafts)

    return qwen.serve(made, asked, oracle)


def wanted(asked: dict[int, tuple[tuple[int, ...], int]], size: str = "tiny") -> dict[int, list[int]]:
    return {slot: qwen.expected(prompt, count, size) for slot, (prompt, count) in asked.items()}


@pytest.mark.parametrize("chunk", [16, 64, 512])
@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_those_of_transformers(way: str, chunk: int) -> None:
    asked = requests()
    assert said(way, asked, prefill_chunk=chunk) == wanted(asked)


@pytest.mark.parametrize("way", WAYS)
def test_tokens_of_a_mixture_of_experts(way: str) -> None:
    asked = requests()
    assert said(way, asked, size="tiny-moe", prefill_chunk=64) == wanted(asked, "tiny-moe")


@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize("drafts", [1, 3])
def test_other_numbers_of_drafts(way: str, drafts: int) -> None:
    asked = requests()
    assert said(way, asked, drafts) == wanted(asked)


@pytest.mark.parametrize("chunk", [1, 7])
def test_parts_of_any_length(chunk: int) -> None:
    asked = {0: (qwen.prompt(23), 6)}
    assert said("own drafts", asked, prefill_chunk=chunk) == wanted(asked)


@pytest.mark.parametrize("way", WAYS)
def test_a_slot_forgets_the_request_before(way: str) -> None:
    made = qwen.engine(0 if way == "decode" else 2, prefill_chunk=16)
    right = {n: qwen.expected(qwen.prompt(n), 8) for n in (65, 2, 40)}
    for length in right:
        oracle = (lambda _, at, coming=right[length]: qwen.guesses(coming[at:], at % 3, 2)) if "oracle" in way else None
        assert qwen.serve(made, {1: (qwen.prompt(length), 8)}, oracle) == {1: right[length]}


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_request_that_comes_later_disturbs_none(drafts: int) -> None:
    made = qwen.engine(drafts, prefill_chunk=16)
    first, second = (qwen.expected(qwen.prompt(length), 30) for length in (5, 70))
    one = [made.start(2, qwen.prompt(5))]
    for _ in range(3):
        one += made.step([2])[0]
    other = [made.start(0, qwen.prompt(70))]
    for _ in range(5):
        for tokens, new in zip((other, one), made.step([0, 2]), strict=True):
            tokens += new
    assert one == first[: len(one)] and other == second[: len(other)]
    assert len(one) >= 9 and len(other) >= 6
