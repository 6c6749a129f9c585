"""The process that becomes one target: `python -m aot_cache.builder.worker`, started by `worker_pool`.

Reads a job as JSON from stdin and writes events, one JSON object per line, to a copy of stdout. What libraries print goes to
stderr. Each target needs its own process, because libraries decide at import what they will launch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from aot_cache.builder import messages
from aot_cache.builder.messages import (
    Compiled,
    Event,
    GraphsMade,
    ImportedCompiler,
    Job,
    NeedsRanks,
    OtherRanks,
    Progressed,
    Raised,
    StartJob,
    Surveyed,
    Traced,
    Warned,
)
from aot_cache.errors import AotCacheError
from aot_cache.store import Store

if TYPE_CHECKING:
    from aot_cache.artifact.plan import FailedCase
    from aot_cache.builder.graphs import GraphBuilder
    from aot_cache.recipes.declare import Recipe

Send = Callable[[Event], None]
Progress = Callable[[str, int, int], None]


def main() -> int:
    job = messages.read_job(sys.stdin.readline())
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(event: Event) -> None:
        events.write(messages.written(event))

    of_rank = f", rank {job.rank}" if job.ranks > 1 else ""

    def progress(stage: str, done: int, total: int) -> None:
        send(Progressed(stage=stage + of_rank, done=done, total=total))

    try:
        if isinstance(job, StartJob):
            from aot_cache.builder import engine_worker

            send(engine_worker.started(job, progress))
        else:
            # The parent, which is inside as well, may be killed a moment before this process is.
            with contextlib.nullcontext() if job.show_plan else Store(job.store).in_use():
                (_graphs if job.stage == "graphs" else _kernels)(job, send, progress)
    except OtherRanks as other:
        send(NeedsRanks(ranks=other.ranks))
    except AotCacheError as error:
        send(Raised(type=type(error).__name__, **error.parts()))
        return 1
    except Exception as error:
        traceback.print_exc()
        what = f"the build worker failed: {type(error).__name__}: {error}"
        send(Raised(type="AotCacheError", expected=what, found="", hint=""))
        return 1
    return 0


def _recipe(job: Job) -> tuple[Recipe, dict[int, str]]:
    """(the recipe with the missed points, the reasons why some misses have no point in it)."""
    from aot_cache.builder import missed_calls
    from aot_cache.recipes import declare as recipes
    from aot_cache.recipes import dimensions
    from aot_cache.upstream.codec import triton_sources

    ranges = {name: dimensions.parse_dimension(text) for name, text in job.ranges.items()}
    assert job.recipe is not None
    try:
        loaded = recipes.load(job.recipe)
    except AotCacheError as error:
        source = triton_sources.unreadable(error.__cause__)
        error = error if source is None else source
        if job.rank:  # an error of the first rank is assumed to occur on all ranks, and does not name one
            error = error.within(f"as rank {job.rank}")
        raise error from None
    _check_ranks(job, loaded)
    recipe, why = missed_calls.widen(loaded.narrowed(ranges), job.misses)
    return recipe.without([(refused.case, refused.point) for refused in job.refused]), why


def _check_ranks(job: Job, recipe: Recipe) -> None:
    """Check that the process was started with the recipe's world size: host code may have read it during import."""
    from aot_cache.errors import DeclarationError

    if recipe.ranks in (1, job.ranks):
        return
    if not job.ranks_given:
        raise OtherRanks(recipe.ranks)
    expected = f"a world size of {recipe.ranks} for recipe {recipe.name!r}"
    raise DeclarationError(expected, f"--ranks {job.ranks}", "omit --ranks, or change what splits it (--tp)")


def _join(job: Job) -> None:
    """Join the fake process group if the job has several ranks."""
    if job.ranks > 1:
        from aot_cache.upstream.virtual import torch_fake_group

        torch_fake_group.join(job.rank, job.ranks)


