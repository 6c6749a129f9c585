"""Graphs of a job's ranks side by side: what holds a rank's number is built for each rank, everything else once.

A bundle is for all ranks. But a number that a compiled function asks for while it is traced (`dist.get_rank()`) becomes part
of its graph, without a guard: served to another rank it would be wrong. So the recipe is traced as rank 0 and as rank 1, and
where they differ as all others, too, and those graphs are marked with their rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aot_cache import key
from aot_cache.manifest import graph_name

Json = Any
_NOT_CODE = ("reached", "asks_rank", "kernels")


def differing(one: Sequence[Mapping[str, Json]], other: Sequence[Mapping[str, Json]]) -> dict[str, str]:
    """Each function, as `module:qualname`, whose graphs differ between two ranks → where the number comes from."""
    mine, theirs = _by_function(one), _by_function(other)
    return {
        name: _why(mine.get(name, []), theirs.get(name, []))
        for name in sorted({*mine, *theirs})
        if _contents(mine.get(name, [])) != _contents(theirs.get(name, []))
    }


def combined(ranks: Sequence[Sequence[Mapping[str, Json]]], why: Mapping[str, str]) -> list[dict[str, Json]]:
    """The graphs of all ranks: those of functions in `why` marked with their rank, the others of the first rank."""
    out = []
    for rank, graphs in enumerate(ranks):
        for graph in graphs:
            name = graph_name(graph)
            if name in why:
                out.append({**_without(graph), "rank": rank, "per_rank": why[name]})
            elif rank == 0:
                out.append({**_without(graph), "rank": None, "per_rank": ""})
    return out


def _by_function(graphs: Sequence[Mapping[str, Json]]) -> dict[str, list[Mapping[str, Json]]]:
    found: dict[str, list[Mapping[str, Json]]] = {}
    for graph in graphs:
        found.setdefault(graph_name(graph), []).append(graph)
    return found


def _without(graph: Mapping[str, Json]) -> dict[str, Json]:
    return {name: value for name, value in graph.items() if name != "asks_rank"}


def _contents(graphs: Sequence[Mapping[str, Json]]) -> list[str]:
    return sorted(key.digest({k: v for k, v in graph.items() if k not in _NOT_CODE}) for graph in graphs)


def _why(mine: Sequence[Mapping[str, Json]], theirs: Sequence[Mapping[str, Json]]) -> str:
    """Where a rank's number comes from, as far as it can be told."""
    asking = sorted({place for graph in [*mine, *theirs] for place in graph["asks_rank"]})
    if asking:
        return f"the rank's number is asked for in {', '.join(asking)}"
    guards = [{tuple(value) for graph in graphs for value in graph["values"]} for graphs in (mine, theirs)]
    values = sorted(str(value[0]) for value in guards[0] ^ guards[1])
    texts = [{guard for graph in graphs for guard in graph["guards"]} for graphs in (mine, theirs)]
    only = [*dict.fromkeys(values), *sorted(texts[0] - texts[1])]
    if only:
        return f"it is guarded by {'; '.join(only[:3])}"
    return "its code differs between rank 0 and rank 1"
