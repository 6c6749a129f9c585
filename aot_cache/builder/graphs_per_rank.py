"""Compares the graphs of a job's ranks: graphs that depend on the rank are kept for each rank, all others once.

A bundle is for all ranks. But the rank that a compiled function reads while it is traced (`dist.get_rank()`) becomes part of its
graph, without a guard, and the graph would be wrong on another rank. So the recipe is traced as every rank, and graphs that
differ are marked with their rank. Two equal ranks are not enough: a third may be the last stage of a pipeline, or the first rank
of a second host.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields

from aot_cache.artifact import key
from aot_cache.artifact.manifest import Graph, plain
from aot_cache.builder.messages import TracedGraph

_NOT_CODE = ("reached", "points", "asks_rank", "kernels")


def differing(ranks: Sequence[Sequence[TracedGraph]]) -> dict[str, str]:
    """Function (`module:qualname`) whose graphs are not the same on all ranks → why they differ."""
    found = [_by_function(graphs) for graphs in ranks]
    out: dict[str, str] = {}
    for name in sorted({name for graphs in found for name in graphs}):
        contents = [_contents(graphs.get(name, [])) for graphs in found]
        other = next((rank for rank, content in enumerate(contents) if content != contents[0]), None)
        if other is not None:
            out[name] = _why([graphs.get(name, []) for graphs in found], other)
    return out


def combined(ranks: Sequence[Sequence[TracedGraph]], why: Mapping[str, str]) -> list[Graph]:
    """The graphs of all ranks: of functions in `why` those of each rank, marked with it; of all others the first rank's."""
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
    """A traced graph as a manifest's graph."""
    parts = {part.name: getattr(found, part.name) for part in fields(Graph)}
    return Graph(**{**parts, "rank": rank, "per_rank": why})


def _contents(graphs: Sequence[TracedGraph]) -> list[str]:
    return sorted(key.digest({k: v for k, v in plain(graph).items() if k not in _NOT_CODE}) for graph in graphs)


def _why(ranks: Sequence[Sequence[TracedGraph]], other: int) -> str:
    """Why the graphs of one function differ, as far as it is known.

    Args:
        ranks: its graphs on each rank.
        other: the first rank whose graphs differ from rank 0's.
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
