"""Differences between two plans or bundles: specializations, choices, compiled calls and graphs. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aot_cache.artifact.key import digest
from aot_cache.artifact.manifest import Graph, whole
from aot_cache.artifact.plan import CallPlan, Plan, Tuning, Unit
from aot_cache.artifact.plan import diff as plan_diff
from aot_cache.artifact.specialization import Names, no_names, signature, value_text
from aot_cache.cli.facts.bundle import form, form_of, many, plan_of, reached_text
from aot_cache.cli.facts.graphs import changes, options_text
from aot_cache.errors import DeclarationError
from aot_cache.store import Bundle

Facts = dict[str, Any]

_ASKED = {
    "mode": "the mode",
    "wrapping": "the options of torch.compile",
    "rank": "the rank",
    "code": "the function's source",
    "inlined": "the source of what it calls",
    "settings": "Inductor's settings",
    "dynamic": "which sizes may change",
    "identities": "guards on objects",
    "values": "guards on values",
    "guards": "guards",
}
"""The parts of a graph that decide which calls it is for → their names in messages."""


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a plan file, or the contents of a bundle.

    Args:
        path: the file.
        plan: its plan.
        pruned: ids of units that a bundle left out because they do not fit the target; None for a plan file.
        graphs: the bundle's graphs; None for a plan file, which has only compiled calls.
        bound: the key parts to which the bundle's graphs are bound (`key.graph_parts`).
    """

    path: Path
    plan: Plan
    pruned: frozenset[str] | None = None
    graphs: Sequence[Graph] | None = None
    bound: Mapping[str, Any] | None = None


def side(found: Bundle) -> Side:
    """The side of a bundle. Raises BundleCorrupt if the manifest does not have this version's form."""
    with form_of(found):
        manifest = whole(found)
        pruned = frozenset(one.unit for one in manifest.pruned)
        return Side(found.path, plan_of(manifest), pruned, manifest.graphs, manifest.graph_key)


def diff(left: Side, right: Side, names: Names = no_names) -> Facts:
    """What each side has and the other lacks.

    A bundle's units have no overrides (these are in the specialization, too), and lack units that do not fit the target;
    neither counts as a difference, because the launches are the same. Two bundles are compared by their graphs; if one side is
    a plan, by their compiled calls.
    """
    with form(DeclarationError, f"plans of this version at {left.path} and {right.path}"):
        found = plan_diff(_comparable(left, right), _comparable(right, left))
        of_left, of_right, otherwise = _graphs(left, right)
        facts: Facts = {
            "left": str(left.path),
            "right": str(right.path),
            "only_left": {**_only(found.only_left, found.tunings_left, left.plan, names), **of_left},
            "only_right": {**_only(found.only_right, found.tunings_right, right.plan, names), **of_right},
            "compiled_otherwise": otherwise,
        }
        differences = [*facts["only_left"].values(), *facts["only_right"].values(), otherwise]
        return {"same": not any(differences), "summary": _summary(facts), **facts}


def _comparable(one: Side, other: Side) -> Plan:
    units = [u for u in one.plan.units if u.id not in (other.pruned or ())]
    if one.pruned is not None or other.pruned is not None:
        units = [replace(u, overrides={}) for u in units]
    return replace(one.plan, units=units)


def _only(units: Iterable[Unit], tunings: Iterable[Tuning], found: Plan, names: Names) -> Facts:
    return {
        "units": [
            {
                "kernel": u.kernel,
                "signature": signature(u, names(u.kernel, found.closures[u.kernel])),
                "source": u.source,
                "reached": u.reached,
                "reached_by": reached_text(u.reached),
            }
            for u in units
        ],
        "tunings": [
            {
                "kernel": t.kernel,
                "key": [value_text(k) for k in t.key],
                "candidates": len(t.candidates),
                "reached": t.reached,
            }
            for t in tunings
        ],
    }


# --- graphs -----------------------------------------------------------------------------------------------------------


def _graphs(left: Side, right: Side) -> tuple[Facts, Facts, list[Facts]]:
    """(only in left, only in right, graphs for the same calls with different compiled code)."""
    if left.graphs is None or right.graphs is None:
        calls = [{call.id: call for call in one.plan.calls} for one in (left, right)]
        alone = [
            [_row(c.function, c) for i, c in mine.items() if i not in other] for mine, other in (calls, calls[::-1])
        ]
        return {"calls": alone[0]}, {"calls": alone[1]}, []
    mine, theirs = ({digest(_asked(graph)): graph for graph in found} for found in (left.graphs, right.graphs))
    only = [_alone(mine, theirs), _alone(theirs, mine)]
    bound = _bound(left.bound or {}, right.bound or {})
    otherwise = [
        {**_row(graph.name, graph), "differs": bound or ["its compiled code"]}
        for asked, graph in mine.items()
        if asked in theirs and _made(graph) != _made(theirs[asked])
    ]
    return {"graphs": only[0]}, {"graphs": only[1]}, otherwise


def _asked(graph: Graph) -> Facts:
    """The calls that a graph is for. Line numbers of its source are not a part of it."""
    return {"function": graph.name, **{part: getattr(graph, part) for part in _ASKED}}


def _made(graph: Graph) -> tuple[set[str], object]:
    return graph.objects(), graph.choices


def _alone(mine: Mapping[str, Graph], others: Mapping[str, Graph]) -> list[Facts]:
    rows = []
    for asked, graph in mine.items():
        if asked not in others:
            alike = [_differing(graph, other) for other in others.values() if other.name == graph.name]
            rows.append(
                {
                    **_row(graph.name, graph),
                    "differs": min(alike, key=len, default=["no graph of this function"]),
                }
            )
    return rows


def _differing(one: Graph, other: Graph) -> list[str]:
    return [words for part, words in _ASKED.items() if getattr(one, part) != getattr(other, part)]


def _bound(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The differing key parts of two bundles' graphs, e.g. `torch 2.13.0 and 2.14.1`."""
    return [
        f"{name} {one.get(name)} and {other.get(name)}"
        for name in {**one, **other}
        if one.get(name) != other.get(name) and name != "target"
    ]


def _row(function: str, found: Graph | CallPlan) -> Facts:
    """The row of a graph, or of a compiled call of a plan."""
    return {
        "function": function,
        "line": found.line,
        "mode": found.mode,
        "options": options_text(found.wrapping or {}),
        "changes": changes(found.dynamic),
        "reached": found.reached,
        "reached_by": reached_text(found.reached),
    }


# --- one line ---------------------------------------------------------------------------------------------------------

_WORDS = {"units": "specialization", "tunings": "choice", "graphs": "graph", "calls": "compiled call"}


def _summary(facts: Facts) -> str:
    """`only left: 2 specializations, 1 graph; only right: 1 graph; compiled differently: 3 graphs`."""
    parts = []
    for where in ("left", "right"):
        only = facts[f"only_{where}"]
        counts = [many(len(only[kind]), word) for kind, word in _WORDS.items() if only.get(kind)]
        parts += [f"only {where}: {', '.join(counts)}"] if counts else []
    if facts["compiled_otherwise"]:
        parts.append(f"compiled differently: {many(len(facts['compiled_otherwise']), 'graph')}")
    return "; ".join(parts) or "the same is launched by both"
