"""The process that becomes one target: `python -m aot_cache.builder.worker`, started by `pipeline`.

Takes a job as JSON on stdin and answers with events, one JSON object a line, on a copy of stdout; whatever libraries
print goes to stderr. One process a target, because libraries decide at import what they will launch.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

Json = Any


class _OtherRanks(Exception):
    """The recipe is for a job of another size than this process was started in; nothing is done yet."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks


def main() -> int:
    job = json.loads(sys.stdin.readline())
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(kind: str, **data: Json) -> None:
        events.write(json.dumps({"event": kind, **data}) + "\n")

    from aot_cache.errors import AotCacheError

    try:
        _work(job, send)
    except _OtherRanks as other:
        send("ranks", ranks=other.ranks)
    except AotCacheError as error:
        send("error", type=type(error).__name__, wanted=error.wanted, found=error.found, do=error.do)
        return 1
    except Exception as error:
        traceback.print_exc()
        send(
            "error",
            type="AotCacheError",
            wanted="the build worker to finish",
            found=f"{type(error).__name__}: {error}",
            do="",
        )
        return 1
    return 0


def _work(job: dict[str, Json], send: Any) -> None:
    from aot_cache.artifact import target as targets

    target = targets.Target(**{**job["target"], "capability": tuple(job["target"]["capability"])})

    of_rank = f", rank {job['rank']}" if job["ranks"] > 1 else ""

    def progress(stage: str, done: int, total: int) -> None:
        send("progress", stage=stage + of_rank, done=done, total=total)

    (_graphs if job["stage"] == "graphs" else _kernels)(job, target, send, progress)


def _recipe(job: dict[str, Json]) -> Any:
    """(the recipe with what was missed, the misses, why some of them have no point in it)."""
    from aot_cache.builder import missed_calls
    from aot_cache.errors import AotCacheError
    from aot_cache.misses.file import Miss
    from aot_cache.recipes import declare as recipes
    from aot_cache.recipes import dimensions
    from aot_cache.upstream.codec import triton_sources

    ranges = {name: dimensions.parse_dimension(text) for name, text in job["ranges"].items()}
    misses = [Miss(**miss) for miss in job["misses"]]
    try:
        loaded = recipes.load(job["recipe"])
    except AotCacheError as error:
        source = triton_sources.unreadable(error.__cause__)
        error = error if source is None else source
        if job["rank"]:  # the first rank's own is said without it: all have it, as far as anybody knows
            error = type(error)(f"{error.wanted}, as rank {job['rank']}", error.found, error.do)
        raise error from None
    _check_ranks(job, loaded)
    recipe, why = missed_calls.widen(loaded.narrowed(ranges), misses)
    return recipe.without([(case, point) for case, point, _ in job["refused"]]), misses, why


def _check_ranks(job: dict[str, Json], recipe: Any) -> None:
    """That the process is in a job of as many ranks as the recipe says: host code may have looked already."""
    from aot_cache.errors import DeclarationError

    if recipe.ranks in (1, job["ranks"]):
        return
    if not job["ranks_given"]:
        raise _OtherRanks(recipe.ranks)
    wanted = f"a job of {recipe.ranks} ranks, which is what recipe {recipe.name!r} is shared by"
    raise DeclarationError(wanted, f"--ranks {job['ranks']}", "leave --ranks away, or change what splits it (--tp)")


def _join(job: dict[str, Json]) -> None:
    """Be one rank of several, where they are told apart."""
    if job["ranks"] > 1:
        from aot_cache.upstream.virtual import torch_fake_group

        torch_fake_group.join(job["rank"], job["ranks"])


def _kernels(job: dict[str, Json], target: Any, send: Any, progress: Any) -> None:
    """Trace and compile Triton kernels: torch and Triton answer for the target, compiled functions run as Python."""
    from aot_cache.builder import virtual_gpu

    virtual_gpu.become(target)
    _join(job)

    from aot_cache.artifact.plan import Plan
    from aot_cache.artifact.plan_of_ranks import of_ranks
    from aot_cache.builder import fingerprint, kernels_trace
    from aot_cache.builder import kernels_compile as compiler
    from aot_cache.builder.missed_kernels import MissedKernels
    from aot_cache.store import Store
    from aot_cache.upstream.hooks import triton_launcher

    recipe, misses, compiled, refused = None, [], [], []
    unclear: dict[str, str] = {}
    if job["recipe"]:
        with virtual_gpu.tensors():  # models make some when they are imported
            recipe, misses, _ = _recipe(job)
        traced = kernels_trace.trace(recipe, target.id, progress, job["workers"])
        plan, compiled, refused, unclear = traced.plan, traced.compiled, traced.refused, traced.unclear
        if not refused:  # else the points are numbered otherwise
            Path(job["calls"]).write_text(json.dumps(traced.calls))
    else:
        plan = Plan.read(Path(job["plan"]))
    if job["also"]:
        plan = of_ranks([plan, *(Plan.read(Path(path)) for path in job["also"])])
    missed = MissedKernels(misses, plan)
    plan = missed.plan
    plan.write(Path(job["plan_out"]))
    inputs = fingerprint.inputs(kernels_trace.late_modules)
    spec = recipe.spec if recipe is not None else ""
    send("traced", spec=spec, units=len(plan.units), calling=compiled, refused=refused, inputs=inputs)
    if job["show_plan"]:
        return
    if job["rank"]:  # the first rank compiles for all, but for what only this one's host code makes
        plan = replace(plan, units=[unit for unit in plan.units if compiler.made_by_host_code(unit, plan)])
    pythons = [triton_launcher.this_python(), *map(triton_launcher.other_python, job["pythons"])]
    pythons = list({p.suffix: p for p in pythons}.values())
    with virtual_gpu.tensors():  # a plan's kernels are imported by their names only now
        outcome = compiler.compile_plan(
            plan,
            recipe,
            target,
            Store(job["store"]),
            line_info=job["line_info"],
            pythons=pythons,
            progress=progress,
            workers=job["workers"],
            unclear=unclear,
        )
    if misses and not job["rank"]:
        missed.settle(outcome, Store(job["store"]), target)
        plan.write(Path(job["plan_out"]))
    send(
        "compiled",
        missed_kernels=list(missed.uncovered.items()),
        keys=outcome.keys,
        memory_keys=outcome.memory_keys,
        compiled=outcome.compiled,
        native=outcome.native,
        failed=outcome.failed,
        toolchain=outcome.toolchain,
        inputs=fingerprint.inputs(kernels_trace.late_modules),
    )


