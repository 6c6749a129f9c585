"""aot_cache.builder.worker_pool and messages: workers beside each other; none of them outlives its build."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS
from test_manifest import GRAPH_FACTS

from aot_cache.artifact import target as targets
from aot_cache.artifact.manifest import NativeModule, graph_from_json
from aot_cache.artifact.plan import FailedCase, Failure, Plan
from aot_cache.builder import messages, workers
from aot_cache.builder.fingerprint import NO_INPUTS, Inputs
from aot_cache.builder.messages import (
    Answer,
    Compiled,
    Event,
    GraphsMade,
    ImportedCompiler,
    Job,
    NeedsRanks,
    Progressed,
    Raised,
    Refused,
    Stage,
    Surveyed,
    Traced,
    TracedGraph,
)
from aot_cache.builder.pipeline import Request
from aot_cache.builder.worker_pool import WorkerPool
from aot_cache.errors import AotCacheError, TargetError, UnknownName
from aot_cache.misses.file import Miss, Misses

SLEEPS = "import os, pathlib, time\npathlib.Path(os.environ['PID']).write_text(str(os.getpid()))\ntime.sleep(600)\n"


LATER = """
import torch
from aot_cache import Call, Recipe, Values, declare

@torch.compile
def double(x):
    return x * 2

@declare(n=Values(2))
def good(n):
    return Call(double, torch.ones(n))

@declare(n=Values(2))
def bad(n):
    raise AssertionError("it must not be run")

recipe = Recipe("later", [good, bad])
"""


def job(stage: Stage) -> Job:
    """One that a worker for kernels refuses at once: Triton has no backend for the CPU."""
    cpu = targets.get("cpu")
    return Job(stage=stage, target=cpu, recipe="nosuch:recipe", plan_out="", calls="", store="")


@pytest.fixture
def sleeping(tmp_path: Path) -> dict[str, str]:
    """The environment of a worker that sleeps; its process's number comes to `PID`."""
    (tmp_path / "sitecustomize.py").write_text(SLEEPS)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    return {**os.environ, "PYTHONPATH": path, "PID": str(tmp_path / "pid")}


def wait_for(path: Path) -> int:
    ready = threading.Event()
    while not (path.exists() and path.read_text()):
        ready.wait(0.05)
    return int(path.read_text())


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_is_submitted_is_waited_for() -> None:
    with WorkerPool(lambda *_: None) as pool:
        assert pool.submit(lambda: {"graphs": [1]}).result() == {"graphs": [1]}


def test_what_it_raises_is_raised() -> None:
    def fail() -> dict[str, Any]:
        raise TargetError("one thing", "another")

    with WorkerPool(lambda *_: None) as pool, pytest.raises(TargetError, match="one thing"):
        pool.submit(fail).result()


def test_no_worker_outlives_the_block(sleeping: dict[str, str]) -> None:
    """What one worker raises ends the build, and the other one with it."""
    others: list[Future[list[Any]]] = []
    awake = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def build() -> None:
        with WorkerPool(lambda *_: None) as pool:
            others.append(pool.submit(lambda: pool.run(job("graphs"), sleeping)))
            assert alive(wait_for(Path(sleeping["PID"])))
            pool.run(job("kernels"), awake)

    with pytest.raises(AotCacheError, match="expected a GPU target for Triton kernels, found cpu"):
        build()
    with pytest.raises(TargetError, match="ended with exit code -9"):
        others[0].result()
    assert not alive(wait_for(Path(sleeping["PID"])))


def test_no_worker_is_started_after_it(sleeping: dict[str, str]) -> None:
    with WorkerPool(lambda *_: None) as pool:
        pass
    with pytest.raises(TargetError, match="cancelled"):
        pool.run(job("graphs"), sleeping)
    assert not Path(sleeping["PID"]).exists()


@pytest.mark.parametrize("dismissed", [True, False])
def test_what_was_prepared_for_nothing_does_not_outlive_the_block(sleeping: dict[str, str], dismissed: bool) -> None:
    with WorkerPool(lambda *_: None) as pool:
        worker = pool.prepare(job("graphs"), sleeping)
        pid = wait_for(Path(sleeping["PID"]))
        if dismissed:
            pool.dismiss(worker)
            assert not alive(pid)
    assert not alive(pid)


