"""What children made of the kinds of calls, and all graphs of a recipe that come of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from aot_cache.artifact.key import GRAPHS
from aot_cache.artifact.manifest import graph_from_json, plain
from aot_cache.artifact.plan import Failure
from aot_cache.builder.messages import TracedGraph
from aot_cache.builder.one_point import Broken
from aot_cache.store import JsonObject, Store


@dataclass
class Made:
    """All graphs of a recipe, as JSON facts, and what could not be made.

    Args:
        graphs: one entry for each frame's bytecode; bytes are in the store.
        failed: kinds of calls of which something could not be compiled, with the reason.
        compiled: how many kinds of calls were compiled now, and not found in the store.
        key: what all graphs are bound to, see `key.graph_parts`.
    """

    graphs: list[TracedGraph] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    compiled: int = 0
    key: JsonObject = field(default_factory=dict)


@dataclass
class Answer:
    """What a child made of one kind of call."""

    graphs: list[TracedGraph] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)
    """Case → why its calls could not be compiled."""
    broken: Broken | None = None
    """A case whose own code cannot be run at a point: it is taken out, and the kind is compiled without it."""
    strange: list[tuple[int, int]] = field(default_factory=list)
    """(case, point) where a call was seen that is of no known kind."""
    fresh: bool = False


def stored(store: Store, graph_key: str) -> Answer | None:
    record = store.get_record(GRAPHS, graph_key)
    if record is None:
        return None
    graphs = [graph_from_json(TracedGraph, graph) for graph in record["graphs"]]
    if not all(store.has(digest) for graph in graphs for digest in graph.objects()):
        return None
    return Answer(graphs, strange=[(case, at) for case, at in record["strange"]])


def put(store: Store, graph_key: str, answer: Answer) -> None:
    """Keep what a child made, for `stored`."""
    store.put_record(GRAPHS, graph_key, {"graphs": plain(answer.graphs), "strange": answer.strange})


def together(answers: Sequence[Answer]) -> Answer:
    """The answers of each case as one of all: what was made of some, and why it was not of the others."""
    out = Answer()
    for answer in answers:
        out.graphs += answer.graphs
        out.failed |= answer.failed
        out.broken = out.broken or answer.broken
        out.strange += answer.strange
        out.fresh |= answer.fresh
    return out


def order(item: tuple[str, TracedGraph]) -> tuple[str, ...]:
    digest, graph = item
    names = ("module", "function", "mode", "dynamic", "guards")  # for people first, and for a diff of two builds
    return (*(str(getattr(graph, name)) for name in names), digest)
