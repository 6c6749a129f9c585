"""Assembles what workers compiled into a bundle's manifest and objects."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from aot_cache.artifact import at_start, scan
from aot_cache.artifact.engine_cache import NO_CACHES, Caches
from aot_cache.artifact.manifest import KIND, Graph, Kernel, KernelUnit, Manifest, Pruned, TuningChoice
from aot_cache.artifact.plan import Failure, Plan, Tuning, Unit
from aot_cache.artifact.plan_of_ranks import ranks_of_kernel
from aot_cache.artifact.target import Target
from aot_cache.builder import stored
from aot_cache.recipes import dimensions
from aot_cache.store import Store

if TYPE_CHECKING:
    from aot_cache.builder.workers import BuildResult


def assemble(
    target: Target,
    spec: str,
    result: BuildResult,
    store: Store,
    marks: Sequence[at_start.Mark] = (),
    caches: Caches = NO_CACHES,
) -> tuple[Manifest, dict[str, bytes]]:
    """(manifest, objects by digest) of the bundle with everything in `result`, for `target`.

    Args:
        spec: text that loads the recipe.
        marks: constants that are known only when the server starts.
        caches: entries of an engine's compile cache, which go in as they are.

    Raises:
        DeclarationError: no kernel has a marked constant.
        StoreChanged: the store lacks something that the workers have put there.
    """
    plan = result.plan
    kernels = sorted({unit.kernel for unit in plan.units})
    number = {name: n for n, name in enumerate(kernels)}
    units: list[KernelUnit] = []
    pruned: list[Pruned] = []
    failed = [*(case.failure() for case in plan.failed), *result.failed]
    listed = {failure.unit for failure in failed}
    lost = {unit_key for unit, unit_key in zip(plan.units, result.keys, strict=True) if unit.id in listed}
    objects: dict[str, bytes] = {}
    for unit, unit_key, memory_key in zip(plan.units, result.keys, result.memory_keys, strict=True):
        if unit_key in lost:
            continue
        record = stored.unit(store, unit, unit_key)
        why = record.get("pruned") or misfit(record["metadata"], target)
        if why and unit.launched_without_tuner():  # no tuner can skip it, so its launch would fail
            failed.append(Failure(kernel=unit.kernel, unit=unit.id, error=why))
            continue
        if why:
            pruned.append(Pruned(kernel=unit.kernel, unit=unit.id, via=unit.via, why=why))
            continue
        objects[record["object"]] = stored.object_of(store, record["object"])
        units.append(
            KernelUnit(
                kernel=number[unit.kernel],
                key=unit_key,
                memory_key=memory_key,
                specialization=unit.specialization,
                options=unit.options,
                option_order=list(unit.options),  # part of Triton's key, and a manifest's keys are sorted
                object=record["object"],
                metadata=record["metadata"],
                via=unit.via,
                reached=unit.reached,
                ranks=unit.ranks,
            )
        )
    graphs = _for_servers(result.graphs, store, failed)
    for digest in sorted({digest for graph in graphs for digest in graph.objects()}):
        objects[digest] = stored.object_of(store, digest)
    objects.update(caches.objects)
    for native in result.native:
        objects[native.object] = stored.object_of(store, native.object)
    reached = {unit.id: unit.reached for unit in plan.units}
    common, units = _factor(units)
    tunings = [_tuning(n, tuning, number, units, plan.units) for n, tuning in enumerate(plan.tunings)]
    listed_kernels = [
        Kernel(name=name, closure=plan.closures[name], ranks=ranks_of_kernel(plan, name)) for name in kernels
    ]
    manifest = Manifest(
        kind=KIND,
        recipe=plan.recipe,
        spec=spec,
        origin=plan.origin,
        ranks=plan.ranks,
        target=target.properties(),
        toolchain=result.toolchain or {"triton": ""},
        cases=plan.cases,
        kernels=listed_kernels,
        metadata=common,
        units=units,
        tunings=tunings,
        pruned=pruned,
        failed=[one if one.reached is not None else replace(one, reached=reached.get(one.unit)) for one in failed],
        native=result.native,
        graph_key=result.graph_key if graphs else {},
        graphs=graphs,
        calls=plan.calls,
        complete=not failed,
        at_start=at_start.variants(marks, listed_kernels, [unit for unit in units if _is_served(unit, tunings)]),
        engine_caches=caches.entries,
    )
    return manifest, objects


def _is_served(unit: KernelUnit, tunings: Sequence[TuningChoice]) -> bool:
    """Whether a server launches a unit as long as nothing is tuned: not through a candidate that was not chosen."""
    for number, candidate in unit.via:
        if number < 0 or candidate < 0:
            return True
        tuning = tunings[number]
        chosen = tuning.choice if tuning.choice is not None else tuning.served().first
        if tuning.candidates[candidate] == chosen:
            return True
    return not unit.via


def _for_servers(graphs: Sequence[Graph], store: Store, failed: list[Failure]) -> list[Graph]:
    """The graphs, without those that have builder-only state (see `scan`), which are added to `failed`."""
    wrong: dict[int, list[str]] = {}
    for finding in scan.findings(graphs, partial(stored.object_of, store)):
        wrong.setdefault(finding.graph, []).append(finding.what)
    for number, what in sorted(wrong.items()):
        graph, why = graphs[number], f"its graph would hit nowhere: {'; '.join(what[:3])}"
        failed.append(Failure(kernel=graph.name, unit=graph.guard_state[:16], error=why, reached=graph.reached))
    return [graph for number, graph in enumerate(graphs) if number not in wrong]


def covered(plan: Plan, failed: Iterable[Failure]) -> int:
    """Number of visited points that reach nothing that failed; 0 if the points of a failure are not known.

    No point of a case that could not be run is covered.
    """
    reached = {unit.id: unit.reached for unit in plan.units} | {call.id: call.reached for call in plan.calls}
    gone = {one.case for one in plan.failed}
    lost: set[tuple[str, str]] = set()
    for failure in failed:
        if failure.kernel.startswith("case "):  # such a failure names one point only
            lost.add((failure.kernel.removeprefix("case "), failure.unit))
        elif failure.unit not in reached and failure.reached is None:
            return 0
        at = failure.reached if failure.reached is not None else reached.get(failure.unit, {})
        for case, boxes in at.items():
            lost.update((case, dimensions.point_text(point)) for point in dimensions.expand(boxes))
    visited = sum(case.points for case in plan.cases if case.name not in gone)
    return visited - sum(case not in gone for case, _ in lost)


def _tuning(
    number: int, tuning: Tuning, kernels: Mapping[str, int], units: Sequence[KernelUnit], planned: Sequence[Unit]
) -> TuningChoice:
    """A tuning of the plan. Its default is the first candidate of which every planned unit is in the bundle."""
    here = Counter(c for unit in units for t, c in unit.via if t == number)
    wanted = Counter(c for unit in planned for t, c in unit.via if t == number)
    return TuningChoice(
        kernel=kernels[tuning.kernel],
        tuner=tuning.tuner,
        key=tuning.key,
        candidates=tuning.candidates,
        choice=tuning.choice,
        measured=tuning.measured,
        reached=tuning.reached,
        default=next((c for c in range(len(tuning.candidates)) if 0 < wanted[c] == here[c]), None),
        ranks=tuning.ranks,
    )


def misfit(metadata: Mapping[str, Any], target: Target) -> str:
    """Why a compiled kernel cannot be loaded on `target`; empty if it can. Triton would find out at the first launch."""
    if metadata.get("shared", 0) > target.shared_memory_per_block_optin:
        return (
            f"needs {metadata['shared']} bytes of shared memory, {target.id} has {target.shared_memory_per_block_optin}"
        )
    return ""


def _factor(units: Sequence[KernelUnit]) -> tuple[dict[str, Any], list[KernelUnit]]:
    """(the common part of all units' metadata, the units without it). It is most of the metadata, and is parsed only once."""
    if not units:
        return {}, []
    common = dict(units[0].metadata)
    for unit in units:
        common = {k: v for k, v in common.items() if k in unit.metadata and unit.metadata[k] == v}
    own = [{k: v for k, v in unit.metadata.items() if k not in common} for unit in units]
    return common, [replace(unit, metadata=metadata) for unit, metadata in zip(units, own)]
