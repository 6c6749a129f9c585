"""The graph part of `tune`: choose between the configs of Inductor's kernels, on the GPU that will serve.

Inductor measures at a graph's first run. This gives it all configs to measure, and inputs from the recipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from aot_cache.artifact.manifest import Manifest
from aot_cache.artifact.reached import Reached
from aot_cache.errors import TuneError
from aot_cache.recipes import declare as recipes
from aot_cache.recipes import dimensions
from aot_cache.recipes.declare import Case, Recipe

if TYPE_CHECKING:
    from aot_cache.runtime.graphs import GraphSet  # imports Dynamo

Progress = Callable[[str, int, int], None]
Choices = dict[str, dict[str, int]]
"""Compiled graph → kernel → index of its config."""


def measure(graphs: GraphSet, manifest: Manifest, progress: Progress, *, again: bool) -> Choices:
    """Load each graph whose kernels have several configs, with all configs; run its largest point; return the fastest configs.
    This process then runs those.

    Args:
        again: also measure graphs for which a choice was made before.

    Raises:
        TuneError: the bundle's recipe has changed.
    """
    import torch

    from aot_cache.upstream.hooks import inductor_tuning

    wanted = {
        name
        for graph in manifest.graphs
        for name, several in graph.candidates.items()
        if several and (again or not graph.choices.get(name))
    }
    if not wanted:
        return {}
    recipe = recipes.load(manifest.spec)
    plan: dict[tuple[str, str], list[str]] = {}
    for graph in manifest.graphs:
        plan.setdefault(a_point(graph.reached), []).extend(name for name in graph.graphs if name in wanted)
    plan = {at: found for at, found in plan.items() if found}
    chosen: Choices = {}
    for done, ((name, text), found) in enumerate(sorted(plan.items())):
        progress("tune graphs", done, len(plan))
        case = case_of(recipe, name)
        kernels = {graph: graphs.load_again(graph, None) for graph in found}
        with case.modes(), inductor_tuning.measuring():
            case.call(json.loads(text))()
        torch.cuda.synchronize()
        for compiled, several in kernels.items():
            numbers = {kernel.key: kernel.measured() for kernel in several}
            chosen[compiled] = {key: number for key, number in numbers.items() if number is not None}
            if len(chosen[compiled]) < len(numbers):
                graphs.load_again(compiled, chosen[compiled])  # a kernel that did not run must not measure in a capture
    progress("tune graphs", len(plan), len(plan))
    return chosen


def a_point(reached: Reached) -> tuple[str, str]:
    """(case, point as JSON): the largest point of one of the cases that reach a kernel or a graph."""
    case, boxes = min(reached.items())
    return case, json.dumps(dimensions.expand(boxes)[-1])


def case_of(recipe: Recipe, name: str) -> Case:
    """The case of that name.

    Raises:
        TuneError: the recipe no longer has it.
    """
    for case in recipe.cases:
        if case.name == name:
            return case
    raise TuneError(f"recipe {recipe.name!r} no longer has case {name!r}", hint="build the bundle again")
