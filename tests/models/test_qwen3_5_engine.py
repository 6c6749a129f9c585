"""The engine's limits: what it refuses, how far a request goes, and its steps before the first request."""

from __future__ import annotations

import pytest
import qwen

from aot_cache.models.qwen3_5.engine import Engine, make_engine


@pytest.mark.parametrize("slot", [-1, 4, 2])
def test_a_slot_that_cannot_be_taken(slot: int) -> None:
    made = qwen.engine()
    made.start(2, [1])
    with pytest.raises(ValueError, match=f"slot {slot} is taken, or not one of 4"):
        made.start(slot, [1])


@pytest.mark.parametrize("length", [0, 20, 21])
def test_a_prompt_that_does_not_fit(length: int) -> None:
    with pytest.raises(ValueError, match=f"a prompt of 1 to 19 tokens, not of {length}"):
        qwen.engine(max_model_len=20).start(0, [1] * length)


def test_a_seed_that_is_no_int64() -> None:
    made = qwen.engine()
    with pytest.raises(ValueError, match="Overflow"):
        made.start(0, [1], 1.0, 2**63)
    made.start(0, [1])  # still free


def test_a_slot_without_a_request() -> None:
    made = qwen.engine()
    made.start(0, [1])
    made.stop(0)
    made.stop(0)  # harmless
    for slots in ([0], [3]):
        with pytest.raises(ValueError, match=f"slot {slots[0]} holds no request"):
            made.step(slots)


@pytest.mark.parametrize("slots", [[], [1, 1]])
def test_slots_once_each(slots: list[int]) -> None:
    made = qwen.engine()
    made.start(1, [1])
    with pytest.raises(ValueError, match="one slot or more, each once"):
        made.step(slots)


def test_a_running_request_is_no_padding() -> None:
    """It would take in token 0 at place 1."""
    made = qwen.engine(2)
    right = {slot: qwen.expected(qwen.prompt(length), 12) for slot, length in ((0, 4), (2, 6))}
    said = {2: [made.start(2, qwen.prompt(6))], 0: [made.start(0, qwen.prompt(4))]}
    with pytest.raises(ValueError, match=r"slots \[0\] have to step, too: 4 slots"):
        made.step([2])
    made.start(3, [1])
    with pytest.raises(ValueError, match=r"slots \[3\] have to step, too: 4 slots"):
        made.step([0, 2])
    made.stop(3)
    for slots in ([0], [0], [0, 2], [2, 0], [0]):  # what is above the size that runs is not written
        for slot, new in zip(slots, made.step(slots), strict=True):
            said[slot] += new
    assert {slot: tokens == right[slot][: len(tokens)] for slot, tokens in said.items()} == {0: True, 2: True}


@pytest.mark.parametrize("drafts", [{0: [1]}, {0: [1, 2, 3]}, {1: [1, 2]}])
def test_drafts_that_do_not_go_with_the_step(drafts: dict[int, list[int]]) -> None:
    made = qwen.engine(2)
    made.start(0, [1])
    with pytest.raises(ValueError, match=r"2 drafts for each of slots \[0\]"):
        made.step([0], drafts)


def test_drafts_without_speculation() -> None:
    made = qwen.engine()
    made.start(0, [1])
    with pytest.raises(ValueError, match="0 drafts for each"):
        made.step([0], {0: [1]})


def test_sizes() -> None:
    assert qwen.engine(max_batch=6).sizes == [1, 2, 4, 6]
    assert qwen.engine(max_batch=8).sizes == [1, 2, 4, 8]
    assert qwen.engine(max_batch=1).sizes == [1]
    assert Engine(qwen.model(), [4, 3]).sizes == [3, 4]
    for sizes in ([1, 2], [1, 8]):
        with pytest.raises(ValueError, match="sizes up to 4"):
            Engine(qwen.model(), sizes)


@pytest.mark.parametrize("length", [1, 30, 63])
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_to_the_last_token(drafts: int, length: int) -> None:
    """Prompt and output are max_model_len tokens; a step may say more, which is right as long as there is any."""
    made = qwen.engine(drafts, max_model_len=64, prefill_chunk=16)
    prompt, most = qwen.prompt(length), 64 - length
    right = qwen.expected(prompt, most + 3)

    def oracle(_: int, at: int) -> list[int]:
        return qwen.guesses(right[at:], drafts, drafts)

    assert qwen.serve(made, {3: (prompt, most)}, oracle if drafts else None) == {3: right[:most]}


def test_a_request_that_has_all_of_its_tokens() -> None:
    made = qwen.engine(max_model_len=8)
    made.start(0, qwen.prompt(6))
    made.step([0])
    with pytest.raises(ValueError, match="slot 0 has all of its 8 tokens"):
        made.step([0])
    made.stop(0)
    made.start(0, qwen.prompt(7))
    with pytest.raises(ValueError, match="all of its 8 tokens"):
        made.step([0])


@pytest.mark.parametrize("drafts", [0, 2])
def test_what_is_captured(drafts: int) -> None:
    """Without a GPU each part runs once for each size, the largest first; requests that come later do not see it."""
    made = qwen.engine(drafts)
    told: list[tuple[object, ...]] = []
    reports = made.capture(progress=lambda *facts: told.append(facts))
    assert [*reports] == (["draft", "verify"] if drafts else ["decode"]) == [*made.steps]
    assert told
    for report in reports.values():
        assert [entry["shape"] for entry in report] == [4, 2, 1]
    asked = {2: (qwen.prompt(5), 6)}
    assert qwen.serve(made, asked) == {2: qwen.expected(qwen.prompt(5), 6)}


def test_make_engine_with_random_weights() -> None:
    made = make_engine(qwen.tiny(1), "cpu", layers=4)
    assert len(made.model.net.layers) == 4 and made.vocab == 512 and made.speculative == 1
    assert len(qwen.serve(made, {0: ([1, 2, 3], 5)})[0]) == 5
