"""Logs of launches and of calls of compiled functions, as a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, get_args

from aot_cache.artifact.plan import Origin, Plan, Tuning, Unit, named
from aot_cache.recordings.calls import CallLog

if TYPE_CHECKING:
    from aot_cache.upstream.hooks.triton_launches import LaunchLog

Candidates = Literal["launched", "all", "chosen"]
"""Which candidates of an autotuner a plan has: those that ran, all of them, or only the choice."""
CANDIDATES: tuple[Candidates, ...] = get_args(Candidates)


def of_logs(
    log: LaunchLog,
    calls: CallLog,
    name: str,
    target: Callable[[bool], str],
    candidates: Candidates = "launched",
    origin: Origin = "recorded",
) -> Plan:
    """What was launched and called, as a plan.

    Args:
        name: the plan's name.
        target: returns the id of the GPU that all of it is for; called only if there is anything, with whether there are kernels.
    """
    import triton

    from aot_cache.upstream.codec import triton_jit

    with log.lock:
        closures = {kernel: log.closures[kernel] for kernel in sorted(log.functions)}
        launched = [(dict(unit), sorted(via)) for unit, via in zip(log.units, log.via)]
        tunings = [Tuning(**tuning) for tuning in log.tunings]
        launchers = tuple(sorted(log.launchers, key=json.dumps))
    digests = {kernel: triton_jit.closure_digest(document) for kernel, document in closures.items()}
    units = [
        Unit(source=digests[unit["kernel"]], via=[list(pair) for pair in via], **unit)
        for unit, via in launched
        if candidates != "chosen" or any(_is_chosen(tunings, *pair) for pair in via)
    ]
    functions = calls.functions()
    plan = Plan(
        recipe=name,
        target=target(bool(units or launchers)) if units or launchers or functions else "none",
        origin=origin,
        triton=triton.__version__,
        units=units,
        tunings=tunings,
        closures=closures,
        launchers=launchers,
        functions=functions,
    )
    return named(plan)


def _is_chosen(tunings: Sequence[Tuning], number: int, candidate: int) -> bool:
    """Whether a launch was made without a tuner, or with the tuner's choice (or its choice is not known)."""
    if number < 0 or candidate < 0:
        return True
    tuning = tunings[number]
    return tuning.choice is None or tuning.candidates[candidate] == tuning.choice
