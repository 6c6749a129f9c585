"""Facts about compiled graphs and compiled calls, as plain JSON-able dicts. Imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from aot_cache.artifact.manifest import Graph, call_label, graph_label
from aot_cache.artifact.plan import CallPlan
from aot_cache.misses.size_relations import readable

Facts = dict[str, Any]


def calls(found: Iterable[CallPlan]) -> list[Facts]:
    """One row for each call signature for which a plan asks graphs."""
    return [
        {
            "label": call_label(number),
            "function": call.function,
            "line": call.line,
            "mode": call.mode,
            "options": options_text(call.wrapping),
            "changes": changes(call.dynamic),
            "hint": call.hint,
            "reached": call.reached,
            "id": call.id,
        }
        for number, call in enumerate(found)
    ]


def graphs(found: Sequence[Graph], sizes: Mapping[str, int]) -> list[Facts]:
    """One row for each graph of a bundle.

    Args:
        found: the bundle's graphs.
        sizes: digest → bytes of the bundle's objects.

    `open` lists the kernels with several configs for which none was chosen yet; `chosen` counts the chosen ones.
    """
    return [
        {
            "label": graph_label(number),
            "function": graph.name,
            "line": graph.line,
            "mode": graph.mode,
            "options": options_text(graph.wrapping or {}),
            "changes": changes(graph.dynamic),
            "kernels": list(graph.kernels),
            "open": [
                several.kernel
                for name, kernels in graph.candidates.items()
                for key, several in kernels.items()
                if key not in graph.choices.get(name, {})
            ],
            "chosen": sum(len(chosen) for chosen in graph.choices.values()),
            "breaks": len(graph.resumes),
            "bytes": sum(sizes[digest] for digest in graph.objects()),
            "guards": list(graph.guards),
            "identities": [f"{name} is {what}" for _, name, what in graph.identities],
            "inlined": [f"{module}:{name}" for module, name, _ in graph.inlined],
            "rank": graph.rank,
            "per_rank": graph.per_rank,
            "reached": graph.reached,
        }
        for number, graph in enumerate(found)
    ]


def changes(dynamic: Mapping[str, Sequence[Sequence[int]]]) -> str:
    """The dynamic sizes of a graph with their bounds, e.g. `x[0] 2..512, n 2..5`."""
    words = []
    for path, dims in dynamic.items():
        name = readable(path)
        words += [f"{name}[{d}] {low}..{high}" if d >= 0 else f"{name} {low}..{high}" for d, low, high in dims]
    return ", ".join(words) or "nothing"


def options_text(wrapping: Mapping[str, Any]) -> str:
    """The options and `dynamic` of a compile config; empty for the defaults."""
    words = [f"{name}={value}" for name, value in wrapping.get("options", {}).items()]
    return " ".join([*words, *([f"dynamic={wrapping['dynamic']}"] if wrapping.get("dynamic") is not None else [])])
