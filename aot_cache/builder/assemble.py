"""Put a plan's compiled units together into a bundle's manifest and objects."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from aot_cache.artifact import scan
from aot_cache.artifact.key import UNITS, objects_of
from aot_cache.artifact.plan import Plan, Tuning
from aot_cache.artifact.plan_of_ranks import ranks_of_kernel
from aot_cache.artifact.target import Target
from aot_cache.recipes import dimensions
from aot_cache.store import Store

Json = Any


def assemble(
    target: Target, spec: str, plan: Plan, store: Store, answer: Mapping[str, Json]
) -> tuple[dict[str, Json], dict[str, bytes]]:
    """(manifest, objects) of the bundle for `plan`; `answer` is the worker's `compiled` event."""
    kernels = sorted({unit.kernel for unit in plan.units})
    number = {name: n for n, name in enumerate(kernels)}
    units: list[dict[str, Json]] = []
    pruned: list[dict[str, Json]] = []
    failed = [case.failure() for case in plan.failed]
    failed += [*answer.get("failed", []), *answer.get("graph_failed", [])]
    listed = {failure["unit"] for failure in failed}
    objects: dict[str, bytes] = {}
    for unit, unit_key, memory_key in zip(
        plan.units, answer.get("keys", []), answer.get("memory_keys", []), strict=True
    ):
        record = store.get_record(UNITS, unit_key)
        if record is None or unit.id in listed:
            continue  # it failed, and is listed so
        why = record.get("pruned") or misfit(record["metadata"], target)
        if why and unit.launched_without_tuner():  # no tuner will pass it over: its launch fails
            failed.append({"kernel": unit.kernel, "unit": unit.id, "error": why})
            continue
        if why:
            pruned.append({"kernel": unit.kernel, "unit": unit.id, "via": unit.via, "why": why})
            continue
        objects[record["object"]] = store.get(record["object"])
        units.append(
            {
                "kernel": number[unit.kernel],
                "key": unit_key,
                "memory_key": memory_key,
                "specialization": unit.specialization,
                "options": unit.options,
                "option_order": list(unit.options),  # part of Triton's key, and a manifest's keys are sorted
                "object": record["object"],
                "metadata": record["metadata"],
                "via": unit.via,
                "reached": unit.reached,
                "ranks": unit.ranks,
            }
        )
    graphs = _for_servers(answer.get("graphs", []), store, failed)
    for digest in sorted({digest for graph in graphs for digest in objects_of(graph)}):
        objects[digest] = store.get(digest)
    for native in answer.get("native", []):
        objects[native["object"]] = store.get(native["object"])
    reached = {unit.id: unit.reached for unit in plan.units}
    manifest = {
        "kind": "units",
        "recipe": plan.recipe,
        "spec": spec,
        "origin": plan.origin,
        "ranks": plan.ranks,
        "target": target.properties(),
        "toolchain": answer.get("toolchain", {"triton": ""}),
        "cases": [asdict(case) for case in plan.cases],
        "kernels": [
            {"name": name, "closure": plan.closures[name], "ranks": ranks_of_kernel(plan, name)} for name in kernels
        ],
        "metadata": _factor(units),
        "units": units,
        "tunings": [
            {**asdict(t), "kernel": number[t.kernel], "default": _first_that_fits(n, t, units, pruned)}
            for n, t in enumerate(plan.tunings)
        ],
        "pruned": pruned,
        "failed": [{**({"reached": reached[f["unit"]]} if f["unit"] in reached else {}), **f} for f in failed],
        "native": list(answer.get("native", [])),
        "graph_key": answer.get("graph_key", {}) if graphs else {},
        "graphs": graphs,
        "calls": [asdict(call) for call in plan.calls],
        "complete": not failed,
    }
    return manifest, objects


def _for_servers(
    graphs: Sequence[dict[str, Json]], store: Store, failed: list[dict[str, Json]]
) -> list[dict[str, Json]]:
    """Graphs without those that hold something which no server has (`scan`): they are added to what failed."""
    wrong: dict[int, list[str]] = {}
    for finding in scan.findings(graphs, store.get):
        wrong.setdefault(finding.graph, []).append(finding.what)
    for number, what in sorted(wrong.items()):
        graph = graphs[number]
        name, why = f"{graph['module']}:{graph['function']}", f"its graph would hit nowhere: {'; '.join(what[:3])}"
        unit = {"unit": graph["guard_state"][:16], "reached": graph["reached"]}
        failed.append({"kernel": name, "error": why, **unit})
    return [graph for number, graph in enumerate(graphs) if number not in wrong]


def covered(plan: Plan, failed: Iterable[Mapping[str, Json]]) -> int:
    """How many of the visited points reach nothing that failed; 0 where a failure belongs to no point that is known.

    Of a case that could not be run none is covered.
    """
    reached = {unit.id: unit.reached for unit in plan.units} | {call.id: call.reached for call in plan.calls}
    gone = {one.case for one in plan.failed}
    lost: set[tuple[str, str]] = set()
    for failure in failed:
        if failure["kernel"].startswith("case "):  # a point of it, which is all that such a failure names
            lost.add((failure["kernel"].removeprefix("case "), failure["unit"]))
        elif failure["unit"] not in reached and "reached" not in failure:
            return 0
        for case, boxes in failure.get("reached", reached.get(failure["unit"], {})).items():
            lost.update((case, dimensions.point_text(point)) for point in dimensions.expand(boxes))
    visited = sum(case.points for case in plan.cases if case.name not in gone)
    return visited - sum(case not in gone for case, _ in lost)


def _first_that_fits(
    number: int, tuning: Tuning, units: list[dict[str, Json]], pruned: list[dict[str, Json]]
) -> int | None:
    """The candidate that is taken without a measurement: the first whose every unit is in the bundle."""
    here = {c for unit in units for t, c in unit["via"] if t == number}
    lacking = {c for unit in pruned for t, c in unit["via"] if t == number}
    return next((c for c in range(len(tuning.candidates)) if c in here and c not in lacking), None)


def misfit(metadata: Mapping[str, Json], target: Target) -> str:
    """Why a compiled kernel cannot be loaded on `target`; empty when it can. Triton finds out at the first launch."""
    if metadata.get("shared", 0) > target.shared_memory_per_block_optin:
        return (
            f"needs {metadata['shared']} bytes of shared memory, {target.id} has {target.shared_memory_per_block_optin}"
        )
    return ""


def _factor(units: list[dict[str, Json]]) -> dict[str, Json]:
    """Move what all units' metadata have in common into one mapping: most of it, and load parses it once."""
    if not units:
        return {}
    common = dict(units[0]["metadata"])
    for unit in units:
        metadata = unit["metadata"]
        common = {k: v for k, v in common.items() if k in metadata and metadata[k] == v}
    for unit in units:
        unit["metadata"] = {k: v for k, v in unit["metadata"].items() if k not in common}
    return common
