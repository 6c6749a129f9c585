"""The worker processes of one build: started, talked to, and their answers put together."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from threading import Thread
from typing import IO, TYPE_CHECKING, Any

from aot_cache import errors
from aot_cache.build import by_rank, stamp
from aot_cache.errors import DeclarationError, TargetError
from aot_cache.miss_file import Misses
from aot_cache.plan import Plan
from aot_cache.target import Target

if TYPE_CHECKING:
    from aot_cache.build.pipeline import Request

Json = Any
Progress = Callable[[str, int, int], None]


class _OtherRanks(Exception):
    """A worker has read the recipe, and it is for a job of so many ranks."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks


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
        return _run(request, scratch, misses, progress, show_plan)
    except _OtherRanks as found:
        ranks = found.ranks
    return _run(replace(request, ranks=ranks), scratch, misses, progress, show_plan)


def _run(
    request: Request, scratch: Path, misses: Misses, progress: Progress, show_plan: bool
) -> tuple[dict[str, Json], Plan]:
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
    if not cpu:
        for rank in told[1:]:  # what these launch besides is one plan with what the first does
            also = {
                **job,
                "stage": "kernels",
                "rank": rank,
                "show_plan": True,
                "plan_out": str(scratch / f"plan{rank}.json"),
                "calls": f"{job['calls']}.{rank}",
            }
            _listen(also, _as_rank(environment, rank, ranks), "traced", answer, progress)
            job["also"].append(also["plan_out"])
        _listen(
            {**job, "stage": "kernels"},
            _as_rank(environment, 0, ranks),
            "traced" if show_plan else "compiled",
            answer,
            progress,
        )
    calling = answer.get("calling", []) if not cpu else None  # on the CPU nobody has looked yet
    if request.plan is None and (cpu or calling):
        last = "surveyed" if show_plan else "graphs"
        graphs = {**job, "stage": "graphs", "cases": calling, "refused": answer.get("refused", [])}
        if show_plan:
            told = told[:1]
        _graphs_of_ranks(graphs, told, environment, last, answer, progress)
    plan = Plan.read(plan_out)
    if request.plan is None:  # a plan that was given says so itself
        plan.ranks = ranks
    return answer, plan


def _told_apart(request: Request, ranks: int) -> list[int]:
    """The ranks that the recipe is traced as, to see whether a number of theirs is in what comes of it."""
    if request.plan is not None:
        return [0]
    return list(range(min(ranks, 2)))


def _graphs_of_ranks(
    job: Mapping[str, Json],
    told: list[int],
    environment: Mapping[str, str],
    last: str,
    answer: dict[str, Json],
    progress: Progress,
) -> None:
    """Trace and compile graphs as the ranks in `told`, and, if they differ, as all others."""
    made: list[list[dict[str, Json]]] = []
    failed: dict[str, dict[str, Json]] = {}
    compiled = 0

    def run(rank: int) -> None:
        nonlocal compiled
        # What other ranks than the first two call is noted nowhere, and is run.
        files = {name: job[name] if rank == 0 else f"{job[name]}.{rank}" for name in ("plan_out", "calls")}
        own = {**job, "rank": rank, **files}
        # Folders of its own: what another rank has left in them would be taken, and is not the same.
        with tempfile.TemporaryDirectory(prefix="aot-cache-") as folder:
            folders = {} if rank == 0 else _folders(Path(folder))
            _listen(own, {**_as_rank(environment, rank, job["ranks"]), **folders}, last, answer, progress)
        made.append(answer.get("graphs", []))
        failed.update({failure["unit"]: failure for failure in answer.get("graph_failed", [])})
        compiled += answer.get("graphs_compiled", 0)

    for rank in told:
        run(rank)
    why = by_rank.differing(made[0], made[1]) if len(made) > 1 else {}
    for rank in range(len(made), job["ranks"] if why else 0):
        run(rank)
    answer.update(
        graphs=by_rank.combined(made, why), graph_failed=list(failed.values()), graphs_compiled=compiled, per_rank=why
    )


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


def _listen(
    job: Mapping[str, Json], environment: Mapping[str, str], last: str, answer: dict[str, Json], progress: Progress
) -> None:
    """Run one worker and add its events to `answer`; what it read is added to what others read."""
    for event in _talk(job, environment, last):
        if event["event"] == "progress":
            progress(event["stage"], event["done"], event["total"])
        elif event["event"] == "ranks":
            raise _OtherRanks(event["ranks"])
        elif event["event"] == "error":
            raise getattr(errors, event["type"])(event["wanted"], event["found"], event["do"])
        else:
            answer.update({**event, "inputs": stamp.both(answer["inputs"], event.get("inputs", {}))})


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


def _talk(job: Mapping[str, Json], environment: Mapping[str, str], last: str) -> Any:
    """Start a worker, hand it the job, yield its events, of which `last` is the last."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "aot_cache.build.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(environment),
        text=True,
    )
    assert worker.stdin is not None and worker.stdout is not None and worker.stderr is not None
    last_words: deque[str] = deque(maxlen=20)
    listener = Thread(target=_drain, args=(worker.stderr, last_words), daemon=True)
    listener.start()
    finished = False
    try:
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.close()
        for line in worker.stdout:
            event = json.loads(line)
            finished = finished or event["event"] in ("error", "ranks", last)
            yield event
    finally:
        if worker.poll() is None and not finished:
            worker.kill()  # the reader gave up (Ctrl-C, an error): nobody waits for what it would write
        worker.wait()
        listener.join()
        worker.stdout.close()
        worker.stderr.close()
    if not finished or (worker.returncode and not finished):
        words = [w.strip() for w in last_words if w.strip()]
        raise TargetError(
            "the build worker to finish", f"it ended with code {worker.returncode}: {words[-1] if words else 'no word'}"
        )


def _drain(stream: IO[str], into: deque[str]) -> None:
    show = os.environ.get("AOT_CACHE_DEBUG") == "1"
    for line in stream:
        into.append(line)
        if show:
            sys.stderr.write(line)
