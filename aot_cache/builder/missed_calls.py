"""Calls of compiled functions that missed: the points that they add to a recipe, and whether its graphs serve them then.

A miss that is not covered fails nothing, because nobody declared it. Reasons go by the miss's number in the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from aot_cache.artifact.plan import Plan
from aot_cache.builder.call_signatures import CallSignature
from aot_cache.builder.messages import Refused
from aot_cache.errors import AotCacheError
from aot_cache.misses.file import GRAPH, Miss
from aot_cache.misses.solve import points_for
from aot_cache.recipes.declare import Recipe


def widen(recipe: Recipe, misses: Sequence[Miss]) -> tuple[Recipe, dict[int, str]]:
    """The recipe with the points of all `misses`, and why some have none that it could take."""
    why: dict[int, str] = {}
    for number, miss in enumerate(misses):
        try:
            recipe = recipe.widened({case: [point] for case, point in miss.facts.get("points", {}).items()})
        except AotCacheError as error:
            why[number] = str(error)
    return recipe, why


def uncovered(
    misses: Sequence[Miss],
    signatures: Iterable[CallSignature],
    plan: Plan,
    failed: Mapping[str, str],
    why: Mapping[int, str],
    refused: Iterable[Refused],
) -> dict[int, str]:
    """Number of each missed call → why it will miss again; empty when it will not.

    Args:
        signatures: of the calls that the recipe makes now.
        plan: the same signatures, as a plan has them.
        failed: id of a signature → why it was not compiled.
        why: of `widen`.
        refused: points where the recipe's code could not run.
    """
    by_name: dict[str, list[CallSignature]] = {}
    for signature in signatures:
        by_name.setdefault(f"{signature.module}:{signature.function}", []).append(signature)
    out = {}
    for number, miss in enumerate(misses):
        if miss.kind == GRAPH:
            mine = [k for k in by_name.get(miss.name, ()) if k.takes(miss.facts["structure"], miss.facts["sizes"])]
            out[number] = _served(miss, mine, failed) if mine else why.get(number) or _unmade(miss, plan, refused)
    return out


def _served(miss: Miss, signatures: Sequence[CallSignature], failed: Mapping[str, str]) -> str:
    """Why a call that the recipe makes will miss all the same."""
    if all(signature.id in failed for signature in signatures):
        return f"it was not compiled: {failed[signatures[0].id]}"
    if miss.facts["points"] and not miss.facts["declare"]:
        return f"it is declared already, and missed because {'; '.join(miss.why) or 'of something unknown'}"
    return ""


def _unmade(miss: Miss, plan: Plan, refused: Iterable[Refused]) -> str:
    """Why the recipe makes no such call."""
    points = miss.facts["points"]
    for one in refused:
        if points.get(one.case) == one.point:
            return one.why
    solved = points_for(plan.calls, plan.cases, miss.name, miss.facts["structure"], miss.facts["sizes"])
    return solved.why or f"no declared case makes this call; this would: {solved.declare}"
