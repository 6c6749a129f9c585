"""Adds missed specializations and tunings of kernels to a plan, if their source is the installed one, and neighbours.

Neither was declared, so that one that cannot be built does not fail the build. The reason is kept by the miss's number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from aot_cache.artifact.key import UNITS, function_of
from aot_cache.artifact.plan import Plan, Unit, extended
from aot_cache.artifact.target import Target
from aot_cache.builder import neighbours
from aot_cache.builder.assemble import misfit
from aot_cache.builder.kernels_compile import Outcome
from aot_cache.builder.neighbours import Classes
from aot_cache.errors import TraceError, one_line
from aot_cache.misses.file import LOAD, TUNING, Miss
from aot_cache.store import JsonObject, Store
from aot_cache.upstream.codec import triton_jit


class MissedKernels:
    """The misses of kernels in one build.

    Args:
        misses: all misses; those of compiled functions are ignored.
        plan: what the recipe launches.
    """

    def __init__(self, misses: Sequence[Miss], plan: Plan) -> None:
        self.uncovered: dict[int, str] = {}
        """Number of each miss → why it will miss again; empty if it will not."""
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
            except Exception as error:  # it imports modules, and decodes values, that the file names
                self.uncovered[number] = str(error) if isinstance(error, TraceError) else one_line(error)
                continue
            self._wanted[number] = [unit.id for unit in units]
            tunings = [] if tuning is None else [tuning]
            parts.append(Plan(recipe=plan.recipe, target=plan.target, units=units, tunings=tunings, closures=closures))
        self.plan = extended(plan, parts) if parts else plan
        """The plan, with every missed unit and tuning that can be built here."""
        self.neighbours: list[str] = []
        """Ids of the units that `add_neighbours` has added."""

    def add_neighbours(self, recorded: Iterable[str], classes: Classes) -> None:
        """Add what is beside recorded units (their ids are given) and missed ones, see `builder.neighbours`."""
        missed = (unit for units in self._wanted.values() for unit in units)
        self.plan, self.neighbours = neighbours.added(self.plan, {*recorded, *missed}, classes)

    def settle(self, outcome: Outcome, store: Store, target: Target) -> list[str]:
        """Remove missed specializations and neighbours that failed or do not fit from the plan and from `outcome`, and set
        `uncovered`. Returns the ids of what was removed."""
        failed = {failure.unit: failure.error for failure in outcome.failed}
        unfit = {
            unit.id: failed.get(unit.id) or _unfit(key, store, target)
            for unit, key in zip(self.plan.units, outcome.keys)
        }
        for number, units in self._wanted.items():
            reasons = [unfit[unit] for unit in units]
            # Some of an autotuner's configs may fail to compile, as always: one usable unit is enough.
            self.uncovered[number] = "" if not all(reasons) else next(iter(reasons), "no config of it is known")
        stay = [
            number
            for number, unit in enumerate(self.plan.units)
            if unit.id in self._traced or not unfit[unit.id] or not (unit.id in failed or unit.launched_without_tuner())
        ]
        self.neighbours = [one for one in self.neighbours if not unfit[one]]
        gone = {unit.id for unit in self.plan.units} - {self.plan.units[number].id for number in stay}
        self.plan = replace(self.plan, units=[self.plan.units[number] for number in stay])
        outcome.keys = [outcome.keys[number] for number in stay]
        outcome.memory_keys = [outcome.memory_keys[number] for number in stay]
        outcome.failed = [failure for failure in outcome.failed if failure.unit not in gone]
        return sorted(gone)


def _closure(unit: Unit, closures: Mapping[str, JsonObject]) -> JsonObject:
    """The source closure of a missed unit's kernel, as installed.

    Raises:
        TraceError: the kernel is not installed or has another source, or a value in the unit is invalid.
        Exception: an import of a named module, or the decoding of a value, raises.
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
    """Why a compiled unit cannot be launched; empty if it can."""
    record = store.get_record(UNITS, unit_key)
    return "it was not compiled" if record is None else record.get("pruned") or misfit(record["metadata"], target)
