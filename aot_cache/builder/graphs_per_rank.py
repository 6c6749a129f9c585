"""Graphs of a job's ranks side by side: what holds a rank's number is built for each rank, everything else once.

A bundle is for all ranks. But a number that a compiled function asks for while it is traced (`dist.get_rank()`) becomes part
of its graph, without a guard: served to another rank it would be wrong. So the recipe is traced as every rank, and where
they differ the graphs are marked with their rank. That two are the same says nothing of a third: it may be the last stage of a
pipeline, or the first of a second host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from aot_cache.artifact import key
from aot_cache.artifact.manifest import Graph, plain
from aot_cache.builder.messages import TracedGraph

_NOT_CODE = ("reached", "points", "asks_rank", "kernels")


def differing(ranks: Sequence[Sequence[TracedGraph]]) -> dict[str, str]:
    """Each function, as `module:qualname`, whose graphs are not the same on all ranks → where the number comes from."""
    found = [_by_function(graphs) for graphs in ranks]
    out: dict[str, str] = {}
    for name in sorted({name for graphs in found for name in graphs}):
        contents = [_contents(graphs.get(name, [])) for graphs in found]
        other = next((rank for rank, content in enumerate(contents) if content != contents[0]), None)
        if other is not None:
            out[name] = _why([graphs.get(name, []) for graphs in found], other)
    return out


def combined(ranks: Sequence[Sequence[TracedGraph]], why: Mapping[str, str]) -> list[Graph]:
    """The graphs of all ranks: those of functions in `why` marked with their rank, the others of the first rank."""
    out = []
    for rank, graphs in enumerate(ranks):
        for graph in graphs:
            if graph.name in why:
                out.append(_graph(graph, rank, why[graph.name]))
            elif rank == 0:
                out.append(_graph(graph, None, ""))
    return out


def _by_function(graphs: Sequence[TracedGraph]) -> dict[str, list[TracedGraph]]:
    found: dict[str, list[TracedGraph]] = {}
    for graph in graphs:
        found.setdefault(graph.name, []).append(graph)
    return found


def _graph(found: TracedGraph, rank: int | None, why: str) -> Graph:
    """A traced graph as a bundle has it."""
    parts = {part.name: getattr(found, part.name) for part in fields(Graph)}
    return Graph(**{**parts, "rank": rank, "per_rank": why})


def _contents(graphs: Sequence[TracedGraph]) -> list[str]:
    return sorted(key.digest({k: v for k, v in plain(graph).items() if k not in _NOT_CODE}) for graph in graphs)


def _why(ranks: Sequence[Sequence[TracedGraph]], other: int) -> str:
    """Where a rank's number comes from, as far as it can be told.

    Args:
        ranks: the graphs of one function.
        other: the first rank whose are not the first one's.
    """
    asking = sorted({place for graphs in ranks for graph in graphs for place in graph.asks_rank})
    if asking:
        return f"the rank's number is asked for in {', '.join(asking)}"
    mine, theirs = ranks[0], ranks[other]
    if not mine or not theirs:
        return f"rank {0 if mine else other} calls it, and rank {other if mine else 0} does not"
    guards = [{tuple(value) for graph in graphs for value in graph.values} for graphs in (mine, theirs)]
    values = sorted(str(value[0]) for value in guards[0] ^ guards[1])
    texts = [{guard for graph in graphs for guard in graph.guards} for graphs in (mine, theirs)]
    only = [*dict.fromkeys(values), *sorted(texts[0] - texts[1])]
    if only:
        return f"it is guarded by {'; '.join(only[:3])}"
    return f"its code differs between rank 0 and rank {other}"
