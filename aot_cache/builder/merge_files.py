"""Merges plan files and misses files into one plan, for `aot-cache merge`. Compiles nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aot_cache.artifact import engine_cache
from aot_cache.artifact.engine_cache import Caches
from aot_cache.artifact.plan import Plan, joined
from aot_cache.errors import DeclarationError
from aot_cache.misses import file as miss_file


@dataclass(frozen=True, kw_only=True)
class Merged:
    """The merged plan, and what is not in it.

    Args:
        plan: kernels of all plans, and of the misses.
        caches: entries of the engine's compile cache that belong to the plans.
        misses: how many distinct misses were given.
        uncovered: (name of a function or kernel, why its miss is not in the plan).
    """

    plan: Plan
    caches: Caches
    misses: int
    uncovered: list[tuple[str, str]]


def merge_files(paths: Sequence[Path]) -> Merged:
    """Merge plans, and add the kernels that misses files list. A file is recognised by its content.

    A missed kernel that no plan has is looked up in this environment: its package must be installed.

    Raises:
        DeclarationError: a file cannot be read, there is no plan among them, they are for different targets, or a plan has
            call signatures of compiled functions: those are traced from a recipe's code.
    """
    missed = [path for path in paths if miss_file.is_misses(path)]
    plans = [Plan.read_kernels(path) for path in paths if path not in missed]
    if not plans:
        raise DeclarationError("a plan among the files", "misses only", "record one, or build the misses with a recipe")
    with_kernels = [plan for plan in plans if plan.units or plan.functions or not plan.caches]
    plan = joined(with_kernels or plans[:1])
    caches = engine_cache.of_plans(path for path in paths if path not in missed)
    misses = miss_file.read(missed).found
    if not misses:
        return Merged(plan=plan, caches=caches, misses=0, uncovered=[])
    from aot_cache.builder.missed_kernels import MissedKernels  # imports Triton

    kernels = MissedKernels(misses, plan)
    graphs = [number for number, miss in enumerate(misses) if miss.kind == miss_file.GRAPH]
    why = dict.fromkeys(graphs, "a compiled function needs a recipe (build --model)")
    why |= {number: reason for number, reason in kernels.uncovered.items() if reason}
    uncovered = [(misses[number].name, reason) for number, reason in sorted(why.items())]
    return Merged(plan=kernels.plan, caches=caches, misses=len(misses), uncovered=uncovered)
