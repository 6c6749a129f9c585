"""What the plug-ins of engines share: nothing of ours may stop an engine's start, and its log says what came of it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import Any


def asked_for() -> bool:
    """Whether the environment asks for a bundle, or for the guard alone."""
    return bool(os.environ.get("AOT_CACHE") or os.environ.get("AOT_CACHE_POLICY"))


class Start:
    """Our part of an engine's start, in one process.

    Args:
        log: a logger below the engine's own, so that its log settings apply.
    """

    def __init__(self, log: logging.Logger) -> None:
        self.log = log
        self.seconds = 0.0
        """Spent in what `timed` ran."""

    def or_warn(self, action: Callable[[], object]) -> None:
        """Run something of ours; the engine goes on whatever it raises."""
        try:
            action()
        except Exception as error:
            self.log.warning("aot-cache: %s", error)

    def timed(self, action: Callable[[], object]) -> None:
        """`or_warn`, and count its time."""
        started = time.perf_counter()
        self.or_warn(action)
        self.seconds += time.perf_counter() - started

    def say(self, more: str = "") -> None:
        """Log in one line what came of it. `more` is what else was loaded; it ends with `; `."""
        from aot_cache.runtime import loader

        self.log.info("%s", summary(loader.stats(), self.seconds, more))


def summary(stats: Mapping[str, Any], seconds: float, more: str = "") -> str:
    """One line for an engine's log.

    Args:
        stats: of `aot_cache.stats()`.
        seconds: spent in loading and installing.
        more: what else to say of what was loaded; it ends with `; `.
    """
    bundles, graphs, total = stats["bundles"], stats["graphs"], stats["total"]
    if not bundles:
        refused = total["rejected_bundle"]
        return f"aot-cache serves without a bundle ({refused} refused); {_events(total)} during start-up"
    from aot_cache.runtime.ledger import HARMFUL

    primed, units = sum(one["primed"] for one in bundles), sum(one["units"] for one in bundles)
    loaded, declared = sum(one["primed"] for one in graphs), sum(one["graphs"] for one in graphs)
    inside = sum(stats["in_capture"][kind] for kind in HARMFUL)
    return (
        f"aot-cache is ready: {primed} of {units} kernel specializations and {loaded} of {declared} compiled graphs "
        f"loaded in {seconds:.2f} s; {more}{_events(total)} during start-up; {inside} events inside captures"
    )


def _events(total: Mapping[str, int]) -> str:
    names = {"compile": "compiles", "tuning": "tunings", "gcc": "C compiler runs", "frame": "frames traced by Dynamo"}
    other = total["other_compile"]
    counted = [f"{total[kind]} {name}" for kind, name in names.items()]
    return ", ".join([*counted, f"{other} kernels by other compilers"] if other else counted)
