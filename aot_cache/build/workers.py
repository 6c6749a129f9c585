"""The worker processes of one build: started, talked to, and their answers put together."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aot_cache.build import by_rank, stamp
from aot_cache.build.crew import Crew, OtherRanks, Progress, beside
from aot_cache.errors import DeclarationError
from aot_cache.miss_file import Misses
from aot_cache.plan import FailedCase, Plan, each_once
from aot_cache.target import Target

if TYPE_CHECKING:
    from aot_cache.build.pipeline import Request

Json = Any


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

    def graphs(calling: Json) -> dict[str, Json]:
        own = {**job, "stage": "graphs", "cases": calling, "refused": answer.get("refused", [])}
        last, ranks = ("surveyed", told[:1]) if show_plan else ("graphs", told)
        return _graphs_of_ranks(own, ranks, environment, last, crew)

    if cpu:
        answer |= graphs(None)  # nobody has looked yet
    else:
        early: list[Future[dict[str, Json]]] = []

        def traced() -> None:
            # Graphs need what is traced, not what is compiled of it; only misses are settled in the plan afterwards.
            if answer["calling"] and not show_plan and not job["misses"]:
                early.append(beside(lambda: graphs(answer["calling"])))

        _kernels_of_ranks(job, told, environment, crew, answer, traced)
        if answer["calling"]:
            made = early[0].result() if early else graphs(answer["calling"])
            answer |= {**made, "inputs": stamp.both(answer["inputs"], made["inputs"])}
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


def _kernels_of_ranks(
    job: dict[str, Json],
    told: list[int],
    environment: Mapping[str, str],
    crew: Crew,
    answer: dict[str, Json],
    traced: Callable[[], None],
) -> None:
    """Trace kernels as each of the ranks, and compile them: what another rank launches besides is one plan with the first's."""
    for rank in told[1:]:
        files = {name: f"{job[name]}.{rank}" for name in ("plan_out", "calls")}
        also = {**job, **files, "stage": "kernels", "rank": rank, "show_plan": True}
        crew.listen(also, _as_rank(environment, rank, job["ranks"]), "traced", answer)
        job["also"].append(also["plan_out"])
    last = "traced" if job["show_plan"] else "compiled"
    crew.listen({**job, "stage": "kernels"}, _as_rank(environment, 0, job["ranks"]), last, answer, {"traced": traced})


def _told_apart(request: Request, ranks: int) -> list[int]:
    """The ranks that the recipe is traced as, to see whether a number of theirs is in what comes of it."""
    if request.plan is not None:
        return [0]
    return list(range(min(ranks, 2)))


def _graphs_of_ranks(
    job: Mapping[str, Json], told: list[int], environment: Mapping[str, str], last: str, crew: Crew
) -> dict[str, Json]:
    """Trace and compile graphs as the ranks in `told`, and, if they differ, as all others; and what the workers answered."""
    answer: dict[str, Json] = {"inputs": {}}
    made: list[list[dict[str, Json]]] = []
    failed: dict[str, dict[str, Json]] = {}
    compiled = 0
    broken: list[Json] = list(job["failed_cases"])

    def run(rank: int) -> None:
        nonlocal compiled, broken
        # What other ranks than the first two call is noted nowhere, and is run.
        files = {name: job[name] if rank == 0 else f"{job[name]}.{rank}" for name in ("plan_out", "calls")}
        own = {**job, "rank": rank, **files, "failed_cases": broken}
        # Folders of its own: what another rank has left in them would be taken, and is not the same.
        with tempfile.TemporaryDirectory(prefix="aot-cache-") as folder:
            folders = {} if rank == 0 else _folders(Path(folder))
            crew.listen(own, {**_as_rank(environment, rank, job["ranks"]), **folders}, last, answer)
        broken = answer.get("failed_cases", broken)
        made.append(answer.get("graphs", []))
        failed.update({failure["unit"]: failure for failure in answer.get("graph_failed", [])})
        compiled += answer.get("graphs_compiled", 0)

    for rank in told:
        run(rank)
    made = [_of_others(graphs, broken) for graphs in made]
    why = by_rank.differing(made[0], made[1]) if len(made) > 1 else {}
    for rank in range(len(made), job["ranks"] if why else 0):
        run(rank)
    made = [_of_others(graphs, broken) for graphs in made]
    return answer | {
        "graphs": by_rank.combined(made, why),
        "graph_failed": list(failed.values()),
        "graphs_compiled": compiled,
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
