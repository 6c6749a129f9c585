"""The worker processes of one build: started, talked to, and their answers put together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, replace
from functools import partial, reduce
from pathlib import Path
from threading import BoundedSemaphore
from typing import TYPE_CHECKING, Any

from aot_cache.artifact.plan import FailedCase, Plan, each_once
from aot_cache.artifact.target import Target
from aot_cache.builder import fingerprint, graphs_per_rank
from aot_cache.builder.worker_pool import Crew, OtherRanks, Progress, beside
from aot_cache.errors import DeclarationError
from aot_cache.misses.file import Misses

if TYPE_CHECKING:
    from aot_cache.builder.pipeline import Request

Json = Any
_MOST_AT_ONCE, _CORES_OF_A_WORKER = 4, 4


def run(
    request: Request, scratch: Path, misses: Misses, progress: Progress, show_plan: bool = False
) -> tuple[dict[str, Json], Plan]:
    """(what the workers answered, the plan): kernels in one process, compiled graphs, if there are any, in another.

    Libraries decide at import what they are in, and so may a recipe: where it is for several ranks, which only a worker can
    read, the workers are started anew as ranks of such a job.

    Raises:
        AotCacheError: what a worker raised.
        TargetError: a worker died.
    """
    try:
        with Crew(progress) as crew:
            return _run(request, scratch, misses, crew, show_plan)
    except OtherRanks as found:
        ranks = found.ranks
    with Crew(progress) as crew:
        return _run(replace(request, ranks=ranks), scratch, misses, crew, show_plan)


def _run(request: Request, scratch: Path, misses: Misses, crew: Crew, show_plan: bool) -> tuple[dict[str, Json], Plan]:
    """`run` in a job of the request's ranks."""
    plan_out, ranks = scratch / "plan.json", request.ranks or 1
    job: dict[str, Json] = {
        "target": request.target.properties(),
        "recipe": request.model if request.plan is None else None,
        "plan": str(request.plan) if request.plan is not None else None,
        "plan_out": str(plan_out),
        "calls": str(scratch / "calls.json"),
        "ranges": dict(request.ranges),
        "store": str(request.store.absolute()),
        "line_info": request.line_info,
        "pythons": list(request.pythons),
        "workers": request.workers,
        "show_plan": show_plan,
        "misses": [asdict(miss) for miss in misses.found],
        "refused": [],
        "failed_cases": [],
        "ranks": ranks,
        "ranks_given": request.ranks is not None,
        "rank": 0,
        "also": [],
    }
    if request.plan is not None:
        _kernels_only(request.plan, request.target)
    environment = _environment(request, scratch)
    told = _told_apart(request, ranks)
    cpu = request.target.backend == "cpu"
    answer: dict[str, Json] = {"inputs": {}}
    refused: dict[int, Json] = {}

    def graphs(calling: Json) -> dict[str, Json]:
        own = {**job, "stage": "graphs", "cases": calling}
        last, ranks = ("surveyed", told[:1]) if show_plan else ("graphs", told)
        return _graphs_of_ranks(own, ranks, refused, environment, last, crew)

    if cpu:
        answer |= graphs(None)  # nobody has looked yet
    else:
        others = _other_ranks(job, told, environment, crew)
        calling = {case for one in others.values() for case in one["calling"]}
        job["also"] = [one["plan"] for one in others.values()]
        early: list[Future[dict[str, Json]]] = []

        def traced() -> None:
            calling.update(answer["calling"])
            refused.update({rank: one["refused"] for rank, one in {0: answer, **others}.items()})
            # Graphs need what is traced, not what is compiled of it; only misses are settled in the plan afterwards.
            if calling and not show_plan and not job["misses"]:
                early.append(beside(lambda: graphs(sorted(calling))))

        last = "traced" if show_plan else "compiled"
        crew.listen({**job, "stage": "kernels"}, _as_rank(environment, 0, ranks), last, answer, {"traced": traced})
        _add_ranks(answer, others)
        if calling:
            made = early[0].result() if early else graphs(sorted(calling))
            answer |= {**made, "inputs": fingerprint.both(answer["inputs"], made["inputs"])}
    plan = Plan.read(plan_out)
    if request.plan is None:  # a plan that was given says so itself
        plan.ranks = ranks
    return answer, _without_failed(plan, answer)