@pytest.mark.parametrize("early", [True, False])
def test_a_prepared_worker_that_has_failed_says_why(early: bool) -> None:
    """Whether it failed before its job came or does so now."""
    with WorkerPool(lambda *_: None) as pool:
        worker = pool.prepare(job("graphs"), {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
        if early:
            worker.group.process.wait(HANGS)
        with pytest.raises(UnknownName, match="cannot import module 'nosuch'"):
            pool.run(job("graphs"), {}, prepared=worker)


def test_a_prepared_worker_does_the_job_that_comes_later(tmp_path: Path) -> None:
    """With what became known since: here, a case that another worker could not run."""
    (tmp_path / "later.py").write_text(LATER)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    known = replace(
        job("graphs"), recipe="later:recipe", plan_out=f"{tmp_path}/plan", calls=f"{tmp_path}/calls", show_plan=True
    )
    with WorkerPool(lambda *_: None) as pool:
        worker = pool.prepare(known, environment)
        found = pool.run(replace(known, failed_cases=[replace(FAILED, case="bad")]), {}, prepared=worker)
    (answer,) = found
    assert isinstance(answer, Surveyed) and [failed.case for failed in answer.failed_cases] == ["bad"]


@pytest.mark.parametrize(("show_plan", "looked"), [(True, [0]), (False, [0, 1, 2])])
def test_a_plan_of_graphs_is_shown_as_one_rank_sees_it(
    show_plan: bool, looked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the first; what others would add is found where their graphs are compiled: all are, two tell nothing of a third."""
    asked: list[int] = []

    def run(_: WorkerPool, job: Job, environment: Any, **_others: Any) -> list[Answer]:
        asked.append(job.rank)
        Plan(recipe="r", target="cpu").write(Path(job.plan_out))
        return [Surveyed(spec="any:recipe", inputs=NO_INPUTS, failed_cases=[])]

    monkeypatch.setattr(WorkerPool, "run", run)
    request = Request(target=targets.get("cpu"), store=tmp_path, model="any:recipe", ranks=3)
    workers.run(request, tmp_path, Misses([], 0), lambda *_: None, show_plan)
    assert sorted(asked) == looked


# --- messages ---------------------------------------------------------------------------------------------------------

INPUTS = Inputs(python="3.11", packages={"torch": "1"}, files={"/a.py": "0"})
FAILED = FailedCase(case="decode", point={"n": 1}, place="m.py:3", why="it raises")
EVENTS = (
    Progressed(stage="graphs", done=1, total=2),
    NeedsRanks(ranks=4),
    Raised(type="TraceError", expected="a", found="b", hint=""),
    ImportedCompiler(),
    Traced(
        spec="m:r",
        units=3,
        calling=["decode"],
        refused=[Refused(case="decode", point={"n": 9}, why="too large")],
        inputs=INPUTS,
    ),
    Compiled(
        keys=["k"],
        memory_keys=[None],
        compiled=1,
        native=[NativeModule(name="u", source="s", suffix=".so", object="o")],
        failed=[Failure(kernel="m:k", unit="u", error="no", reached={"decode": [{"n": "1"}]})],
        toolchain={"triton": "3.7.1"},
        missed_kernels={3: "why"},
        neighbours=2,
        removed=["k:1"],
        inputs=INPUTS,
    ),
    Surveyed(spec="m:r", inputs=INPUTS, failed_cases=[FAILED]),
    GraphsMade(graphs=[], failed=[], compiled=0, key={"torch": "2.13"}, failed_cases=[], missed_calls={0: ""}),
)


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_an_event_comes_back(event: Event) -> None:
    line = messages.written(event)
    assert line.count("\n") == 1 and messages.read(line) == event


def test_a_graph_comes_back() -> None:
    graph = graph_from_json(TracedGraph, {**GRAPH_FACTS, "points": {"0": [1, 2]}, "asks_rank": ["f (m.py:3)"]})
    made = GraphsMade(graphs=[graph], failed=[], compiled=1, key={}, failed_cases=[FAILED], missed_calls={})
    assert messages.read(messages.written(made)) == made


def test_a_job_comes_back() -> None:
    miss = Miss("graph", "m:f", 2, facts={"points": {"decode": {"n": 9}}})
    refused = Refused(case="decode", point={"n": 9}, why="too large")
    asked = replace(job("graphs"), misses=[miss], refused=[refused], failed_cases=[FAILED], cases=["decode"], ranks=2)
    assert Job.read(asked.written()) == asked
