"""Specializations beside recorded ones. What a server launches next may differ from a recording in the class of one integer.

Triton compiles a kernel for the class of an integer argument: 1, a multiple of 16, or any other. Which classes a recording
meets depends on how requests happened to be batched: in one start of two, vLLM's `_fused_post_conv_kernel` is launched with a
length of 1. Two recorded specializations that differ in one integer only show that it varies, so its third class is built, too.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from aot_cache.artifact.plan import Encoded, Pair, Plan, Unit

Classes = Callable[[Unit, int], Sequence[Pair]]
"""(unit, position of a parameter) → what Triton specializes that parameter for, over integers of all classes."""


def added(plan: Plan, recorded: Iterable[str], classes: Classes) -> tuple[Plan, list[str]]:
    """(the plan with the neighbours that it lacks, their ids).

    Args:
        recorded: ids of the units that a running program launched. Others have their classes from declared ranges.
        classes: asks Triton.
    """
    seen = set(recorded)
    known = {unit.id for unit in plan.units}
    found = beside([unit for unit in plan.units if unit.id in seen], classes)
    new = {unit.id: unit for unit in found if unit.id not in known}
    return replace(plan, units=[*plan.units, *new.values()]), list(new)


def beside(units: Sequence[Unit], classes: Classes) -> list[Unit]:
    """The classes that `units` lack of each integer of which they have two, all else being equal."""
    alike: dict[str, tuple[int, list[Unit]]] = {}
    for unit in units:
        for at, pair in enumerate(unit.specialization):
            if _may_be_integer(pair):
                alike.setdefault(_all_but(unit, at), (at, []))[1].append(unit)
    out = []
    for at, group in alike.values():
        have = [list(unit.specialization[at]["t"]) for unit in group]
        types = {kind for kind, _ in have} - {"constexpr"}
        if len(have) < 2 or not types:  # without a type it is a constexpr, whose values say nothing about the next one
            continue
        wanted = [list(pair["t"]) for pair in classes(group[0], at)]
        lacking = [pair for pair in wanted if pair[0] in {*types, "constexpr"} and pair not in have]
        out += [replace(group[0], specialization=_with(group[0], at, pair), reached={}) for pair in lacking]
    return out


def _may_be_integer(pair: Pair) -> bool:
    """Whether an argument was an integer, or a 1 that Triton made a constant."""
    kind, value = pair["t"]
    return str(kind).lstrip("iu").isdigit() or (kind == "constexpr" and value == 1 and not isinstance(value, bool))


def _all_but(unit: Unit, at: int) -> str:
    """Text of all that a unit is compiled for, but for one argument."""
    others = [pair for number, pair in enumerate(unit.specialization) if number != at]
    return json.dumps([at, unit.kernel, unit.source, others, list(unit.options.items()), unit.overrides, unit.ranks])


def _with(unit: Unit, at: int, pair: Sequence[Encoded]) -> list[Pair]:
    return [{"t": list(pair)} if number == at else old for number, old in enumerate(unit.specialization)]
