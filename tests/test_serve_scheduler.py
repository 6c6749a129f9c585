"""The serving example's scheduler, against a sequential oracle and an engine that checks how it is called."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from fake_engine import SECONDS, FakeEngine, ended, expected, started, wait_until
from hypothesis import given
from hypothesis import strategies as st
from scheduler import Output, Refused, Request, Scheduler, TooMany


@dataclass
class Client:
    """Keeps what is delivered."""

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    error: str = ""
    done: threading.Event = field(default_factory=threading.Event)
    on_output: Callable[[], None] = lambda: None

    def __call__(self, output: Output) -> None:
        assert self.finish is None, "an output after the last"
        self.tokens += output.tokens
        self.finish, self.error = output.finish, output.error
        if self.finish is not None:
            self.done.set()
        self.on_output()


# --- every request gets its own tokens --------------------------------------------------------------------------------


@dataclass
class Plan:
    prompt: list[int]
    max_tokens: int
    seed: int
    stop: frozenset[int]
    arrives: int
    """After so many calls of the engine."""
    leaves: int | None
    """The client goes after so many tokens."""


TOKENS = st.integers(0, 9)
PLANS = st.builds(
    Plan,
    prompt=st.lists(TOKENS, min_size=1, max_size=8),
    max_tokens=st.integers(1, 24),
    seed=st.integers(0, 3),
    stop=st.frozensets(TOKENS, max_size=2),
    arrives=st.integers(0, 40),
    leaves=st.none() | st.integers(1, 6),
)


class Crowd:
    """Clients that come and go at calls of the engine: all in its thread, so that a failing example fails again."""

    def __init__(self, plans: list[Plan], engine: FakeEngine) -> None:
        self.plans = plans
        self.clients = [Client(on_output=lambda n=n: self.served(n)) for n in range(len(plans))]  # type: ignore[misc]
        self.left: set[int] = set()
        self.to_come = sorted(range(len(plans)), key=lambda n: plans[n].arrives)
        self.order = [plans[n].prompt for n in self.to_come]
        self.over = threading.Event()
        self.requests: dict[int, Request] = {}
        self.scheduler = started(engine, max_waiting=len(plans))
        engine._before = lambda call: self.arrive(len(engine.calls))

    def arrive(self, now: int, at_least: int = 0) -> None:
        while self.to_come and (self.plans[self.to_come[0]].arrives <= now or at_least > 0):
            number = self.to_come.pop(0)
            plan = self.plans[number]
            at_least -= 1
            self.requests[number] = Request(
                plan.prompt, self.clients[number], plan.max_tokens, seed=plan.seed, stop_token_ids=plan.stop
            )
            self.scheduler.submit([self.requests[number]])

    def served(self, number: int) -> None:
        client, leaves = self.clients[number], self.plans[number].leaves
        if client.finish is None and leaves is not None and len(client.tokens) >= leaves and number not in self.left:
            self.left.add(number)
            self.scheduler.cancel(self.requests[number])
        here = [n for n in self.requests if n not in self.left and self.clients[n].finish is None]
        if not here and self.to_come:
            self.arrive(0, at_least=1)  # nobody would ever come to an idle engine
        elif not here:
            self.over.set()


@given(
    plans=st.lists(PLANS, min_size=1, max_size=12),
    max_batch=st.integers(1, 4),
    speculative=st.integers(0, 3),
    max_model_len=st.integers(9, 24),
)
def test_each_request_gets_the_tokens_that_it_would_get_alone(
    plans: list[Plan], max_batch: int, speculative: int, max_model_len: int
) -> None:
    engine = FakeEngine(max_batch, max_model_len, speculative, vocab=10)
    crowd = Crowd(plans, engine)
    crowd.arrive(0, at_least=1)
    assert crowd.over.wait(SECONDS)
    ended(crowd.scheduler)
    assert not crowd.scheduler.error  # the engine was called as it may be
    assert not engine.slots
    for number, (plan, client) in enumerate(zip(plans, crowd.clients)):
        tokens, finish = expected(plan.prompt, plan.max_tokens, plan.stop, max_model_len, 10, plan.seed)
        if number in crowd.left:
            assert client.tokens == tokens[: len(client.tokens)] and client.finish is None
        else:
            assert (client.tokens, client.finish) == (tokens, finish)
    assert engine.prompts == crowd.order
    counts = crowd.scheduler.counts
    assert counts.finished == Counter(client.finish or "cancelled" for client in crowd.clients)
    assert counts.prompt_tokens == sum(len(plan.prompt) for plan in plans)
    assert counts.accepted == Counter(engine.accepted)
    assert counts.drafts == speculative * len(engine.accepted)
    assert counts.tokens == sum(len(client.tokens) for client in crowd.clients)


def test_requests_of_one_token_do_not_starve_the_others() -> None:
    engine = FakeEngine(max_batch=2, speculative=0)
    scheduler = started(engine)
    long, short = Client(), [Client() for _ in range(50)]
    scheduler.submit(
        [Request([1], long, max_tokens=40)] + [Request([2, n], one, max_tokens=1) for n, one in enumerate(short)]
    )
    assert long.done.wait(SECONDS) and all(one.done.wait(SECONDS) for one in short)
    ended(scheduler)
    between_steps = " ".join(call for call in engine.calls if call != "stop").split("step")
    assert max(starts.count("start") for starts in between_steps) == engine.max_batch


def test_a_request_that_waits_and_is_cancelled_is_never_started() -> None:
    gate = threading.Event()
    engine = FakeEngine(max_batch=1, before=lambda call: gate.wait(SECONDS))
    scheduler = started(engine)
    first, second, third = Client(), Client(), Client()
    requests = [Request([n], client, max_tokens=3) for n, client in enumerate((first, second, third))]
    scheduler.submit(requests)
    wait_until(lambda: scheduler.running() == 1)
    scheduler.cancel(requests[1])
    assert scheduler.waiting() == 1
    gate.set()
    assert first.done.wait(SECONDS) and third.done.wait(SECONDS)
    scheduler.cancel(requests[0])  # it has ended: nothing happens
    ended(scheduler)
    assert engine.prompts == [[0], [2]] and not second.tokens
    assert scheduler.counts.finished == Counter(length=2, cancelled=1)


def test_a_full_queue_takes_all_of_a_call_or_nothing() -> None:
    gate = threading.Event()
    scheduler = started(FakeEngine(max_batch=1, before=lambda call: gate.wait(SECONDS)), max_waiting=2)
    clients = [Client() for _ in range(5)]
    scheduler.submit([Request([1], clients[0])])
    wait_until(lambda: scheduler.running() == 1)
    scheduler.submit([Request([1], clients[1])])
    with pytest.raises(TooMany, match="at most 2"):
        scheduler.submit([Request([1], clients[2]), Request([1], clients[3])])
    scheduler.submit([Request([1], clients[4])])
    gate.set()
    assert all(clients[n].done.wait(SECONDS) for n in (0, 1, 4))
    ended(scheduler)
    assert not clients[2].tokens and not clients[3].tokens
    assert scheduler.counts.finished == Counter(length=3, refused=2)


# --- when the engine fails --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["start", "step", "stop"])
def test_an_engine_that_raises_fails_what_runs_and_what_waits_and_is_not_called_again(fails: str) -> None:
    gate = threading.Event()

    def before(call: str) -> None:
        gate.wait(SECONDS)
        if call == fails:
            raise RuntimeError("an illegal memory access")

    engine = FakeEngine(max_batch=2, before=before)
    scheduler = started(engine)
    clients = [Client() for _ in range(4)]
    # The first ends with its first token: its client has all, whether or not the slot can be freed.
    scheduler.submit([Request([1], client, max_tokens=8 if n else 1) for n, client in enumerate(clients)])
    gate.set()
    assert all(client.done.wait(SECONDS) for client in clients)
    assert scheduler.join(SECONDS) and scheduler.state() == "failed"
    assert engine.calls[-1] == fails and engine.calls.count(fails) == 1
    failed = [client for client in clients if client.finish == "error"]
    assert len(failed) == (4 if fails == "start" else 3)
    assert all("an illegal memory access" in client.error for client in failed)
    with pytest.raises(Refused, match="an illegal memory access"):
        scheduler.submit([Request([1], Client())])
    assert not scheduler.running() and not scheduler.waiting()


def test_an_engine_that_answers_for_too_few_slots_has_failed() -> None:
    class Short(FakeEngine):
        def step(self, slots: Any) -> list[list[int]]:
            return super().step(slots)[:-1]

    scheduler = started(Short())
    client = Client()
    scheduler.submit([Request([1], client)])
    assert client.done.wait(SECONDS) and client.finish == "error"
    assert scheduler.join(SECONDS)


def test_nothing_is_taken_before_the_engine_is_made_or_when_it_cannot_be() -> None:
    gate = threading.Event()

    def make() -> FakeEngine:
        gate.wait(SECONDS)
        raise MemoryError("no room")

    scheduler = Scheduler(make)
    scheduler.start()
    with pytest.raises(Refused, match="starting"):
        scheduler.submit([Request([1], Client())])
    gate.set()
    assert scheduler.join(SECONDS)
    assert (scheduler.state(), scheduler.error) == ("failed", "MemoryError: no room")


# --- the end ----------------------------------------------------------------------------------------------------------


def test_draining_finishes_what_was_taken_and_takes_nothing_new() -> None:
    gate = threading.Event()
    scheduler = started(FakeEngine(max_batch=1, before=lambda call: gate.wait(SECONDS)))
    clients = [Client(), Client()]
    scheduler.submit([Request([1], client) for client in clients])
    scheduler.drain(SECONDS)
    assert scheduler.state() == "stopping"
    with pytest.raises(Refused, match="stopping"):
        scheduler.submit([Request([1], Client())])
    gate.set()
    assert scheduler.join(SECONDS)
    assert [client.finish for client in clients] == ["length", "length"]


def test_what_has_not_finished_when_the_time_is_up_fails() -> None:
    engine = FakeEngine(max_batch=1, max_model_len=10**9)
    scheduler = started(engine)
    clients = [Client(), Client()]
    scheduler.submit([Request([1], client, max_tokens=10**9) for client in clients])
    wait_until(lambda: len(clients[0].tokens) > 5)
    scheduler.drain(0)
    assert scheduler.join(SECONDS)
    assert [(client.finish, client.error) for client in clients] == [("error", "the server is stopping")] * 2
    assert not clients[1].tokens


def test_an_idle_scheduler_ends_at_once() -> None:
    engine = FakeEngine()
    ended(started(engine))
    assert not engine.calls
