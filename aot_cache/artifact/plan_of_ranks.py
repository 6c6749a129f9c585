"""Merges the plans of a job's ranks into one, which says for each unit which ranks launch it if not all do. No torch.

A bundle is for all ranks, and every rank was traced, so it also has the specializations that only one rank launches.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from aot_cache.artifact.key import function_of, variant
from aot_cache.artifact.plan import Config, Plan, Tuning, merge, tuning_identity
from aot_cache.errors import DeclarationError


def of_ranks(plans: Sequence[Plan]) -> Plan:
    """Merge the plans of all ranks, given in rank order.

    Raises:
        DeclarationError: the ranks do not declare the same cases.
    """
    first, *others = plans
    for rank, plan in enumerate(others, 1):
        _check_declared(first, plan, rank)
    out = merge(plans)
    units, tunings = [{unit.id for unit in plan.units} for plan in plans], [{*_identities(plan)} for plan in plans]
    out = replace(
        out,
        units=[replace(unit, ranks=_having(unit.id, units)) for unit in out.units],
        tunings=[
            replace(tuning, ranks=_having(identity, tunings)) for tuning, identity in zip(out.tunings, _identities(out))
        ],
        cases=first.cases,
        calls=first.calls,
        ranks=len(plans),
    )
    for plan in others:
        out = out.with_sets({case.name: case.sets for case in plan.cases})
    return out


def of_processes(plans: Sequence[Plan]) -> Plan:
    """Merge the plans of a recorded program's processes, whose choices say which rank made them.

    Each rank of a job measures by itself, so ranks may have chosen differently under one key of an autotuner. What the first of
    them chose is for all, and another choice for the rank that made it.
    """
    first: dict[str, Config] = {}
    found = [(tuning, identity) for plan in plans for tuning, identity in zip(plan.tunings, _identities(plan))]
    for tuning, identity in sorted(found, key=lambda pair: list(pair[0].ranks)):
        if tuning.choice is not None:
            first.setdefault(identity, tuning.choice)

    def for_all(tuning: Tuning, identity: str) -> Tuning:
        return tuning if tuning.choice not in (None, first.get(identity)) else replace(tuning, ranks=[])

    return merge(
        replace(plan, tunings=[for_all(*pair) for pair in zip(plan.tunings, _identities(plan))]) for plan in plans
    )


def ranks_text(ranks: Sequence[int]) -> str:
    """The ranks as text: `rank 2`, `ranks 0, 1, 3`."""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def apart(plan: Plan) -> dict[str, str]:
    """Kernel → text of how many specializations only some ranks launch, and which; kernels without any are left out."""
    counts: dict[str, dict[tuple[int, ...], int]] = {}
    for unit in plan.units:
        if unit.ranks:
            of_kernel = counts.setdefault(unit.kernel, {})
            of_kernel[tuple(unit.ranks)] = of_kernel.get(tuple(unit.ranks), 0) + 1
    return {
        kernel: "; ".join(
            f"{n} specialization{'s' * (n > 1)} of {ranks_text(ranks)}" for ranks, n in sorted(found.items())
        )
        for kernel, found in sorted(counts.items())
    }


def ranks_of_kernel(plan: Plan, kernel: str) -> list[int]:
    """The ranks that launch a kernel; empty if all do."""
    found = [unit.ranks for unit in plan.units if unit.kernel == kernel]
    ranks = sorted({rank for one in found for rank in one})
    return [] if not all(found) or len(ranks) == plan.ranks else ranks


def _having(one: str, ranks: Sequence[set[str]]) -> list[int]:
    """The ranks that have `one`; empty if all do."""
    found = [rank for rank, known in enumerate(ranks) if one in known]
    return found if len(found) < len(ranks) else []


def _identities(plan: Plan) -> Iterable[str]:
    """The identity of each tuning, independent of the kernel names in this plan."""
    names = {unit.kernel: variant(function_of(unit.kernel), unit.source) for unit in plan.units}
    return [tuning_identity(tuning, names.get(tuning.kernel, tuning.kernel)) for tuning in plan.tunings]


def _check_declared(first: Plan, other: Plan, rank: int) -> None:
    here, there = ({case.name: case.dims for case in plan.cases} for plan in (first, other))
    for name in dict.fromkeys([*here, *there]):
        if here.get(name) != there.get(name):
            found = f"{_text(here.get(name))} as rank 0, {_text(there.get(name))} as rank {rank}"
            raise DeclarationError(
                f"the same declaration of case {name!r} on all ranks",
                found,
                "declare on every rank what any of them needs",
            )


def _text(dims: Mapping[str, str] | None) -> str:
    if dims is None:
        return "not declared"
    return " ".join(f"{dim}={values}" for dim, values in dims.items()) or "no dimensions"
