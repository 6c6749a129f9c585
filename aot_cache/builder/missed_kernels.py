"""Kernels that missed: their specializations and choices are added to a plan, if they are of the source that is here.

A miss that is not covered fails nothing, because nobody declared it. Reasons go by the miss's number in the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from aot_cache.artifact.key import UNITS, function_of
from aot_cache.artifact.plan import Plan, Unit, extended
from aot_cache.artifact.target import Target
from aot_cache.builder.assemble import misfit
from aot_cache.builder.kernels_compile import Outcome
from aot_cache.errors import TraceError, one_line
from aot_cache.misses.file import LOAD, TUNING, Miss
from aot_cache.store import JsonObject, Store
from aot_cache.upstream.codec import triton_jit


class MissedKernels:
    """The misses of one build that ask for kernels.

    Args:
        misses: all misses; those of compiled functions are passed over.
        plan: what the recipe launches.
    """

    def __init__(self, misses: Sequence[Miss], plan: Plan) -> None:
        self.uncovered: dict[int, str] = {}
        """Number of each miss → why it will miss again; empty when it will not."""
        self._traced = {unit.id for unit in plan.units}
        self._wanted: dict[int, list[str]] = {}
        parts = []
        for number, miss in enumerate(misses):
            if miss.kind == LOAD:
                self.uncovered[number] = "it was compiled, and loaded late: there is nothing to build"
            units, tuning = miss.units(), miss.tuning()
            if miss.kind == TUNING and tuning is None:
                self.uncovered[number] = (
                    "Inductor's kernel has all its configs in the bundle: tune it, or ready(tune=True)"
                )
            if not units and tuning is None:
                continue
            try:
                closures = {unit.kernel: _closure(unit, plan.closures) for unit in units}
            except Exception as error:  # what is named is imported, and what is decoded is whatever the file says
                self.uncovered[number] = str(error) if isinstance(error, TraceError) else one_line(error)
                continue
            self._wanted[number] = [unit.id for unit in units]
            tunings = [] if tuning is None else [tuning]
            parts.append(Plan(recipe=plan.recipe, target=plan.target, units=units, tunings=tunings, closures=closures))
        self.plan = extended(plan, parts) if parts else plan
        """The plan with everything that was missed and can be built here."""

    def settle(self, outcome: Outcome, store: Store, target: Target) -> None:
        """Take out of the plan, and out of what became of it, the missed specializations that are of no use."""
        failed = {failure.unit: failure.error for failure in outcome.failed}
        unfit = {
            unit.id: failed.get(unit.id) or _unfit(key, store, target)
            for unit, key in zip(self.plan.units, outcome.keys)
        }
        for number, units in self._wanted.items():
            reasons = [unfit[unit] for unit in units]
            # Of an autotuner's configs some may not compile, as everywhere.
            self.uncovered[number] = "" if not all(reasons) else next(iter(reasons), "no config of it is known")
        stay = [
            number
            for number, unit in enumerate(self.plan.units)
            if unit.id in self._traced or not unfit[unit.id] or not (unit.id in failed or unit.launched_without_tuner())
        ]
        gone = {unit.id for unit in self.plan.units} - {self.plan.units[number].id for number in stay}
        self.plan = replace(self.plan, units=[self.plan.units[number] for number in stay])
        outcome.keys = [outcome.keys[number] for number in stay]
        outcome.memory_keys = [outcome.memory_keys[number] for number in stay]
        outcome.failed = [failure for failure in outcome.failed if failure.unit not in gone]


def _closure(unit: Unit, closures: Mapping[str, JsonObject]) -> JsonObject:
    """The source closure of a missed unit's kernel as it is here.

    Raises:
        TraceError: it is not here, is of other source, or a value in the unit is none that we write.
        Exception: importing what is named, or decoding what is written, raises.
    """
    here = [closure for kernel, closure in closures.items() if function_of(kernel) == unit.kernel]
    found = next((one for one in here if triton_jit.closure_digest(one) == unit.source), next(iter(here), None))
    if found is None:
        function = triton_jit.unwrap(triton_jit.find(unit.kernel))
        if function is None or triton_jit.name_of(function) != unit.kernel:
            raise TraceError("no kernel of this name can be imported", hint="is its module installed here?")
        found = triton_jit.closure(function)
    if triton_jit.closure_digest(found) != unit.source:
        raise TraceError("its source here differs from the source that missed")
    for value in [*unit.specialization, *unit.options.values(), *unit.overrides.values()]:
        if triton_jit.encode(triton_jit.decode(value)) != value:
            raise TraceError(f"it has a value that no launch can have: {value!r}")
    if not all(isinstance(pair, dict) and len(pair.get("t", ())) == 2 for pair in unit.specialization):
        raise TraceError("its specialization is not a list of (type, value) pairs")
    return found


def _unfit(unit_key: str, store: Store, target: Target) -> str:
    """Why a compiled unit cannot be launched; empty when it can."""
    record = store.get_record(UNITS, unit_key)
    return "it was not compiled" if record is None else record.get("pruned") or misfit(record["metadata"], target)