def _without_failed(plan: Plan, answer: dict[str, Json]) -> Plan:
    """The plan, and the answer to it, without what only cases reach that some worker could not run.

    Raises:
        DeclarationError: there is no other case.
    """
    plan.failed = each_once([*plan.failed, *(FailedCase(**failed) for failed in answer.get("failed_cases", []))])
    order = [case.name for case in plan.cases]
    plan.failed.sort(key=lambda failed: order.index(failed.case))
    gone = {failed.case for failed in plan.failed}
    if plan.cases and gone >= set(order):
        found = "; ".join(f"{failed.name} {failed.text}" for failed in plan.failed)
        raise DeclarationError(f"a case of {plan.recipe} to run", found)
    whole, (plan, stay) = plan, plan.without(gone)
    for name in ("keys", "memory_keys"):
        if name in answer:
            answer[name] = [answer[name][number] for number in stay]
    left_out = _ids(whole) - _ids(plan)
    for name in ("failed", "graph_failed"):
        if name in answer:
            answer[name] = [failure for failure in answer[name] if failure["unit"] not in left_out]
    return plan


def _ids(plan: Plan) -> set[str]:
    return {unit.id for unit in plan.units} | {call.id for call in plan.calls}


def _other_ranks(
    job: Mapping[str, Json], told: list[int], environment: Mapping[str, str], crew: Crew
) -> dict[int, dict[str, Json]]:
    """Trace kernels as each rank but the first, and compile what only its own host code makes; what each worker answered.

    All of them are run: nothing that one rank does says what another will do. Each answer names the rank's `plan`.
    """

    def run(rank: int) -> dict[str, Json]:
        files = {name: f"{job[name]}.{rank}" for name in ("plan_out", "calls")}
        answer: dict[str, Json] = {"inputs": {}, "plan": files["plan_out"]}
        with tempfile.TemporaryDirectory(prefix="aot-cache-") as folder:
            own = {**_as_rank(environment, rank, job["ranks"]), **_folders(Path(folder))}
            last = "traced" if job["show_plan"] else "compiled"
            crew.listen({**job, **files, "stage": "kernels", "rank": rank}, own, last, answer)
        return answer

    return dict(zip(told[1:], _some_at_once(run, told[1:])))


