"""A bundle for a job in which only the last of three ranks launches otherwise: built, said, and installed on each of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import sample_of_ranks as sample
from asking import asked_for, asking
from triton.runtime.jit import JITFunction

from aot_cache.artifact import manifest
from aot_cache.artifact import target as targets
from aot_cache.artifact.plan import Plan
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.runtime.kernels import KernelSet
from aot_cache.runtime.ledger import Ledger
from aot_cache.store import read_bundle
from aot_cache.upstream.codec import torch_ranks
from aot_cache.upstream.hooks import torch_capture

pytestmark = pytest.mark.usefixtures("device")
ROOT = Path(__file__).parents[2]
LAST, OTHERS = [sample.LAST], [rank for rank in range(sample.RANKS) if rank != sample.LAST]
FACTORY = "sample_of_ranks:made.<locals>.shift"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        asked = Request(
            target=targets.get("h200"), store=tmp_path_factory.mktemp("store"), model="sample_of_ranks:recipe", ranks=3
        )
        return pipeline.build(asked)


def kernels_of(rank: int) -> list[JITFunction]:
    return [sample.scale, sample.made(rank == sample.LAST), sample.tuned.fn]


@pytest.fixture(autouse=True)
def _nothing_installed() -> Iterator[None]:
    yield
    sample.tuned.cache.clear()
    for rank in (0, sample.LAST):
        for function in kernels_of(rank):
            function.device_caches.clear()
    sample.made.cache_clear()


def test_every_specialization_of_every_rank_is_built(built: Built) -> None:
    whole = manifest.whole(read_bundle(built.path)).to_json()
    names = [kernel["name"] for kernel in whole["kernels"]]
    found = [
        (names[unit["kernel"]].partition("@")[0], unit["specialization"][-1]["t"][1], unit["ranks"], unit["reached"])
        for unit in whole["units"]
    ]
    everywhere = {"step": [{"n": "2..4"}]}
    assert sorted(found, key=str) == sorted(
        [
            ("sample_of_ranks:scale", 64, [], everywhere),
            ("sample_of_ranks:scale", 256, LAST, {"step": [{"n": "3"}]}),
            (FACTORY, 64, OTHERS, everywhere),
            (FACTORY, 64, LAST, everywhere),
            ("sample_of_ranks:tuned", 16, OTHERS, everywhere),
            ("sample_of_ranks:tuned", 32, [], everywhere),
        ],
        key=str,
    )


def test_the_build_says_what_is_of_some_ranks_only(built: Built) -> None:
    one, other = sorted(name for name in built.apart if name.startswith(FACTORY))
    assert {built.apart[one], built.apart[other]} == {"1 specialization of ranks 0, 1", "1 specialization of rank 2"}
    assert {name: which for name, which in built.apart.items() if name not in (one, other)} == {
        "sample_of_ranks:scale": "1 specialization of rank 2",
        "sample_of_ranks:tuned": "1 specialization of ranks 0, 1",
    }
    assert bundle_facts.bundle(read_bundle(built.path))["apart"] == built.apart


def test_a_rank_whose_host_code_fails_is_named(built: Built) -> None:
    (failure,) = built.failed
    assert (failure["kernel"], failure["unit"]) == ("case late", "n=4")
    why = "RuntimeError: the last stage has no such layer (sample_of_ranks.py:"
    assert failure["error"].startswith(f"at n=4, as rank 2: {why}")


@pytest.mark.parametrize("rank", [0, sample.LAST])
def test_a_choice_of_this_rank_goes_before_one_of_all(
    rank: int, built: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_ranks, "own_or_first", lambda: rank)
    monkeypatch.setattr(torch_capture, "device_name", lambda: targets.get("h200").name)
    plan = Plan.read(built.path.with_suffix(".plan.json"))
    tuning = next(tuning for tuning in plan.tunings if len(tuning.candidates) == 2)
    widths = {candidate["WIDTH"]: number for number, candidate in enumerate(tuning.candidates)}
    units = []
    for unit in plan.units:
        number = widths[unit.specialization[-1]["t"][1]] if unit.kernel == tuning.kernel else -1
        via = [[0, number], [1, number]] if number >= 0 else [[-1, -1]]
        units.append(replace(unit, via=via, ranks=[]))
    of_all, own = (replace(tuning, choice=tuning.candidates[widths[width]], ranks=[]) for width in (16, 32))
    path = tmp_path / "recorded.plan.json"
    replace(plan, units=units, tunings=[of_all, replace(own, ranks=LAST)], calls=[]).write(path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
    again = pipeline.build(Request(target=targets.get("h200"), store=tmp_path / "store", plans=(path,)))
    sample.tuned.cache.clear()
    KernelSet(read_bundle(again.path), Ledger()).install(0)
    assert [config.kwargs["WIDTH"] for config in sample.tuned.cache.values()] == [32 if rank == sample.LAST else 16]


@pytest.mark.parametrize("rank", [0, sample.LAST])
def test_each_rank_hits(rank: int, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "rank", lambda: rank)
    monkeypatch.setattr(torch_ranks, "own_or_first", lambda: rank)

    def launch() -> None:
        for n in (2, 3, 4):
            sample.run(n, "cpu")

    assert len(asked_for(launch, sample.tuned)) >= 3
    kernels = KernelSet(read_bundle(built.path), Ledger())
    kernels.install(0)
    assert kernels.report.pending == [] and kernels.report.stale == {}, "what another rank makes is not missing here"
    chosen = [config.kwargs["WIDTH"] for config in sample.tuned.cache.values()]
    assert chosen == [32 if rank == sample.LAST else 16]
    with asking() as missed:
        launch()
    assert missed == set()