def _kernels(job: Job, send: Send, progress: Progress) -> None:
    """Trace and compile Triton kernels. torch and Triton report the target as their device; compiled functions run as Python."""
    from aot_cache.builder import virtual_gpu

    virtual_gpu.become(job.target)
    _join(job)

    from aot_cache.artifact.plan import Plan, extended, joined
    from aot_cache.artifact.plan_of_ranks import of_ranks
    from aot_cache.builder import fingerprint, kernels_compile, kernels_trace
    from aot_cache.builder.missed_kernels import MissedKernels
    from aot_cache.builder.recorded_calls import written
    from aot_cache.remote.shared_store import open_store
    from aot_cache.upstream import after_import
    from aot_cache.upstream.hooks import triton_launcher

    recipe, traced = None, None
    files = [Plan.read(Path(path)) for path in job.plans] if not job.rank else []  # the first rank compiles for all
    if job.recipe is not None:
        cancel = after_import.when_dynamo_comes(lambda: send(ImportedCompiler()))
        with virtual_gpu.tensors():  # models may make tensors when they are imported
            recipe, _ = _recipe(job)
        cancel()
        traced = kernels_trace.trace(recipe, job.target.id, progress, job.workers)
        plan = traced.plan
        if not traced.refused:  # if some are refused, the graph worker numbers the points differently
            Path(job.calls).write_text(written(traced.calls))
        if job.also:
            plan = of_ranks([plan, *(Plan.read(Path(path)) for path in job.also)])
        if files:
            plan = extended(plan, [replace(file, target=plan.target) for file in files])
    else:
        plan = joined(files)
    missed = MissedKernels(job.misses, plan)
    if job.neighbours and not job.rank:
        recorded = [unit.id for file in files if file.origin != "traced" for unit in file.units]
        with virtual_gpu.tensors():  # the kernels of a plan file are imported here
            missed.add_neighbours(recorded, kernels_compile.integer_classes)
    plan = missed.plan
    plan.write(Path(job.plan_out))
    send(
        Traced(
            spec=recipe.spec if recipe is not None else "",
            units=len(plan.units),
            calling=traced.compiled if traced is not None else [],
            refused=traced.refused if traced is not None else [],
            inputs=fingerprint.inputs(kernels_trace.late_modules),
        )
    )
    if job.show_plan:
        return
    if job.rank:  # the first rank compiles for all, except kernels that only this rank's host code makes
        plan = replace(plan, units=[unit for unit in plan.units if kernels_compile.made_by_host_code(unit, plan)])
    pythons = [triton_launcher.this_python(), *map(triton_launcher.other_python, job.pythons)]
    pythons = list({p.suffix: p for p in pythons}.values())
    store = open_store(job.store, job.remote_store)
    with virtual_gpu.tensors():
        outcome = kernels_compile.compile_plan(
            plan,
            recipe,
            job.target,
            store,
            line_info=job.line_info,
            pythons=pythons,
            progress=progress,
            workers=job.workers,
            unclear=traced.unclear if traced is not None else {},
        )
    removed: list[str] = []
    if (job.misses or missed.neighbours) and not job.rank:
        removed = missed.settle(outcome, store, job.target)
    if job.misses and not job.rank:  # without misses, the process that traces graphs may write it now
        missed.plan.write(Path(job.plan_out))
    _warn(store, send)
    send(
        Compiled(
            keys=outcome.keys,
            memory_keys=outcome.memory_keys,
            compiled=outcome.compiled,
            native=outcome.native,
            failed=outcome.failed,
            toolchain=outcome.toolchain,
            missed_kernels=missed.uncovered,
            neighbours=len(missed.neighbours),
            removed=removed,
            inputs=fingerprint.inputs(kernels_trace.late_modules),
        )
    )


def _graphs(job: Job, send: Send, progress: Progress) -> None:
    """Trace and compile the graphs of compiled functions. Inductor compiles for the target."""
    from aot_cache.builder import virtual_gpu
    from aot_cache.upstream.virtual import inductor_target

    virtual_gpu.libraries(job.target)
    inductor_target.become(job.target)
    _join(job)

    from aot_cache.artifact.plan import Plan, each_once
    from aot_cache.builder import fingerprint, graphs, missed_calls, one_point
    from aot_cache.builder.messages import Refused
    from aot_cache.builder.recorded_calls import RecordedCalls
    from aot_cache.recipes import declare as recipes
    from aot_cache.remote.shared_store import open_store
    from aot_cache.upstream.virtual import torch_fake

    device = "cpu" if job.target.backend == "cpu" else "cuda"
    recipes.set_device(device)
    with torch_fake.importing(device):
        recipe, why = _recipe(job)
    if job.waits:
        line = sys.stdin.readline()
        if not line:  # no case calls a compiled function
            return
        rest = messages.read_job(line)
        assert isinstance(rest, Job)
        recipe, job = recipe.without([(refused.case, refused.point) for refused in rest.refused]), rest
    gone = {failed.case for failed in job.failed_cases}
    names = [case.name for case in recipe.cases if case.name not in gone]
    path = Path(job.plan_out)
    plan = Plan.read(path) if path.exists() else graphs.empty_plan(recipe, job.target.id)
    asked = [name for name in names if job.cases is None or name in job.cases]
    runs = graphs.GraphBuilder(recipe, job.target, asked, RecordedCalls.read(Path(job.calls)))
    runs.survey(progress)
    failed_cases = _failed_cases(runs, names, job.failed_cases)
    if runs.refused:
        visited = recipe.without([(refused.case, refused.point) for refused in runs.refused])
        plan = replace(plan, cases=graphs.empty_plan(visited, job.target.id).cases)
    plan = replace(plan, calls=runs.calls(), failed=each_once([*plan.failed, *failed_cases]))
    plan = plan.with_sets(one_point.sets)
    plan.write(path)
    inputs = fingerprint.inputs(runs.late_modules)
    send(Surveyed(spec=recipe.spec, inputs=inputs, failed_cases=failed_cases))
    if job.show_plan:
        return
    store = open_store(job.store, job.remote_store)
    made = runs.compile_all(store, inputs, progress, job.workers)
    _warn(store, send)
    failed_cases = _failed_cases(runs, names, job.failed_cases)
    failed = {failure.unit: failure.error for failure in made.failed}
    texts = {one.case: one.text for one in failed_cases}
    lost = [(case, miss.facts["points"][case]) for miss in job.misses for case in miss.facts.get("points", {})]
    unrun = [Refused(case=case, point=at, why=texts[case]) for case, at in lost if case in texts]
    refused = [*job.refused, *runs.refused, *unrun]
    send(
        GraphsMade(
            graphs=made.graphs,
            failed=made.failed,
            compiled=made.compiled,
            key=made.key,
            failed_cases=failed_cases,
            missed_calls=missed_calls.uncovered(job.misses, runs.signatures.values(), plan, failed, why, refused),
        )
    )


def _warn(store: Store, send: Send) -> None:
    if store.problem:
        send(Warned(text=store.problem))


def _failed_cases(runs: GraphBuilder, names: Sequence[str], before: Sequence[FailedCase]) -> list[FailedCase]:
    """The cases that cannot be run, including those from `before`.

    Raises:
        AotCacheError: no case is left.
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
