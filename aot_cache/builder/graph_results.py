"""What a child made of one call signature, and what a build has of all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aot_cache.artifact.key import GRAPHS
from aot_cache.artifact.manifest import graph_from_json, plain
from aot_cache.artifact.plan import Failure
from aot_cache.builder.messages import TracedGraph
from aot_cache.builder.one_point import Broken
from aot_cache.store import JsonObject, Store


@dataclass
class GraphBuildResult:
    """All graphs of a recipe, and what could not be compiled.

    Args:
        graphs: one entry for each frame's bytecode; bytes are in the store.
        failed: call signatures that could not be compiled, whole or in part, with the reason.
        compiled: how many call signatures were compiled now; the others were in the store.
        key: properties of target and toolchain that all graphs depend on, see `key.graph_parts`.
    """

    graphs: list[TracedGraph] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    compiled: int = 0
    key: JsonObject = field(default_factory=dict)


@dataclass
class CompileResult:
    """What a child made of one call signature."""

    graphs: list[TracedGraph] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    """Case → why its calls could not be compiled."""
    broken: Broken | None = None
    """A case whose host code fails at a point. It is dropped, and the signature is compiled without it."""
    unmatched: list[tuple[int, int]] = field(default_factory=list)
    """(case, point) pairs with a call that matches no known signature."""
    fresh: bool = False


def named(record: Mapping[str, Any]) -> set[str]:
    """The objects that a record of graphs names."""
    return {digest for graph in _graphs(record) for digest in graph.objects()}


def stored(store: Store, graph_key: str) -> CompileResult | None:
    record = store.get_record(GRAPHS, graph_key)
    if record is None:
        return None
    graphs = _graphs(record)
    if not all(store.holds(digest) for graph in graphs for digest in graph.objects()):
        return None
    return CompileResult(graphs, unmatched=[(case, at) for case, at in record["unmatched"]])


def _graphs(record: Mapping[str, Any]) -> list[TracedGraph]:
    return [graph_from_json(TracedGraph, graph) for graph in record["graphs"]]


def put(store: Store, graph_key: str, answer: CompileResult) -> None:
    """Keep what a child made, for `stored`."""
    store.put_record(GRAPHS, graph_key, {"graphs": plain(answer.graphs), "unmatched": answer.unmatched})


def merged(answers: Sequence[CompileResult]) -> CompileResult:
    """The results of single cases as one: the graphs of some, and the failures of the others."""
    out = CompileResult()
    for answer in answers:
        out.graphs += answer.graphs
        out.failed |= answer.failed
        out.broken = out.broken or answer.broken
        out.unmatched += answer.unmatched
        out.fresh |= answer.fresh
    return out


def order(item: tuple[str, TracedGraph]) -> tuple[str, ...]:
    digest, graph = item
    names = ("module", "function", "mode", "dynamic", "guards")  # for people first, and for a diff of two builds
    return (*(str(getattr(graph, name)) for name in names), digest)
