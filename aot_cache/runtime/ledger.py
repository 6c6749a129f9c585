"""Counters for the events that a warm process must not have, each also counted inside captures and after the seal."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

HARMFUL = (
    "compile",
    "disk_hit",
    "tuning",
    "benchmark",
    "module_load",
    "gcc",
    "frame",
    "graph_compile",
    "other_compile",
)
"""What must never happen inside a capture: Triton's compiles, disk cache reads, tunings and their benchmarks, module loads, C
compiler runs, frames traced by Dynamo, graphs compiled by a backend, kernels compiled by another compiler (FlashInfer, TileLang,
CuTe DSL)."""

KINDS = (
    *HARMFUL,
    "installed",
    "primed",
    "late_install",
    "late_compile",
    "graph",
    "fallback",
    "unsafe",
    "refused",
    "rejected_bundle",
)
"""What is counted. All but `HARMFUL` are done by aot-cache: `late_compile` is a kernel compiled for constants that only the
server knows, outside captures, `graph` a first call that found its graph in a bundle, `fallback` a call inside a capture that ran
without compiling or tuning, `unsafe` one that compiled or loaded inside it, `refused` one that raised."""

_KEPT = 256


@dataclass(frozen=True)
class Event:
    """One counted event."""

    kind: str
    name: str
    in_capture: bool
    sealed: bool

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


class Ledger:
    """Thread-safe counts of events, and the last few harmful events with their names."""

    def __init__(self) -> None:
        self.changed: Callable[[], None] = lambda: None
        """Called after each event that is counted after the seal, without a lock of this ledger."""
        self._lock = threading.Lock()
        self._totals: Counter[str] = Counter()
        self._in_capture: Counter[str] = Counter()
        self._after_seal: Counter[str] = Counter()
        self._recent: list[Event] = []
        self._sealed = False

    def note(self, kind: str, name: str, in_capture: bool, count: int = 1) -> None:
        """Count an event, or `count` events of one kind."""
        with self._lock:
            self._totals[kind] += count
            if in_capture:
                self._in_capture[kind] += count
            if self._sealed:
                self._after_seal[kind] += count
            if kind in HARMFUL:
                self._recent = [*self._recent[-_KEPT + 1 :], Event(kind, name, in_capture, self._sealed)]
            sealed = self._sealed
        if sealed:
            self.changed()

    @property
    def sealed(self) -> bool:
        """Whether start-up is over (`seal` was called)."""
        return self._sealed

    def seal(self) -> None:
        """Declare start-up over: from now on every harmful event is a miss."""
        with self._lock:
            self._sealed = True

    def to_json(self) -> dict[str, Any]:
        """For every kind: totals, counts inside captures and counts after the seal; and the recent harmful events."""
        with self._lock:
            return {
                "sealed": self._sealed,
                "total": {kind: self._totals[kind] for kind in KINDS},
                "in_capture": {kind: self._in_capture[kind] for kind in KINDS},
                "after_seal": {kind: self._after_seal[kind] for kind in KINDS},
                "events": [event.to_json() for event in self._recent],
            }

    def reset(self) -> None:
        """Set all counters to zero (tests, and a process after a fork)."""
        with self._lock:
            self._totals.clear()
            self._in_capture.clear()
            self._after_seal.clear()
            self._recent = []
            self._sealed = False
