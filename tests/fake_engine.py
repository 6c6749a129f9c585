"""What tests of the serving example share: an engine without a model, which checks how it is called, and its scheduler."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from scheduler import Scheduler

SECONDS = 30  # how long a test waits for what must come


def oracle(prompt: Sequence[int], seed: int, vocab: int) -> Iterator[int]:
    """The tokens that follow a prompt, whatever else runs beside it."""
    rng = random.Random(f"{list(prompt)} {seed}")
    while True:
        yield rng.randrange(vocab)


def expected(
    prompt: Sequence[int], max_tokens: int, stop: Iterable[int], max_model_len: int, vocab: int, seed: int = 0
) -> tuple[list[int], str]:
    """A request's tokens and why it ends, one token after the other."""
    tokens: list[int] = []
    for token in oracle(prompt, seed, vocab):
        tokens.append(token)
        if token in stop:
            return tokens, "stop"
        if len(tokens) == max_tokens or len(prompt) + len(tokens) == max_model_len:
            return tokens, "length"
    raise AssertionError("the oracle has no end")


class FakeEngine:
    """Raises AssertionError where its caller breaks the interface. `before(call)` is run before each call is answered."""

    def __init__(
        self,
        max_batch: int = 4,
        max_model_len: int = 64,
        speculative: int = 2,
        vocab: int = 50,
        before: Callable[[str], object] = lambda call: None,
    ) -> None:
        self.max_batch = max_batch
        self.max_model_len = max_model_len
        self.speculative = speculative
        self.vocab = vocab
        self.calls: list[str] = []
        self.prompts: list[list[int]] = []
        self.accepted: list[int] = []
        self.slots: dict[int, Iterator[int]] = {}
        self._before = before
        self._drafts = random.Random(0)
        self._thread: int | None = None

    def _called(self, call: str) -> None:
        self._thread = self._thread or threading.get_ident()
        assert threading.get_ident() == self._thread, "called from two threads"
        self.calls.append(call)
        self._before(call)

    def start(self, slot: int, prompt: Sequence[int], temperature: float = 0.0, seed: int = 0) -> int:
        self._called("start")
        lowest = next(number for number in itertools.count() if number not in self.slots)
        assert slot == lowest < self.max_batch, f"slot {slot} where {lowest} is the lowest that is free"
        self.prompts.append(list(prompt))
        self.slots[slot] = oracle(prompt, seed, self.vocab)
        return next(self.slots[slot])

    def step(self, slots: Sequence[int]) -> list[list[int]]:
        self._called("step")
        assert set(slots) == set(self.slots) and len(slots) == len(self.slots) > 0, "not what runs"
        answer = []
        for slot in slots:
            accepted = self._drafts.randint(0, self.speculative)
            self.accepted.append(accepted)
            answer.append(list(itertools.islice(self.slots[slot], 1 + accepted)))
        return answer

    def stop(self, slot: int) -> None:
        self._called("stop")
        del self.slots[slot]


def started(engine: FakeEngine, **options: Any) -> Scheduler:
    scheduler = Scheduler(lambda: engine, **options)
    scheduler.start()
    wait_until(lambda: scheduler.state() == "ready")
    return scheduler


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.001)


def ended(scheduler: Scheduler) -> None:
    scheduler.drain(SECONDS)
    assert scheduler.join(SECONDS)
