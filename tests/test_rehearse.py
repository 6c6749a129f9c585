"""Rehearsals of a real bundle: what hits, and everything for which a rehearsal must fail."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from limits import HANGS
from printed import without_progress

from aot_cache.artifact import rehearsed
from aot_cache.artifact import target as targets
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.errors import RehearsalFailed, UnknownName
from aot_cache.rehearsal import CaseResult, Rehearsal, rehearse
from aot_cache.store import read_bundle, write_bundle

ROOT = Path(__file__).parents[1]
MODULE = Path(__file__).with_name("rehearsal_recipe.py")
SHARED = ("good", "kept", "odd")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Built where a decomposition is another one than where it is served."""
    folder = tmp_path_factory.mktemp("rehearsed")
    shutil.copy(MODULE, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("SAMPLE_BREAK", "1")
        made = pipeline.build(
            Request(target=targets.get("cpu"), store=folder / "store", model="rehearsal_recipe:recipe", workers=1)
        )
    assert not made.failed
    return made


Run = Callable[..., Rehearsal]


@pytest.fixture
def run(built: Built, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Rehearse the bundle in the folder of its recipe, or in another one."""

    def run(*cases: str, folder: Path | None = None, timeout: float | None = None, points: int = 16) -> Rehearsal:
        monkeypatch.chdir(folder or built.path.parents[2])
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        return rehearse(built.path, digest=built.digest, cases=cases, timeout=timeout, points=points)

    return run


@pytest.fixture(scope="module")
def whole(built: Built) -> Rehearsal:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(built.path.parents[2])
        patch.setenv("PYTHONPATH", str(ROOT))
        return rehearse(built.path, points=None)


def case_of(found: Rehearsal, name: str) -> CaseResult:
    return next(case for case in found.cases if case.name == name)


@pytest.mark.parametrize("name", SHARED)
def test_what_is_built_as_it_is_served_hits(whole: Rehearsal, name: str) -> None:
    """`kept` has a state that both calls change: each begins with the same."""
    case = case_of(whole, name)
    assert case.passed and (case.declared, case.chosen, case.count("hit")) == (4, 4, 4), whole.reasons()
    assert case.worst is not None and case.worst.distance is not None and case.worst.distance < 1e-6
    assert case.events == {} and whole.not_ready == ""


def test_a_wrong_result_is_no_hit(whole: Rehearsal) -> None:
    case = case_of(whole, "wrong")
    assert case.count("differs") == 4 and not case.passed and not whole.passed
    assert case.worst is not None and case.worst.distance is not None and 0.1 < case.worst.distance < 2
    (reason,) = whole.reasons()
    assert reason.startswith("wrong: differs: result is ") and "(at wrong, n=" in reason and "3 more" in reason


def test_the_document_has_all_of_it(whole: Rehearsal, built: Built) -> None:
    facts = json.loads(json.dumps(whole.to_json(), allow_nan=False))
    assert (facts["digest"], facts["device"], facts["passed"], facts["chosen"]) == (built.digest, "cpu", False, 16)
    assert facts["versions"].keys() == {"aot-cache", "python", "torch", "triton"}
    rows = {case["name"]: (case["run"], case["hits"]) for case in facts["cases"]}
    assert rows == {"good": (4, 4), "kept": (4, 4), "wrong": (4, 0), "odd": (4, 4)}


def test_source_that_changed_since_misses(run: Run, tmp_path: Path) -> None:
    (tmp_path / MODULE.name).write_text(MODULE.read_text().replace("return 2\n", "return 3\n"))
    found = run("good", folder=tmp_path, points=2)
    assert not found.passed and case_of(found, "good").count("miss") == 2
    why = "the source of rehearsal_recipe:factor differs"
    assert found.reasons() == [f"rehearsal_recipe:doubled: {why} (at good, n=2 and 1 more)"]
    assert why in found.not_ready, "ready(strict=True) knows it, too"


def test_a_case_that_is_gone_is_no_miss(run: Run, tmp_path: Path) -> None:
    (tmp_path / MODULE.name).write_text(MODULE.read_text().replace("[good, kept,", "[good,"))
    with pytest.raises(UnknownName, match="the bundle's case 'kept'"):
        run(folder=tmp_path)


def test_a_process_that_dies_is_named_with_its_point(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLE_DIE", "4")
    found = run("good", "odd")
    assert not found.passed and "SIGSEGV" in found.died and "(at odd, n=4)" in found.died
    assert case_of(found, "good").passed and len(case_of(found, "odd").points) == 2, "what was seen before is kept"
    assert found.died in found.reasons()


def test_a_point_that_takes_too_long_is_ended(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLE_SLEEP", "3")
    found = run("odd", timeout=4)
    assert not found.passed and "killed after 4 s" in found.died and "(at odd, n=3)" in found.died


def test_a_process_that_never_comes_to_a_point(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAMPLE_DIE", "at once")
    with pytest.raises(RehearsalFailed, match="ended before its first point: it ended with code 7: "):
        run("good")


def test_host_code_that_cannot_run_here(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its line is named; it is no miss, and proves nothing."""
    monkeypatch.setenv("SAMPLE_RAISE", "3")
    monkeypatch.setenv("SAMPLE_NOT_MADE", "5")
    case = case_of(found := run("odd"), "odd")
    assert (case.count("hit"), case.count("cannot run"), case.count("miss")) == (2, 2, 0) and not found.passed
    raised, not_made = (point.why for point in case.points if point.status == "cannot run")
    line = 1 + MODULE.read_text().split("\n").index('        raise ValueError("only where no GPU is")')
    assert raised == (f"it raises in eager, too: ValueError: only where no GPU is ({Path.cwd() / MODULE.name}:{line})")
    assert not_made.startswith("its arguments cannot be made: KeyError: 'no such weight' (")


def test_a_case_that_nobody_declared(run: Run) -> None:
    with pytest.raises(UnknownName, match="no case 'decode' in "):
        run("decode")


# --- the command line -------------------------------------------------------------------------------------------------


def command(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aot_cache", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    (folder / "one.py").write_text(ONE)
    return folder


def test_a_build_proves_what_it_says(project: Path) -> None:
    """It rehearses, writes it down, and does not do it again; `inspect` and `verify` show it, and another digest does not."""
    build = ("build", "--model", "one:case", "--target", "cpu", "--workers", 1, "--out", "a.safetensors", "--json")
    first = command(project, *build)
    assert first.returncode == 0, first.stderr
    row = json.loads(first.stdout)["bundles"][0]
    assert row["coverage"] == "proved 3 points on cpu" and row["rehearsal"]["passed"]
    bundle = project / "a.safetensors"
    stamp = rehearsed.read(bundle, row["digest"])
    assert [(run.device, run.run, run.declared) for run in stamp.runs] == [("cpu", 3, 3)]
    again = json.loads(command(project, *build).stdout)["bundles"][0]
    assert again["nothing_to_do"] and again["rehearsal"] is None and again["coverage"] == "proved 3 points on cpu"
    for what in ("inspect", "verify"):
        assert "rehearsed: proved 3 points on cpu, 20" in command(project, what, bundle).stdout
    part = command(project, "rehearse", bundle, "--points", 2, "--json")
    assert part.returncode == 0 and json.loads(part.stdout)["verdict"] == "rehearsed 2 of 3 points on cpu"
    shown = command(project, "inspect", bundle, "--json").stdout
    assert json.loads(shown)["coverage"] == "proved 3 points on cpu", "a look at fewer points takes nothing away"
    path = rehearsed.path_of(bundle)
    path.write_text(path.read_text().replace(row["digest"], "0" * 64))
    assert json.loads(command(project, "inspect", bundle, "--json").stdout)["coverage"] == "enumerated 3 points"
    assert "is about another bundle" in command(project, "verify", bundle).stdout


def test_a_build_that_does_not_hit_says_so_and_keeps_the_bundle(project: Path) -> None:
    """The second case calls something that nobody builds: another backend's."""
    build = ("build", "--model", "one:both", "--target", "cpu", "--workers", 1, "--out", "b.safetensors")
    said = command(project, *build)
    assert said.returncode == 5, said.stderr
    assert "the bundle would miss where it is served; it is kept at " in said.stdout
    assert "missed: one:elsewhere: it is not compiled by Inductor (at other, n=2 and 2 more)" in said.stdout
    assert "not proved: 3 of 6 points hit" in said.stdout and "proved 6" not in said.stdout
    assert (project / "b.safetensors").exists() and not rehearsed.path_of(project / "b.safetensors").exists()
    without = command(project, *build, "--no-rehearse")
    assert without.returncode == 0 and "enumerated 6 points" in without.stdout and "nothing to do" in without.stdout


ONE = """
import torch

from aot_cache import Call, Range, Recipe, declare, device

@torch.compile
def double(x):
    return x * 2

@torch.compile(backend="eager")
def elsewhere(x):
    return x * 2

@declare(n=Range(2, 4))
def case(n):
    return Call(double, torch.empty(n, 8, device=device()))

@declare(n=Range(2, 4))
def other(n):
    return Call(elsewhere, torch.empty(n, 8, device=device()))

both = Recipe("both", [case, other])
"""


def test_a_gpu_that_is_not_here(built: Built, tmp_path: Path) -> None:
    """One clear error, before anything is started."""
    bundle = read_bundle(built.path)
    manifest = {name: value for name, value in bundle.manifest.items() if name != "objects"}
    manifest["target"] = targets.get("h200").properties()
    objects = {name: bundle.object(name) for name in bundle.manifest["objects"]}
    write_bundle(tmp_path / "b.safetensors", manifest, objects)
    said = command(tmp_path, "rehearse", "b.safetensors")
    assert (said.returncode, said.stdout) == (3, "")
    error = "error: no GPU here to rehearse b.safetensors on, which is for NVIDIA H200\n"
    assert without_progress(said.stderr) == f"{error}hint: run this where it serves\n"
