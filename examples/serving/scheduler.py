"""Continuous batching: one thread owns the engine, and requests start and end between its steps.

The same thread creates the engine: the current device, the grad mode and (since torch 2.13) the configuration of Dynamo and
Inductor are per thread, so an engine created in one thread and stepped in another would run with other settings.
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


STOPPING = "the server is stopping"
ENDS = ("stop", "length", "error", "cancelled", "refused")
"""How requests end. `refused` ones were never accepted."""


class Engine(Protocol):
    """A model on a device. Every call blocks, and all calls come from one thread."""

    max_batch: int
    """Number of slots: requests that can run at once."""
    max_model_len: int
    """Maximum number of prompt and output tokens of a request together."""
    speculative: int
    """Draft tokens for each step; 0 without speculation."""
    vocab: int

    def start(self, slot: int, prompt: Sequence[int], temperature: float = 0.0, seed: int = 0) -> int:
        """Prefill a prompt; returns the first token."""
        ...

    def step(self, slots: Sequence[int]) -> list[list[int]]:
        """Run one decode, or one verification of drafts. Returns 1 to 1 + `speculative` new tokens for each slot."""
        ...

    def stop(self, slot: int) -> None:
        """Free the slot."""
        ...


class Refused(Exception):
    """A request was not accepted, with the reason."""


class TooMany(Refused):
    """The queue is full; try again later."""


@dataclass(frozen=True)
class Output:
    """New tokens of a request."""

    tokens: list[int]
    finish: str | None = None
    """`stop` (the last token is one of the request's stop tokens), `length` or `error`; None if more tokens follow."""
    error: str = ""


@dataclass(eq=False)
class Request:
    """A request of a client. `deliver` is called from the engine's thread, and must not block."""

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
    """Counts since the start. Only the engine's thread writes them, except `finished`, which the scheduler's lock protects."""

    finished: Counter[str] = field(default_factory=Counter)
    """Requests by how they ended, one of `ENDS`."""
    accepted: Counter[int] = field(default_factory=Counter)
    """Number of accepted drafts → number of steps of requests."""
    prompt_tokens: int = 0
    tokens: int = 0
    drafts: int = 0
    """Draft tokens that were proposed."""


class Scheduler:
    """Runs requests in the order of arrival, at most `engine.max_batch` at once.

    An exception in the engine ends the service: running and waiting requests fail, and no new ones are accepted. A batch is one
    computation over the caches of all its slots, so none can be trusted afterwards, and most CUDA errors persist until the
    process ends. A supervisor that watches `/health` should start a new process, which is quick with a bundle.
    """

    def __init__(self, make_engine: Callable[[], Engine], max_waiting: int = 256) -> None:
        self.counts = Counts()
        self.engine: Engine | None = None
        self.error = ""
        """Why the engine failed; empty if it has not."""
        self.max_waiting = max_waiting
        self._make_engine = make_engine
        self._waiting: deque[Request] = deque()
        self._running: dict[int, Request] = {}
        self._changed = threading.Condition()  # guards _waiting, _deadline and counts.finished
        self._deadline: float | None = None
        # A daemon thread, so that an engine that hangs does not keep the process alive.
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
        """Accept all of these requests, or none.

        Raises:
            TooMany: the queue would exceed `max_waiting`.
            Refused: the service is starting, stopping or failed.
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
        """Cancel a request: its slot is freed before the next step. Harmless if the request has ended."""
        with self._changed:
            request.cancelled = True
            if request in self._waiting:
                self._waiting.remove(request)
                self.counts.finished["cancelled"] += 1

    def drain(self, seconds: float) -> None:
        """Accept no new requests, finish the running and waiting ones, and fail those that are not finished after `seconds`."""
        with self._changed:
            self._deadline = time.monotonic() + seconds
            self._changed.notify()

    def give_up(self) -> None:
        """Tell everybody who waits for an answer that the server is stopping, even while the engine is in a call."""
        for request in [*self._running.values(), *self._waiting]:
            request.deliver(Output([], "error", STOPPING))

    def join(self, seconds: float) -> bool:
        """Wait after `drain`. Returns whether the engine's thread has ended."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    # --- the engine's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            engine = self.engine = self._make_engine()
            while self._work_is_there():
                self._admit(engine)
                self._step(engine)
            self._fail_all(STOPPING)
        except BaseException as error:
            LOG.exception("the engine failed")
            with self._changed:
                self.error = f"{type(error).__name__}: {error}"
            self._fail_all(f"the engine failed: {self.error}")

    def _work_is_there(self) -> bool:
        """Sleep until there is something to do; False if it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._running or self._deadline is not None)
            if self._deadline is None:
                return True
            return bool(self._waiting or self._running) and time.monotonic() < self._deadline

    def _admit(self, engine: Engine) -> None:
        """Prefill waiting requests before decoding, because steps of a full batch cost least for each token.

        At most `max_batch` prefills, so that requests that end with their first token do not starve the running ones.
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
        """The lowest free slot, because the engine computes all slots up to the highest one in use."""
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
        """Deliver the tokens within the request's limits; a step with drafts may return tokens beyond its end."""
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
