"""One bundle for all ranks of a job: a rank's number in a graph is found at build time, and such a graph is a rank's own."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from projects import HERE, Project

from aot_cache.artifact import manifest
from aot_cache.errors import Incompatible
from aot_cache.runtime import graphs
from aot_cache.runtime.graphs import GraphSet
from aot_cache.runtime.ledger import Ledger
from aot_cache.store import read_bundle
from aot_cache.upstream.hooks import inductor_artifact, torch_capture

RANKS = 3


@dataclass
class OfRanks:
    """What was built for a job, and what the build said."""

    project: Project
    bundle: Path
    said: dict[str, Any]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> OfRanks:
    project = Project.at(tmp_path_factory.mktemp("ranks") / "project")
    shutil.copy(HERE / "sample_ranks.py", project.folder)
    run = project.build("sample_ranks:recipe", more=("--ranks", str(RANKS)))
    assert run.returncode == 0, run.stderr
    (said,) = json.loads(run.stdout)["bundles"]
    return OfRanks(project, Path(said["path"]), said)


def test_what_holds_a_rank_is_built_for_each(job: OfRanks) -> None:
    graphs = manifest.whole(read_bundle(job.bundle)).to_json()["graphs"]
    marks = sorted((graph["function"], graph["rank"]) for graph in graphs if graph["function"] != "alike")
    assert marks == [(name, rank) for name in ("Shard.forward", "asking", "of_the_last") for rank in range(RANKS)]
    assert [graph["rank"] for graph in graphs if graph["function"] == "alike"] == [None]


def test_the_build_says_where_the_number_comes_from(job: OfRanks) -> None:
    why = job.said["per_rank"]
    assert sorted(why) == [f"sample_ranks:{name}" for name in ("Shard.forward", "asking", "of_the_last")]
    assert why["sample_ranks:asking"].startswith("the rank's number is asked for in offset (sample_ranks.py:")
    assert "rank" in why["sample_ranks:Shard.forward"]


def test_a_rank_whose_code_fails_is_named(job: OfRanks) -> None:
    """Nothing else is declared, so there is nothing to build; what the first two ranks do says nothing of the third."""
    run = job.project.build("sample_ranks:broken", more=("--ranks", str(RANKS)))
    error = next(line for line in run.stderr.splitlines() if line.startswith("error: "))
    assert run.returncode == 3
    assert error.startswith(
        "error: case 'late' at n=4, as rank 2: its code raised RuntimeError: the last stage has no such layer ("
    )


def test_what_ranks_share_is_built_once_for_all_of_them(job: OfRanks) -> None:
    """Without `--ranks`: the recipe says how many there are. A layer's graph sums over them, and is the same on each."""
    run = job.project.build("sample_ranks:shared")
    assert run.returncode == 0, run.stderr
    (said,) = json.loads(run.stdout)["bundles"]
    found = manifest.whole(read_bundle(Path(said["path"]))).to_json()
    assert (said["ranks"], said["per_rank"], found["ranks"]) == (2, {}, 2)
    assert [(graph["function"], graph["rank"]) for graph in found["graphs"]] == [("half", None)]


@pytest.mark.parametrize(
    ("backend", "up", "gpu", "asked"),
    [("cuda", True, 0, 0), ("cuda", True, 1, 1), ("cuda", False, 1, 0), ("cpu", True, 1, 0)],
)
def test_graphs_are_loaded_for_the_gpu_that_is_current(
    backend: str, up: bool, gpu: int, asked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the first load, and from then on. One that cannot run there is refused in one line."""
    loaded: list[int] = []

    def load_graph(_data: bytes, number: int) -> object:
        loaded.append(number)
        if number:
            raise ValueError("it holds a device")
        return lambda: None

    monkeypatch.setattr(torch_capture, "cuda_is_up", lambda: up)
    monkeypatch.setattr(torch_capture, "device_number", lambda: gpu)
    monkeypatch.setattr(inductor_artifact, "load_graph", load_graph)
    graph = SimpleNamespace(code="c", graphs={"g": "d"}, libraries={}, choices={}, rank=None)
    header: Any = SimpleNamespace(graphs=[graph], on_cpu=backend == "cpu")
    monkeypatch.setattr(graphs, "served", lambda bundle: header)
    bundle: Any = SimpleNamespace(path=Path("B"), digest="d", proven=True, object=lambda digest: b"")
    made = GraphSet(bundle, Ledger())
    if not asked:
        assert made.prime() == 1
    else:
        expected = (
            r"expected graph g of B to run on GPU 1 .*, found it was built for GPU 0: it holds a device; hint: .*CUDA_V"
        )
        with pytest.raises(Incompatible, match=expected):
            made.prime()
        monkeypatch.setattr(torch_capture, "device_number", lambda: 0)
        with pytest.raises(Incompatible, match="on GPU 1"):
            made.prime()
    assert set(loaded) == {asked}


SERVE = """
import os
from aot_cache.upstream.virtual import torch_fake_group
import torch, torch.distributed as dist
torch_fake_group.join(int(os.environ["AS"]), 3)
import aot_cache.auto
import sample_ranks as m
from serving import FACTS, aot_cache, say

import torch._dynamo
aot_cache.arm("error")
aot_cache.ready(strict=True)
aot_cache.seal()
with torch.inference_mode():
    x = torch.randn(3, 8)
    before = x.sin() + 1
    before = before - 7 if dist.get_rank() == 2 else before + 0.5
    FACTS["apart"] = float((m.run(x) - ((before * 2 + dist.get_rank() * 100) * 3 + dist.get_rank())).abs().max())
    FACTS["why"] = [row["why"] for frame in aot_cache.explain(m.asking, x.double()) for row in frame["graphs"]]
say()
"""


@pytest.mark.parametrize("rank", [0, 2])
def test_each_rank_runs_its_own(job: OfRanks, rank: int) -> None:
    """Under policy `error`: with another rank's graph the numbers would be wrong, without one it would raise."""
    facts = job.project.serve(SERVE, job.bundle, AS=str(rank))
    assert facts["apart"] < 1e-3 and facts["stats"]["misses"] == []
    others = [f"it was built for rank {other}, but this is rank {rank}" for other in range(RANKS) if other != rank]
    assert [why for why in facts["why"] if why in others] == others
