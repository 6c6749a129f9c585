"""aot_cache.builder.worker_pool: workers beside each other; none of them outlives its build."""

from __future__ import annotations

import os
import sys
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from aot_cache.artifact import target as targets
from aot_cache.artifact.plan import Plan
from aot_cache.builder import workers
from aot_cache.builder.pipeline import Request
from aot_cache.builder.worker_pool import Crew, beside
from aot_cache.errors import AotCacheError, TargetError
from aot_cache.misses.file import Misses

SLEEPS = "import os, pathlib, time\npathlib.Path(os.environ['PID']).write_text(str(os.getpid()))\ntime.sleep(600)\n"


def job(stage: str) -> dict[str, Any]:
    """One that a worker for kernels refuses at once: Triton has no backend for the CPU."""
    base = {"target": targets.get("cpu").properties(), "ranks": 1, "rank": 0, "ranges": {}, "recipe": "nosuch:recipe"}
    return {**base, "stage": stage, "misses": [], "refused": [], "ranks_given": False}


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


def test_what_goes_on_beside_is_waited_for() -> None:
    assert beside(lambda: {"graphs": [1]}).result() == {"graphs": [1]}


def test_what_it_raises_is_raised() -> None:
    def fail() -> dict[str, Any]:
        raise TargetError("one thing", "another")

    with pytest.raises(TargetError, match="one thing"):
        beside(fail).result()


def test_no_worker_outlives_the_block(sleeping: dict[str, str]) -> None:
    """What one worker raises ends the build, and the other one with it."""
    others: list[Future[dict[str, Any]]] = []
    awake = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}

    def build() -> None:
        with Crew(lambda *_: None) as crew:
            answer: dict[str, Any] = {"inputs": {}}
            others.append(beside(lambda: crew.listen(job("graphs"), sleeping, "graphs", answer) or {}))
            assert alive(wait_for(Path(sleeping["PID"])))
            crew.listen(job("kernels"), awake, "compiled", {"inputs": {}})

    with pytest.raises(AotCacheError, match="a GPU target; cpu"):
        build()
    with pytest.raises(TargetError, match="ended with code -9"):
        others[0].result()
    assert not alive(wait_for(Path(sleeping["PID"])))


def test_no_worker_is_started_after_it(sleeping: dict[str, str]) -> None:
    with Crew(lambda *_: None) as crew:
        pass
    with pytest.raises(TargetError, match="given up"):
        crew.listen(job("graphs"), sleeping, "graphs", {"inputs": {}})
    assert not Path(sleeping["PID"]).exists()


@pytest.mark.parametrize(("show_plan", "looked"), [(True, [0]), (False, [0, 1, 2])])
def test_a_plan_of_graphs_is_shown_as_one_rank_sees_it(
    show_plan: bool, looked: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of the first; what others would add is found where their graphs are compiled: all are, two tell nothing of a third."""
    asked: list[int] = []

    def listen(_: Crew, job: Any, environment: Any, last: str, answer: dict[str, Any], then: Any = None) -> None:
        asked.append(job["rank"])
        Plan("r", "cpu").write(Path(job["plan_out"]))

    monkeypatch.setattr(Crew, "listen", listen)
    request = Request(targets.get("cpu"), tmp_path, "any:recipe", ranks=3)
    workers.run(request, tmp_path, Misses([], 0), lambda *_: None, show_plan)
    assert sorted(asked) == looked