def _some_at_once(run: Callable[[int], dict[str, Json]], ranks: Sequence[int]) -> list[dict[str, Json]]:
    """What `run` returns for each rank; as many run beside each other as there are cores for."""
    gate = BoundedSemaphore(max(1, min(_MOST_AT_ONCE, (os.cpu_count() or 1) // _CORES_OF_A_WORKER)))

    def one(rank: int) -> dict[str, Json]:
        with gate:
            return run(rank)

    return [made.result() for made in [beside(partial(one, rank)) for rank in ranks]]


def _add_ranks(answer: dict[str, Json], others: Mapping[int, Mapping[str, Json]]) -> None:
    """What the workers of other ranks had to compile, and what they read, with the first one's answer."""
    failed = {failure["unit"]: failure for failure in answer.get("failed", [])}
    for rank, other in others.items():
        answer["inputs"] = fingerprint.both(answer["inputs"], other["inputs"])
        answer["compiled"] = answer.get("compiled", 0) + other.get("compiled", 0)
        for failure in other.get("failed", []):  # the rank that makes a kernel knows better why than one that does not
            failed[failure["unit"]] = {**failure, "error": f"as rank {rank}: {failure['error']}"}
    if "failed" in answer:
        answer["failed"] = list(failed.values())


def _told_apart(request: Request, ranks: int) -> list[int]:
    """The ranks that the recipe is traced as: all. What two of them do alike says nothing of a third."""
    return [0] if request.plan is not None else list(range(ranks))


def _graphs_of_ranks(
    job: Mapping[str, Json],
    told: list[int],
    refused: Mapping[int, Json],
    environment: Mapping[str, str],
    last: str,
    crew: Crew,
) -> dict[str, Json]:
    """Trace and compile graphs as the ranks in `told`; and what the workers answered.

    Args:
        refused: rank → the missed points that its host code could not run at.
    """

    def run(rank: int, broken: list[Json]) -> dict[str, Json]:
        answer: dict[str, Json] = {"inputs": {}}
        files = {name: job[name] if rank == 0 else f"{job[name]}.{rank}" for name in ("plan_out", "calls")}
        own = {**job, "rank": rank, **files, "failed_cases": broken, "refused": refused.get(rank, [])}
        # Folders of its own: what another rank has left in them would be taken, and is not the same.
        with tempfile.TemporaryDirectory(prefix="aot-cache-") as folder:
            folders = {} if rank == 0 else _folders(Path(folder))
            crew.listen(own, {**_as_rank(environment, rank, job["ranks"]), **folders}, last, answer)
        return answer

    first = run(0, job["failed_cases"])
    answers = [first, *_some_at_once(lambda rank: run(rank, list(first.get("failed_cases", ()))), told[1:])]
    broken = [asdict(one) for one in each_once(FailedCase(**f) for one in answers for f in one.get("failed_cases", []))]
    made = [_of_others(one.get("graphs", []), broken) for one in answers]
    why = graphs_per_rank.differing(made)
    failed = {failure["unit"]: failure for one in answers for failure in one.get("graph_failed", [])}
    inputs = reduce(fingerprint.both, (one["inputs"] for one in answers))
    return first | {
        "inputs": inputs,
        "failed_cases": broken,
        "graphs": graphs_per_rank.combined(made, why),
        "graph_failed": list(failed.values()),
        "graphs_compiled": sum(one.get("graphs_compiled", 0) for one in answers),
        "per_rank": why,
    }


def _of_others(graphs: list[dict[str, Json]], failed: list[Json]) -> list[dict[str, Json]]:
    """Graphs that other cases than these reach, too."""
    gone = {one["case"] for one in failed}
    kept = [{**g, "reached": {case: at for case, at in g["reached"].items() if case not in gone}} for g in graphs]
    return [after for before, after in zip(graphs, kept) if after["reached"] or not before["reached"]]


def _as_rank(environment: Mapping[str, str], rank: int, size: int) -> dict[str, str]:
    """The variables that a launcher gives to each rank."""
    if size == 1:
        return dict(environment)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    return {**environment, **{name: str(value) for name, value in names.items()}}


def _kernels_only(path: Path, target: Target) -> None:
    """A plan file says which kernels to compile; graphs are traced from the recipe's own code.

    Raises:
        DeclarationError: the plan cannot be all that is built.
    """
    plan = Plan.read(path)
    if plan.calls:
        names = ", ".join(sorted({call.function for call in plan.calls})[:3])
        raise DeclarationError(
            "a plan of Triton kernels only",
            f"{path} also has {len(plan.calls)} kinds of calls of compiled functions ({names})",
            "build from the recipe with --model: graphs are traced from its code",
        )
    if target.backend == "cpu":
        raise DeclarationError("a target that Triton compiles for", "cpu", "name a GPU with --target")


def _environment(request: Request, scratch: Path) -> dict[str, str]:
    """The worker's environment: nothing of this machine or of this moment may reach the bytes."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE")}
    environment.update(
        CUDA_VISIBLE_DEVICES="",
        HIP_VISIBLE_DEVICES="",
        PYTHONHASHSEED="0",
        **_folders(scratch),
        TRITON_STORE_BINARY_ONLY="1",
        TRITON_DISABLE_LINE_INFO="0" if request.line_info else "1",
    )
    here = os.getcwd()
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (here, environment.get("PYTHONPATH", "")) if p)
    return environment


def _folders(scratch: Path) -> dict[str, str]:
    """Where upstream keeps what it compiles."""
    return {"TRITON_CACHE_DIR": str(scratch / "triton"), "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor")}
