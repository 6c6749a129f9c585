"""The recipe of a recorded plan: compiled functions, called again as they were called in the program that was recorded."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from aot_cache.artifact.compiled_function import CompiledFunction
from aot_cache.artifact.plan import Plan
from aot_cache.errors import DeclarationError
from aot_cache.recipes.declare import Call, Case, Recipe, device
from aot_cache.recipes.dimensions import Range
from aot_cache.upstream.codec import call_arguments, torch_settings, unwrapping
from aot_cache.upstream.hooks import dynamo_calls


def recipe(config: str) -> Recipe:
    """The compiled functions of the plan file `config`, one case for each kind of call.

    A size that differs between calls changes with the point, so that the graphs hold from the smallest to the largest one that
    was recorded.

    Raises:
        DeclarationError: the plan has none that can be called again.
    """
    plan = Plan.read(Path(config))
    again = [function for function in plan.functions if not function.why]
    if not again:
        raise DeclarationError(
            "a recorded plan with compiled functions", f"none in {config}", "record with this version"
        )
    names: Counter[str] = Counter()
    cases = []
    for function in again:
        name = function.function.rpartition(":")[2]
        names[name] += 1
        cases.append(_case(function, f"{name}#{names[name]}" if names[name] > 1 else name))
    return Recipe(plan.recipe, cases)


def _case(function: CompiledFunction, name: str) -> Case:
    compiled: list[Any] = []

    def make(call: int) -> Call:
        torch_settings.set_all(function.settings)
        if not compiled:
            compiled.append(_compiled(function))
        args, kwargs = call_arguments.made(function.arguments, function.calls[call - 1], _here)
        return Call(compiled[0], *args, **kwargs)

    count = len(function.calls)
    doc = f"{function.function} as it was recorded, with {count} combination{'s' if count > 1 else ''} of sizes"
    return Case(name, make, {"call": Range(1, count)}, function.mode, function.autocast or None, doc=doc)


def _here(recorded: str) -> str:
    """The device for a tensor that was on the `recorded` one."""
    return recorded if recorded == "cpu" else device()


def _compiled(function: CompiledFunction) -> Any:
    found = unwrapping.named(function.function)
    by: dict[str, Any] = dict(function.compiled_by)
    if not by:
        return found
    if dynamo_calls.is_compiled(found):
        raise DeclarationError(
            f"a plain function {function.function}, which the recorded program compiled itself",
            "a compiled one",
            "record again with this version of it",
        )
    more = {"options": by["options"]} if by["options"] else {}
    compiled: Any = torch.compile(found, dynamic=by["dynamic"], fullgraph=by["fullgraph"], **more)
    return compiled
