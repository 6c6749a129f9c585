"""Runs a call as a server does (through the bundle; on a GPU in a CUDA graph capture) and counts events that no hit causes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from aot_cache.recipes.declare import Call, Case
from aot_cache.recipes.dimensions import Point
from aot_cache.rehearsal import arguments, compare, place, results
from aot_cache.rehearsal.arguments import Pair, Shared
from aot_cache.rehearsal.leaves import Leaf, leaves
from aot_cache.rehearsal.results import Missed, PointResult
from aot_cache.runtime import ledger, loader
from aot_cache.upstream.hooks import torch_capture
from aot_cache.upstream.hooks.second_count import SecondCount, contradictions

_LATE = "late_install"
"""A kernel was found in the bundle only at its launch: that is reported, but is not a miss."""
_COUNTED = (*ledger.HARMFUL, "fallback", "unsafe", "refused", "rejected_bundle", _LATE)


@dataclass
class _Outcome:
    """The outcome of one call through the bundle."""

    result: object = None
    error: BaseException | None = None
    captured: bool = False
    misses: tuple[Missed, ...] = ()
    events: Mapping[str, int] | None = None
    second: Mapping[str, int] | None = None


class Stage:
    """Runs points.

    Args:
        device: `cpu` or `cuda`.
        second: the count of events that is independent of the ledger.
        tolerance: maximal distance from eager, for integers, too; None: by dtype, and integers must be equal.
    """

    def __init__(self, device: str, second: SecondCount, tolerance: float | None) -> None:
        self._device, self._second, self._tolerance = device, second, tolerance
        self.not_captured: dict[str, str] = {}
        """Case → why its calls are not captured."""

    def run(self, case: Case, point: Point) -> PointResult:
        """Run a point through the bundle and in eager mode."""
        began = time.perf_counter()
        found = self._run(case, point)
        return PointResult(case.name, dict(point), seconds=round(time.perf_counter() - began, 4), **found)

    def _run(self, case: Case, point: Point) -> dict[str, Any]:
        try:
            made = arguments.pair(case, point, self._device)
        except Exception as error:
            return {"status": results.CANNOT, "why": f"its arguments cannot be made: {place.told(error)}"}
        shared = Shared.of(made)
        outcome = self._serve(case, made)
        if outcome.error is not None and outcome.captured and not outcome.misses:
            shared.put_back()
            made, shared, outcome = self._outside(case, point, outcome.error)
        counts = {"events": outcome.events, "second": outcome.second, "captured": outcome.captured}
        wrong = contradictions(outcome.events or {}, outcome.second or {}, bool(outcome.misses))
        if wrong:
            return {**counts, "status": results.CONTRADICTS, "misses": outcome.misses, "why": "; ".join(wrong)}
        if outcome.misses:
            shared.put_back()
            return {**counts, **self._missed(case, made, outcome)}
        return {**counts, **self._against_eager(case, point, made, shared, outcome)}

    # --- through the bundle -------------------------------------------------------------------------------------------

    def _serve(self, case: Case, made: Pair) -> _Outcome:
        """Call through the bundle under the policy `error`: a miss raises `CacheMiss`, as in a canary."""
        outcome = _Outcome(captured=self._device == "cuda" and case.name not in self.not_captured)
        loader.MISSES.reset()
        before, second = _ledger(), self._second.total()
        loader.arm("error")
        try:
            with case.modes(self._device):
                run = _in_capture if outcome.captured else _plainly
                outcome.result = run(made.bundle)
        except Exception as error:
            outcome.error = error
        finally:
            loader.arm("fallback")
        after, now = _ledger(), self._second.total()
        outcome.events = {kind: after[kind] - before[kind] for kind in _COUNTED if after[kind] > before[kind]}
        outcome.second = {name: now[name] - second[name] for name in now if now[name] > second[name]}
        outcome.misses = tuple(Missed(miss["name"], miss["why"]) for miss in loader.MISSES.to_json())
        harm = [kind for kind in outcome.events if kind != _LATE]
        if harm and not outcome.misses:  # it happened without a decision of the guard
            names = ", ".join(harm)
            outcome.misses = (Missed(case.name, f"the ledger has events that no hit causes: {names}"),)
        return outcome

    def _outside(self, case: Case, point: Point, error: BaseException) -> tuple[Pair, Shared, _Outcome]:
        """Call without a capture, because the call cannot be captured: a server does not capture such a case, either."""
        self.not_captured[case.name] = place.told(error)
        made = arguments.pair(case, point, self._device)
        shared = Shared.of(made)
        outcome = self._serve(case, made)
        if outcome.error is not None:  # the error is not caused by the capture
            del self.not_captured[case.name]
        return made, shared, outcome

    def _missed(self, case: Case, made: Pair, outcome: _Outcome) -> dict[str, Any]:
        """All misses of this call, not only the first, which raised."""
        found = dict.fromkeys(outcome.misses)
        try:
            with case.modes(self._device):
                for row in loader.explain(made.eager):
                    why = "; ".join(dict.fromkeys(graph["why"] for graph in row["graphs"] if graph["why"]))
                    if not any(miss.name == row["function"] for miss in found):
                        found[Missed(row["function"], why or "there is no graph of this function")] = None
        except Exception:  # the first miss is known
            pass
        return {"status": results.MISS, "misses": tuple(found), "why": "; ".join(miss.why for miss in found)}

    # --- against eager ------------------------------------------------------------------------------------------------

    def _against_eager(self, case: Case, point: Point, made: Pair, shared: Shared, outcome: _Outcome) -> dict[str, Any]:
        import torch

        mine = _kept(outcome.result, made.bundle, bool(shared))
        shared.put_back()
        # Made again: a recipe may reset state other than tensors (how full a static cache is) when it makes arguments.
        made = replace(made, eager=arguments.make(case, point, self._device))
        try:
            with case.modes(self._device), torch.compiler.set_stance("force_eager"):
                wanted = _plainly(made.eager)
        except Exception as error:
            return {"status": results.CANNOT, "why": f"it raises in eager, too: {place.told(error)}"}
        if outcome.error is not None:
            return {"status": results.FAILED, "why": f"it raises, but eager does not: {place.told(outcome.error)}"}
        if made.different:
            why = f"{made.different} differs each time, even with the same seed"
            return {"status": results.CANNOT, "why": f"nothing to compare: {why}"}
        theirs = _kept(wanted, made.eager, False)
        tolerance = self._tolerance
        if tolerance is None:
            found = compare.dtypes_of([leaf.value for leaf in theirs if _is_tensor(leaf.value)])
            weights = compare.dtypes_of(tensor for _, tensor in arguments.tensors_of(made.eager))
            tolerance = compare.tolerance_of({*found, *weights, *_autocast(case)})
        apart = compare.compare(mine, theirs, tolerance, self._tolerance is not None)
        facts = {"distance": apart.value, "where": apart.where}
        if apart.close:
            return {**facts, "status": results.HIT}
        why = f"{apart.where} is {apart.value:.3g} away from eager, more than {tolerance:g}"
        return {**facts, "status": results.DIFFERS, "why": why}


def _ledger() -> dict[str, int]:
    total: dict[str, int] = loader.LEDGER.to_json()["total"]
    return total


def _plainly(call: Call) -> object:
    import torch

    torch.manual_seed(arguments.SEED)
    return call()


def _in_capture(call: Call) -> object:
    """Capture the call, and replay the graph."""
    import torch

    graph = torch.cuda.CUDAGraph()
    torch.manual_seed(arguments.SEED)
    torch.cuda.synchronize()
    with torch_capture.captured(graph):
        result = call()
    torch.manual_seed(arguments.SEED)
    graph.replay()
    torch.cuda.synchronize()
    return _Recorded(graph, result)


@dataclass
class _Recorded:
    """A result in the memory of its graph, which is kept alive with it."""

    graph: object
    result: object


def _kept(result: object, call: Call, copy: bool) -> list[Leaf]:
    """What a call returned and left in its arguments; copied if the next call writes to the same memory."""
    found = result.result if isinstance(result, _Recorded) else result
    state = [Leaf(path, tensor) for path, tensor in arguments.tensors_of(call) if not _is_parameter(tensor)]
    kept = [*leaves(found, "result"), *state]
    if not copy:
        return kept
    return [Leaf(leaf.path, leaf.value.detach().clone() if _is_tensor(leaf.value) else leaf.value) for leaf in kept]


def _is_tensor(value: object) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _is_parameter(value: object) -> bool:
    import torch

    return isinstance(value, torch.nn.Parameter)


def _autocast(case: Case) -> set[str]:
    return {case.autocast} if case.autocast is not None else set()
