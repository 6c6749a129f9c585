"""Runs the worker processes of one build, and merges their results."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, TypeVar

from aot_cache.artifact.manifest import Graph, NativeModule
from aot_cache.artifact.plan import FailedCase, Failure, Plan, each_once
from aot_cache.builder import fingerprint, fork_map, graphs_per_rank
from aot_cache.builder.fingerprint import NO_INPUTS, Inputs
from aot_cache.builder.messages import (
    Answer,
    Compiled,
    GraphsMade,
    ImportedCompiler,
    Job,
    OtherRanks,
    Refused,
    Surveyed,
    Traced,
    TracedGraph,
    answer_of,
)
from aot_cache.builder.worker_pool import Progress, Worker, WorkerPool
from aot_cache.errors import DeclarationError
from aot_cache.files import scratch
from aot_cache.misses.file import Misses
from aot_cache.store import JsonObject

if TYPE_CHECKING:
    from aot_cache.builder.pipeline import Request

T = TypeVar("T")
_MOST_AT_ONCE, _CORES_OF_A_WORKER = 4, 4


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """The merged results of a build's workers. Compiled bytes are in the store.

    Args:
        plan: the plan, without what only failed cases reach.
        spec: text that loads the recipe; empty for a plan file.
        inputs: the packages and files that the workers have imported.
        keys, memory_keys: of the plan's units, in their order; empty if no kernels were compiled.
        failed: what could not be compiled.
        toolchain: see `messages.Compiled`; empty if there are no kernels.
        graph_key: see `messages.GraphsMade`; empty if there are no graphs.
        compiled: number of units and call signatures that were compiled now.
        per_rank: function whose graphs are built for each rank → why.
        missed: number of each miss that was handled → why it will miss again; empty if it will not.
        neighbours: see `messages.Compiled`.
        warnings: what the workers have warned of.
    """

    plan: Plan
    spec: str = ""
    inputs: Inputs = NO_INPUTS
    keys: Sequence[str] = ()
    memory_keys: Sequence[str | None] = ()
    failed: Sequence[Failure] = ()
    native: Sequence[NativeModule] = ()
    toolchain: JsonObject = field(default_factory=dict)
    graphs: Sequence[Graph] = ()
    graph_key: JsonObject = field(default_factory=dict)
    compiled: int = 0
    per_rank: Mapping[str, str] = field(default_factory=dict)
    missed: Mapping[int, str] = field(default_factory=dict)
    neighbours: int = 0
    warnings: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class _Kernels:
    """The answers of one kernel worker; `compiled` is None if only the plan was requested."""

    traced: Traced
    compiled: Compiled | None
    plan: str

    @property
    def inputs(self) -> Inputs:
        return fingerprint.together([self.traced.inputs, *([self.compiled.inputs] if self.compiled else [])])


@dataclass(frozen=True, kw_only=True)
class _Graphs:
    """The merged answers of the graph workers of all ranks."""

    surveyed: Surveyed
    inputs: Inputs
    failed_cases: Sequence[FailedCase]
    graphs: Sequence[Graph] = ()
    failed: Sequence[Failure] = ()
    compiled: int = 0
    key: JsonObject = field(default_factory=dict)
    per_rank: Mapping[str, str] = field(default_factory=dict)
    missed: Mapping[int, str] = field(default_factory=dict)


def run(request: Request, folder: Path, misses: Misses, progress: Progress, show_plan: bool = False) -> BuildResult:
    """Trace and compile: kernels in one process, compiled graphs, if there are any, in another.

    Libraries and recipes may read the world size at import, but only a worker can read the recipe's own. If that is another one,
    the workers are started again as ranks of such a job.

    Raises:
        AotCacheError: a worker raised it.
        TargetError: a worker died.
    """
    try:
        with WorkerPool(progress) as pool:
            return _Build(request, folder, misses, pool, show_plan).run()
    except OtherRanks as found:
        ranks = found.ranks
    with WorkerPool(progress) as pool:
        return _Build(replace(request, ranks=ranks), folder, misses, pool, show_plan).run()


class _Build:
    """`run` for the request's world size."""

    def __init__(self, request: Request, folder: Path, misses: Misses, pool: WorkerPool, show_plan: bool) -> None:
        # A plan without kernels has nothing to compile: an engine's compile cache goes into the bundle as it is.
        plans = [path for path in request.plans if Plan.read_kernels(path).units]
        if plans and request.target.backend == "cpu":
            raise DeclarationError("a GPU target for a plan", "cpu", "name a GPU with --target")
        if not plans and request.model is None:
            raise DeclarationError("a plan with kernels", "none in it", "name a recipe with --model, too")
        self._request, self._pool = request, pool
        self._environment = _environment(request, folder)
        self._job = Job(
            stage="kernels",
            target=request.target,
            recipe=request.model,
            plans=list(map(str, plans)),
            plan_out=str(folder / "plan.json"),
            calls=str(folder / "calls.json"),
            ranges=dict(request.ranges),
            store=str(request.store.absolute()),
            remote_store=request.remote_store,
            line_info=request.line_info,
            pythons=list(request.pythons),
            workers=request.workers,
            show_plan=show_plan,
            misses=misses.found,
            neighbours=request.neighbours,
            ranks=request.ranks or 1,
            ranks_given=request.ranks is not None,
        )
        # A recipe is traced as every rank: a third rank may differ even if two do the same.
        self._ranks = [0] if request.model is None else list(range(self._job.ranks))

    def run(self) -> BuildResult:
        kernels: dict[int, _Kernels] = {}
        if self._request.target.backend == "cpu":
            graphs: _Graphs | None = self._graphs(None, {})  # without a kernel trace, which cases call is not known
        else:
            kernels = self._other_ranks()
            graphs = self._first_rank(kernels)
        plan = Plan.read(Path(self._job.plan_out))
        if self._request.model is not None:  # a plan file has its own world size
            plan = replace(plan, ranks=self._job.ranks)
        result = replace(_result(plan, kernels, graphs), warnings=[*self._pool.warnings])
        return _without_failed(result, graphs.failed_cases if graphs is not None else ())

    # --- kernels ------------------------------------------------------------------------------------------------------

    def _other_ranks(self) -> dict[int, _Kernels]:
        """Trace kernels as each rank but the first, and compile kernels that only its own host code makes.

        All ranks are run, because one rank's launches do not tell what another one launches.
        """

        def run(rank: int) -> _Kernels:
            job = self._of_rank(self._job, rank)
            with scratch.folder() as folder:
                return _kernels(self._pool.run(job, self._as_rank(rank, folder)), job)

        others = self._ranks[1:]
        return dict(zip(others, self._some_at_once(run, others)))

    def _first_rank(self, kernels: dict[int, _Kernels]) -> _Graphs | None:
        """Trace and compile kernels as the first rank, including those that other ranks launch. Start graphs as soon as the cases
        that need them are known. Adds the first rank's answers to `kernels`."""
        job = replace(self._job, also=[one.plan for one in kernels.values()])
        calling = {case for one in kernels.values() for case in one.traced.calling}
        refused = {rank: one.traced.refused for rank, one in kernels.items()}
        early: list[Future[_Graphs]] = []
        prepared: Worker | None = None

        def answered(answer: Answer) -> None:
            nonlocal prepared
            if isinstance(answer, ImportedCompiler):
                prepared = self._prepared()
            if isinstance(answer, Traced):
                calling.update(answer.calling)
                refused[0] = answer.refused
                if prepared is not None and not calling:
                    self._pool.dismiss(prepared)
                # Graphs need only the trace, not the compiled kernels; but with misses, the plan is changed after compiling.
                if calling and not job.show_plan and not job.misses:
                    early.append(self._pool.submit(lambda: self._graphs(sorted(calling), refused, prepared)))

        kernels[0] = _kernels(self._pool.run(job, self._as_rank(0), answered), job)
        if early:
            return early[0].result()
        return self._graphs(sorted(calling), refused, prepared) if calling else None

    def _prepared(self) -> Worker | None:
        """A worker for graphs, which imports torch's compiler and the recipe while kernels are traced: each takes one core.
        Whether there are graphs is known only when the kernels are traced."""
        job = self._job
        if job.recipe is None or (job.workers or fork_map.cores()) < 2:
            return None
        return self._pool.prepare(replace(job, stage="graphs"), self._as_rank(0))

    # --- graphs -------------------------------------------------------------------------------------------------------

    def _graphs(
        self,
        calling: Sequence[str] | None,
        refused: Mapping[int, Sequence[Refused]],
        prepared: Worker | None = None,
    ) -> _Graphs:
        """Trace and compile graphs as all ranks; if the plan is only shown, as the first rank.

        Args:
            calling: cases that call compiled functions; None if not known.
            refused: rank → the missed points at which its host code could not run.
            prepared: the first rank's worker, if it was started before.
        """
        job = replace(self._job, stage="graphs", cases=calling)

        def run(rank: int, broken: Sequence[FailedCase]) -> list[Answer]:
            own = replace(self._of_rank(job, rank), failed_cases=broken, refused=refused.get(rank, ()))
            # Cache folders of its own: upstream would use what another rank left there, which may differ.
            with scratch.folder() as folder:
                environment = self._as_rank(rank, folder if rank else None)
                return self._pool.run(own, environment, prepared=None if rank else prepared)

        first = run(0, job.failed_cases)
        broken = _failed_cases([first])
        others = [] if job.show_plan else self._ranks[1:]
        return _of_all_ranks([first, *self._some_at_once(lambda rank: run(rank, broken), others)])

    # --- ranks --------------------------------------------------------------------------------------------------------

    def _of_rank(self, job: Job, rank: int) -> Job:
        """The job for one rank, with output files of its own."""
        if rank == 0:
            return job
        return replace(job, rank=rank, plan_out=f"{job.plan_out}.{rank}", calls=f"{job.calls}.{rank}")

    def _as_rank(self, rank: int, folder: Path | None = None) -> dict[str, str]:
        """The worker's environment, with the variables that a launcher sets for each rank, and upstream's caches in `folder`."""
        own = {**self._environment, **(_folders(folder) if folder is not None else {})}
        size = self._job.ranks
        if size == 1:
            return own
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        return {**own, **{name: str(value) for name, value in names.items()}}

    def _some_at_once(self, run: Callable[[int], T], ranks: Sequence[int]) -> list[T]:
        """The result of `run` for each rank. At most `_MOST_AT_ONCE` run at a time, fewer on few cores."""
        gate = BoundedSemaphore(max(1, min(_MOST_AT_ONCE, (os.cpu_count() or 1) // _CORES_OF_A_WORKER)))

        def one(rank: int) -> T:
            with gate:
                return run(rank)

        return [made.result() for made in [self._pool.submit(partial(one, rank)) for rank in ranks]]


# --- merging ----------------------------------------------------------------------------------------------------------


def _kernels(answers: Sequence[Answer], job: Job) -> _Kernels:
    traced = answer_of(Traced, answers)
    assert traced is not None
    return _Kernels(traced=traced, compiled=answer_of(Compiled, answers), plan=job.plan_out)


def _failed_cases(ranks: Sequence[Sequence[Answer]]) -> list[FailedCase]:
    """The cases that some rank could not run. `GraphsMade` comes after `Surveyed` and may list more of them."""
    last = [answer_of(GraphsMade, answers) or answer_of(Surveyed, answers) for answers in ranks]
    return each_once(failed for answer in last if answer is not None for failed in answer.failed_cases)


def _of_all_ranks(ranks: Sequence[Sequence[Answer]]) -> _Graphs:
    """Merge the answers of the workers of all ranks, in rank order."""
    surveyed = [one for answers in ranks for one in [answer_of(Surveyed, answers)] if one is not None]
    made = [one for answers in ranks for one in [answer_of(GraphsMade, answers)] if one is not None]
    broken = _failed_cases(ranks)
    inputs = fingerprint.together(one.inputs for one in surveyed)
    if not made:
        return _Graphs(surveyed=surveyed[0], inputs=inputs, failed_cases=broken)
    traced = [_of_others(one.graphs, broken) for one in made]
    why = graphs_per_rank.differing(traced)
    return _Graphs(
        surveyed=surveyed[0],
        inputs=inputs,
        failed_cases=broken,
        graphs=graphs_per_rank.combined(traced, why),
        failed=list({failure.unit: failure for one in made for failure in one.failed}.values()),
        compiled=sum(one.compiled for one in made),
        key=made[0].key,
        per_rank=why,
        missed=made[0].missed_calls,
    )


def _of_others(graphs: Sequence[TracedGraph], failed: Sequence[FailedCase]) -> list[TracedGraph]:
    """The graphs without the failed cases; a graph that only those reach is left out."""
    gone = {one.case for one in failed}
    kept = [replace(g, reached={case: at for case, at in g.reached.items() if case not in gone}) for g in graphs]
    return [after for before, after in zip(graphs, kept) if after.reached or not before.reached]


def _result(plan: Plan, kernels: Mapping[int, _Kernels], graphs: _Graphs | None) -> BuildResult:
    first = kernels.get(0)
    compiled = {rank: one.compiled for rank, one in kernels.items() if one.compiled is not None}
    result = BuildResult(plan=plan, inputs=fingerprint.together(one.inputs for one in kernels.values()))
    if first is not None:
        result = replace(result, spec=first.traced.spec)
    if first is not None and first.compiled is not None:
        removed = set(first.compiled.removed)
        result = replace(
            result,
            plan=replace(plan, units=[unit for unit in plan.units if unit.id not in removed]),
            neighbours=first.compiled.neighbours,
            keys=first.compiled.keys,
            memory_keys=first.compiled.memory_keys,
            failed=_failed_units(compiled),
            native=first.compiled.native,
            toolchain=first.compiled.toolchain,
            compiled=sum(one.compiled for one in compiled.values()),
            missed=first.compiled.missed_kernels,
        )
    if graphs is not None:
        result = replace(
            result,
            spec=graphs.surveyed.spec,
            inputs=fingerprint.together([result.inputs, graphs.inputs]),
            failed=[*result.failed, *graphs.failed],
            graphs=graphs.graphs,
            graph_key=graphs.key,
            compiled=result.compiled + graphs.compiled,
            per_rank=graphs.per_rank,
            missed={**result.missed, **graphs.missed},
        )
    return result


def _failed_units(ranks: Mapping[int, Compiled]) -> list[Failure]:
    """The units that could not be compiled. The error of the rank that makes a kernel is preferred to the first rank's."""
    failed = {failure.unit: failure for failure in ranks[0].failed}
    for rank, compiled in ranks.items():
        if rank:
            own = [replace(failure, error=f"as rank {rank}: {failure.error}") for failure in compiled.failed]
            failed.update({failure.unit: failure for failure in own})
    return list(failed.values())


def _without_failed(result: BuildResult, failed_cases: Sequence[FailedCase]) -> BuildResult:
    """The result without what only failed cases reach.

    Raises:
        DeclarationError: all cases failed.
    """
    plan = result.plan
    order = [case.name for case in plan.cases]
    failed = sorted(each_once([*plan.failed, *failed_cases]), key=lambda one: order.index(one.case))
    gone = {one.case for one in failed}
    if plan.cases and gone >= set(order):
        found = "; ".join(f"{one.name} {one.text}" for one in failed)
        raise DeclarationError(f"no case of {plan.recipe} can run: {found}")
    kept, stay = replace(plan, failed=failed).without(gone)
    left_out = _ids(plan) - _ids(kept)
    return replace(
        result,
        plan=kept,
        keys=[result.keys[number] for number in stay] if result.keys else [],
        memory_keys=[result.memory_keys[number] for number in stay] if result.memory_keys else [],
        failed=[failure for failure in result.failed if failure.unit not in left_out],
    )


def _ids(plan: Plan) -> set[str]:
    return {unit.id for unit in plan.units} | {call.id for call in plan.calls}


def _environment(request: Request, folder: Path) -> dict[str, str]:
    """The worker's environment. Nothing that depends on this machine or on the time may change the compiled bytes."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE")}
    environment.update(
        CUDA_VISIBLE_DEVICES="",
        HIP_VISIBLE_DEVICES="",
        PYTHONHASHSEED="0",
        **_folders(folder),
        TRITON_STORE_BINARY_ONLY="1",
        TRITON_DISABLE_LINE_INFO="0" if request.line_info else "1",
    )
    here = os.getcwd()
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (here, environment.get("PYTHONPATH", "")) if p)
    return environment


def _folders(folder: Path) -> dict[str, str]:
    """Variables for the folders of upstream's caches."""
    return {"TRITON_CACHE_DIR": str(folder / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")}
