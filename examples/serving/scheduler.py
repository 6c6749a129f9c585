"""Continuous batching: one thread owns the engine, and requests come and go between its steps.

The thread makes the engine, too: torch keeps the current device, the grad mode and (since 2.13) the configuration of Dynamo and
Inductor for each thread, so an engine that is made in one thread and stepped in another runs with other settings.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

LOG = logging.getLogger("serve")


ENDS = ("stop", "length", "error", "cancelled", "refused")
"""How requests end; the last were never taken."""


class Engine(Protocol):
    """A model on a device. Every call blocks, and all of them come from one thread."""

    max_batch: int
    """Slots."""
    max_model_len: int
    """Prompt and output tokens of a request, together."""
    speculative: int
    """Drafts a step; 0: none."""
    vocab: int

    def start(self, slot: int, prompt: Sequence[int], temperature: float = 0.0, seed: int = 0) -> int:
        """Prefill; the first token."""
        ...

    def step(self, slots: Sequence[int]) -> list[list[int]]:
        """One decode, or one verification of drafts: 1 to 1 + speculative new tokens for each of the slots."""
        ...

    def stop(self, slot: int) -> None:
        """The slot is free again."""
        ...


class Refused(Exception):
    """A request that was not taken, or not finished; says why."""


class TooMany(Refused):
    """The queue is full: try again later."""


@dataclass(frozen=True)
class Output:
    """New tokens of a request."""

    tokens: list[int]
    finish: str | None = None
    """`stop` (the last token is one of the request's stop tokens), `length` or `error`; None: more will come."""
    error: str = ""


@dataclass(eq=False)
class Request:
    """What a client wants. `deliver` is called from the engine's thread and must not block."""

    prompt: Sequence[int]
    deliver: Callable[[Output], None]
    max_tokens: int = 16
    temperature: float = 0.0
    seed: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    given: int = field(default=0, init=False)
    """Tokens delivered so far."""
    cancelled: bool = field(default=False, init=False)


@dataclass
class Counts:
    """What happened since the start. The engine's thread writes all but `finished`, which has the scheduler's lock."""

    finished: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended, one of `ENDS`."""
    accepted: Counter[int] = field(default_factory=Counter)
    """Steps of a request by the number of drafts that were accepted in them."""
    prompt_tokens: int = 0
    tokens: int = 0
    drafts: int = 0
    """Draft tokens that were proposed."""


class Scheduler:
    """Runs requests in the order in which they came, at most `engine.max_batch` at once.

    An exception of the engine ends the service: what runs and what waits fails, and nothing new is taken. A batch is one
    computation over the caches of all its slots, so none of them can be trusted afterwards, and most CUDA errors stay until
    the process ends. Whoever watches `/health` starts a new one, which a bundle makes cheap.
    """

    def __init__(self, make_engine: Callable[[], Engine], max_waiting: int = 256) -> None:
        self.counts = Counts()
        self.engine: Engine | None = None
        self.error = ""
        """Why the engine is gone; empty: it is not."""
        self.max_waiting = max_waiting
        self._make_engine = make_engine
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._changed = threading.Condition()  # guards _waiting, _deadline and counts.finished
        self._deadline: float | None = None
        # A daemon: an engine that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # --- from any thread --------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def state(self) -> str:
        """`starting`, `ready`, `stopping` or `failed`."""
        if self.error:
            return "failed"
        if self._deadline is not None:
            return "stopping"
        return "ready" if self.engine is not None else "starting"

    def running(self) -> int:
        return len(self._running)

    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        """Take all of these requests, or none.

        Raises:
            TooMany: more would wait than may.
            Refused: the service is starting, stopping or gone.
        """
        with self._changed:
            state = self.state()
            if state != "ready":
                self.counts.finished["refused"] += len(requests)
                raise Refused(f"the engine is {state}" + (f": {self.error}" if self.error else ""))
            if len(self._waiting) + len(requests) > self.max_waiting:
                self.counts.finished["refused"] += len(requests)
                raise TooMany(f"{len(self._waiting)} requests are waiting, and at most {self.max_waiting} may")
            self._waiting.extend(requests)
            self._changed.notify()

    def cancel(self, request: Request) -> None:
        """Nobody wants the rest: the slot is free before the next step. Harmless when the request has ended."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
                self.counts.finished["cancelled"] += 1

    def drain(self, seconds: float) -> None:
        """Take nothing new; finish what runs and waits, and fail what has not finished after so many seconds."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()

    def join(self, seconds: float) -> bool:
        """Wait, after `drain`; whether the engine's thread has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self.engine = self._make_engine()
            while self._work_is_there():
                self._admit(engine)
                self._step(engine)
            self._fail_all("the server is stopping")
        except BaseException as error:
            LOG.exception("the engine failed")
            with self._changed:
                self.error = f"{type(error).__name__}: {error}"
            self._fail_all(f"the engine failed: {self.error}")

    def _work_is_there(self) -> bool:
        """Sleep until there is something to do; False when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._deadline is not None)
            if self._deadline is None:
                return True
            return bool(self._waiting or self._running) and time.monotonic() < self._deadline

    def _admit(self, engine: Engine) -> None:
        """Prefill before decoding: steps of a full batch are the cheapest for each token.

        At most a batch of them, so that requests that end with their first token do not keep the others from being stepped.
        """
        for _ in range(engine.max_batch):
            slot = self._lowest_free_slot(engine)
            with self._changed:
                if slot is None or not self._waiting:
                    return
                request = self._running[slot] = self._waiting.popleft()
            self.counts.prompt_tokens += len(request.prompt)
            self._give(engine, slot, [engine.start(slot, request.prompt, request.temperature, request.seed)])

    def _lowest_free_slot(self, engine: Engine) -> int | None:
        """The engine computes all slots up to the highest that is taken."""
        return next((slot for slot in range(engine.max_batch) if slot not in self._running), None)

    def _step(self, engine: Engine) -> None:
        for slot in [slot for slot, request in self._running.items() if request.cancelled]:
            self._free(engine, slot, "cancelled")
        slots = sorted(self._running)
        if not slots:
            return
        self.counts.drafts += engine.speculative * len(slots)
        for slot, tokens in zip(slots, engine.step(slots), strict=True):
            self.counts.accepted[len(tokens) - 1] += 1
            self._give(engine, slot, tokens)

    def _give(self, engine: Engine, slot: int, tokens: list[int]) -> None:
        """Hand out what is within the request's limits; a step with drafts may go beyond its end."""
        request = self._running[slot]
        room = min(request.max_tokens, engine.max_model_len - len(request.prompt)) - request.given
        kept, finish = tokens[:room], "length" if len(tokens) >= room else None
        for number, token in enumerate(kept, 1):
            if token in request.stop_token_ids:
                kept, finish = kept[:number], "stop"
                break
        request.given += len(kept)
        self.counts.tokens += len(kept)
        if not request.cancelled:
            request.deliver(Output(kept, finish))
        if finish is not None:
            self._free(engine, slot, finish)

    def _free(self, engine: Engine, slot: int, finish: str) -> None:
        del self._running[slot]
        with self._changed:
            self.counts.finished[finish] += 1
        engine.stop(slot)

    def _fail_all(self, why: str) -> None:
        with self._changed:
            failed = [*self._running.values(), *self._waiting]
            self._running.clear()
            self._waiting.clear()
            self.counts.finished["error"] += len(failed)
        for request in failed:
            request.deliver(Output([], "error", why))
