"""Look up a graph in all bundles of this process when Dynamo has no code for a call, and explain a miss.

Imported inside an import of Dynamo, like `graphs`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from aot_cache.artifact import manifest
from aot_cache.artifact.plan import CallPlan, CasePlan
from aot_cache.misses import call_signature, solve
from aot_cache.runtime.graphs import GraphSet, short
from aot_cache.runtime.guard import Guard
from aot_cache.store import Bundle
from aot_cache.upstream.codec import dynamo_globals
from aot_cache.upstream.hooks import dynamo_frames, inductor_events, inductor_later, inductor_miss
from aot_cache.upstream.hooks.dynamo_frames import Found, Frame

_REASONS = 3
_MOST_MISSED = 65536


class Answers:
    """Answers Dynamo's misses from the loaded graphs.

    Args:
        guard: decides what to do if no graph fits.
        refuse: called with (error, strict) when a bundle's graphs cannot be used and are dropped; `strict` is the bundle's own.
    """

    def __init__(self, guard: Guard, refuse: Callable[[Exception, bool], None]) -> None:
        self._guard, self._refuse = guard, refuse
        self.sets: list[GraphSet] = []
        self.missed: dict[tuple[object, ...], str] = {}
        """(function, case, (dimension, value), …) → reason, for calls that missed and whose sizes tell their point."""
        self._declared: dict[str, tuple[Sequence[CallPlan], Sequence[CasePlan]]] = {}

    def hook(self) -> Iterator[Callable[[], None]]:
        """Hook the miss paths of Dynamo, which must be imported, and of Inductor. Yields an undo function for each hook."""
        guard = self._guard
        yield dynamo_frames.count(guard.count)
        yield inductor_events.listen(guard.count)
        yield inductor_later.import_when_compiling()
        yield inductor_later.give_debug_back
        yield inductor_miss.around_loading(guard.loading)
        yield inductor_miss.intercept_tuning(guard.first_of_inductor, guard.later)
        # Outermost, around the counting hook: a frame that is not traced is not counted.
        yield dynamo_frames.intercept_compile(guard.frame)
        yield dynamo_frames.before_compiling(self.find, self.wanted)

    def wanted(self, code: Any) -> bool:
        """Whether any bundle has a graph for this code."""
        return any(graphs.wanted(code) for graphs in self.sets)

    def find(self, frame: Frame) -> Found | None:
        """The graph for a call, from the first bundle that has one."""
        for graphs in list(self.sets):
            try:
                with self._guard.installing():
                    found = graphs.find(frame)
            except Exception as error:  # the call continues as it would without aot-cache
                self.drop(graphs)
                self._refuse(error, graphs.strict)
                continue
            if found is not None:
                return found
        return None

    def drop(self, graphs: GraphSet) -> None:
        """Find no graph of this bundle any more. Another thread may have dropped it already."""
        with contextlib.suppress(ValueError):
            self.sets.remove(graphs)
        self._declared.pop(graphs.bundle.digest, None)

    def reasons(self, frame: Frame) -> tuple[str, Callable[[], Mapping[str, Any]]]:
        """(why no graph fits this call, a function that returns the facts the next build needs)."""
        found = list(dict.fromkeys(why for graphs in self.sets for _, why in graphs.reasons(frame) if why))
        if frame.wrapping is None:
            why = "it is not compiled by Inductor"
        elif not self.sets:
            why = "no bundle with graphs is loaded"
        else:
            why = "; ".join(found[:_REASONS]) or "there is no graph of this function"
            self._remember(frame, why)
        return why, lambda: self._facts(frame)

    def _remember(self, frame: Frame, why: str) -> None:
        """Remember the miss: `will_hit` then answers no at this point, even if Dynamo has compiled the call since."""
        with contextlib.suppress(Exception):  # the call continues whatever fails here
            for case, point in self._facts(frame)["points"].items():
                if len(self.missed) < _MOST_MISSED:
                    self.missed[(frame.function, case, *point.items())] = why

    def _facts(self, frame: Frame) -> dict[str, Any]:
        mode = _mode()
        structure, leaves = call_signature.structure_of(frame, mode)
        sizes = {leaf.path: list(leaf.sizes) for leaf in leaves if not leaf.fixed}
        solved = [solve.points_for(*self._plan(g.bundle), frame.function, structure, sizes) for g in self.sets]
        best = next((one for one in solved if one.points), solved[0] if solved else solve.Solved({}, "", ""))
        return {
            "place": f"{frame.code.co_filename}:{frame.code.co_firstlineno}",
            "wrapping": frame.wrapping or {},
            "mode": mode,
            "structure": structure,
            "sizes": sizes,
            "points": best.points,
            "declare": best.declare,
        }

    def _plan(self, bundle: Bundle) -> tuple[Sequence[CallPlan], Sequence[CasePlan]]:
        """The (call plans, case plans) that a bundle was built from."""
        if bundle.digest not in self._declared:
            found = manifest.whole(bundle)
            self._declared[bundle.digest] = found.calls, found.cases
        return self._declared[bundle.digest]

    def explain(self, call: Callable[[], Any]) -> list[dict[str, Any]]:
        """Make a call without compiling, and return the reason for each frame that misses."""
        out: list[dict[str, Any]] = []

        def look(frame: Frame, _go_on: object) -> Any:
            reasons = [(graph, why) for graphs in self.sets for graph, why in graphs.reasons(frame)]
            out.append(
                {
                    "function": frame.function,
                    "place": f"{frame.code.co_filename}:{frame.code.co_firstlineno}",
                    "graphs": [{"graph": short(graph), "why": why} for graph, why in reasons],
                }
            )
            return dynamo_frames.run_without_compiling()

        with dynamo_frames.hooked(look):
            call()
        return out


def _mode() -> str:
    """Grad mode and autocast dtype, in the form that plans use."""
    casts = [str(torch.get_autocast_dtype(d)) for d in ("cuda", "cpu") if torch.is_autocast_enabled(d)]
    return " ".join([dynamo_globals.mode(), *(cast.removeprefix("torch.") for cast in casts[:1])])
