"""Building graphs: nothing to do the second time, the same bytes elsewhere, and what cannot be built is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ELSEWHERE, SEEDS, Built
from projects import Project, found, hit

from aot_cache.artifact import manifest
from aot_cache.store import read_bundle


def test_everything_is_built(built: Built) -> None:
    for folder in SEEDS:
        said = built.said[folder]
        assert not said["failed"] and not said["nothing_to_do"] and not said["sampled"]
        assert said["graphs"] == len(built.graphs())


def test_nothing_changed_is_nothing_to_do(built: Built) -> None:
    before = built.bundle.read_bytes()
    run = built.project.build(PYTHONHASHSEED=SEEDS["here"])
    assert run.returncode == 0, run.stderr
    (said,) = json.loads(run.stdout)["bundles"]
    assert said["nothing_to_do"] and said["compiled"] == 0 and said["digest"] == built.said["here"]["digest"]
    assert built.bundle.read_bytes() == before


def parts(bundle: Path) -> dict[str, str]:
    """Each part of each graph of a bundle, by name."""
    graphs = manifest.whole(read_bundle(bundle)).to_json()["graphs"]
    out: dict[str, str] = {}
    for graph in graphs:
        first = next(iter(graph["dynamic"].items()), "static")
        name = f"{graph['module']}:{graph['function']} {first} {graph['reached']}"
        for part, value in graph.items():
            out[f"{name} {part}"] = json.dumps(sorted(value.values()) if part == "graphs" else value, sort_keys=True)
    return out


def test_two_builds_give_the_same_bytes(built: Built) -> None:
    """In two folders, with two seeds of the hash, by one process and by two."""
    one, two = parts(built.bundle), parts(built.again.bundle())
    assert {part: (one.get(part), two.get(part)) for part in {*one, *two} if one.get(part) != two.get(part)} == {}
    assert built.bundle.read_bytes() == built.again.bundle().read_bytes()
    assert built.said["here"]["digest"] == built.said[ELSEWHERE]["digest"]


# --- what cannot be built ---------------------------------------------------------------------------------------------


def test_a_branch_on_data_is_named(tmp_path: Path) -> None:
    project = Project.at(tmp_path / "project")
    run = project.build("sample_doomed:depends")
    line = (project.folder / "sample_doomed.py").read_text().split(".item()")[0].count("\n") + 1
    assert run.returncode in (3, 4) and f"sample_doomed.py:{line} reads the values of a tensor" in run.stderr
    assert "branches" in run.stderr and "Traceback" not in run.stderr
    assert not project.bundle("depends").exists()


@pytest.fixture(scope="module")
def doomed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, int, dict[str, str]]:
    """(the project, the build's exit code, what failed and why)."""
    project = Project.at(tmp_path_factory.mktemp("doomed") / "project")
    run = project.build("sample_doomed:some")
    (said,) = json.loads(run.stdout)["bundles"]
    return project, run.returncode, {failure["kernel"]: failure["error"] for failure in said["failed"]}


def test_what_cannot_be_written_down_is_named_and_the_rest_is_kept(
    doomed: tuple[Project, int, dict[str, str]],
) -> None:
    project, code, failed = doomed
    assert code == 4 and "sample_doomed:paired" in failed
    graphs = manifest.whole(read_bundle(project.bundle("some"))).to_json()["graphs"]
    assert "sound" in {graph["function"] for graph in graphs}
    assert "paired" not in {graph["function"] for graph in graphs}


PARTED = """
import aot_cache.auto
import torch
import sample_doomed as m
from serving import aot_cache, call, say

aot_cache.seal()
with torch.inference_mode():
    for n in (2, 8, 9, 16):
        call(str(n), m.compiled_parted, torch.randn(n, 16))
say()
"""


def test_a_range_that_the_code_splits_is_covered_by_parts(doomed: tuple[Project, int, dict[str, str]]) -> None:
    project, _, failed = doomed
    assert "sample_doomed:parted" not in failed
    facts = project.serve(PARTED, project.bundle("some"), AOT_CACHE_STRICT="0")  # `strict` refuses an incomplete bundle
    assert found(facts["2"]) and found(facts["9"]) and hit(facts["8"]) and hit(facts["16"])