def _graphs(job: dict[str, Json], target: Any, send: Any, progress: Any) -> None:
    """Trace and compile the graphs of compiled functions: Inductor compiles for the target."""
    from aot_cache.builder import virtual_gpu
    from aot_cache.upstream.virtual import inductor_target

    virtual_gpu.libraries(target)
    inductor_target.become(target)
    _join(job)

    from aot_cache.artifact.plan import FailedCase, Plan, each_once
    from aot_cache.builder import fingerprint, graphs, missed_calls, one_point
    from aot_cache.builder.recorded_calls import Recorded
    from aot_cache.recipes import declare as recipes
    from aot_cache.store import Store
    from aot_cache.upstream.virtual import torch_fake

    device = "cpu" if target.backend == "cpu" else "cuda"
    recipes.set_device(device)
    with torch_fake.importing(device):
        recipe, misses, why = _recipe(job)
    failed_before = [FailedCase(**failed) for failed in job["failed_cases"]]
    gone = {failed.case for failed in failed_before}
    names = [case.name for case in recipe.cases if case.name not in gone]
    plan = Plan.read(Path(job["plan_out"])) if Path(job["plan_out"]).exists() else graphs.empty_plan(recipe, target.id)
    calls = Path(job["calls"])
    known = Recorded(json.loads(calls.read_text()) if calls.exists() else {})
    asked = [name for name in names if job["cases"] is None or name in job["cases"]]
    runs = graphs.Runs(recipe, target, asked, known)
    runs.survey(progress)
    failed_cases = _failed_cases(runs, names, failed_before)
    if runs.refused:
        visited = recipe.without([(case, point) for case, point, _ in runs.refused])
        plan.cases = graphs.empty_plan(visited, target.id).cases
    plan.calls = runs.calls()
    plan.note_sets(one_point.sets)
    plan.failed = each_once([*plan.failed, *failed_cases])
    plan.write(Path(job["plan_out"]))
    inputs = fingerprint.inputs(runs.late_modules)
    send("surveyed", spec=recipe.spec, inputs=inputs, failed_cases=[asdict(failed) for failed in failed_cases])
    if job["show_plan"]:
        return
    made = runs.compile_all(Store(job["store"]), inputs, progress, job["workers"])
    failed_cases = _failed_cases(runs, names, failed_before)
    failed = {failure["unit"]: failure["error"] for failure in made.failed}
    texts = {one.case: one.text for one in failed_cases}
    lost = [(case, miss.facts["points"][case]) for miss in misses for case in miss.facts.get("points", {})]
    refused = [*job["refused"], *runs.refused, *((case, at, texts[case]) for case, at in lost if case in texts)]
    send(
        "graphs",
        graphs=made.graphs,
        graph_failed=made.failed,
        graphs_compiled=made.compiled,
        graph_key=made.key,
        failed_cases=[asdict(failed) for failed in failed_cases],
        missed_calls=list(missed_calls.uncovered(misses, runs.kinds.values(), plan, failed, why, refused).items()),
    )


def _failed_cases(runs: Any, names: list[str], before: list[Any]) -> list[Any]:
    """The cases that cannot be run, with those that were known `before`.

    Raises:
        AotCacheError: there is no other case.
    """
    from aot_cache.artifact.plan import each_once
    from aot_cache.builder import one_point

    broken = [one for _, one in sorted(runs.broken.items())]
    gone = {one.failed.case for one in broken}
    if gone >= set(names):
        earlier = [one_point.known(failed) for failed in before]
        raise one_point.all_of([*broken, *earlier])
    return each_once([*before, *(one.failed for one in broken)])


if __name__ == "__main__":
    sys.exit(main())
