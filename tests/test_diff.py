"""aot_cache.cli.facts.diff on graphs: each part of a graph that can differ is a difference, and is named."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import raw_manifest
from test_manifest import GRAPH_FACTS, OBJECTS, of_graphs

from aot_cache.artifact.plan import CallPlan, Plan
from aot_cache.cli.facts import diff as diff_facts
from aot_cache.cli.render import terminal
from aot_cache.store import read_bundle, write_bundle

KEY = {"torch": "2.13.0", "torch git": "abc", "python": "3.11", "triton": "", "target": {}}


def a_bundle(path: Path, *graphs: dict[str, Any], **more: Any) -> diff_facts.Side:
    lean, details = raw_manifest.split(of_graphs(*graphs, **{"graph_key": KEY, "calls": [], **more}))
    write_bundle(path, lean, {**OBJECTS, lean["details"]: details})
    return diff_facts.side(read_bundle(path))


def changed(**parts: Any) -> dict[str, Any]:
    return {**copy.deepcopy(GRAPH_FACTS), **parts}


def test_the_same_graphs(tmp_path: Path) -> None:
    left, right = a_bundle(tmp_path / "a", GRAPH_FACTS), a_bundle(tmp_path / "b", changed(line=99))
    facts = diff_facts.diff(left, right)
    assert facts["same"] and facts["summary"] == "the same is launched by both"


OTHER = {
    "mode": "grad",
    "wrapping": {"backend": "inductor", "options": {"max_autotune": True}, "dynamic": None},
    "rank": 2,
    "code": "e" * 32,
    "inlined": [["model", "helper", "f" * 32]],
    "settings": GRAPH_FACTS["bytecode"],
    "dynamic": {},
    "identities": [],
    "values": [],
    "guards": ["L['x'].size()[0] >= 3"],
}


@pytest.mark.parametrize("part", diff_facts._ASKED)
def test_each_part_of_a_graph_that_says_which_calls_it_is_for(tmp_path: Path, part: str) -> None:
    left, right = a_bundle(tmp_path / "a", GRAPH_FACTS), a_bundle(tmp_path / "b", changed(**{part: OTHER[part]}))
    facts = diff_facts.diff(left, right)
    assert not facts["same"]
    assert facts["summary"] == "only left: 1 graph; only right: 1 graph"
    (one,) = facts["only_left"]["graphs"]
    assert one["differs"] == [diff_facts._ASKED[part]] and one["reached_by"] == ["case: n 2..9"]


def test_another_function(tmp_path: Path) -> None:
    left, right = a_bundle(tmp_path / "a", GRAPH_FACTS), a_bundle(tmp_path / "b", changed(function="other"))
    (one,) = diff_facts.diff(left, right)["only_right"]["graphs"]
    assert one["differs"] == ["no graph of this function"]


def test_a_graph_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = a_bundle(tmp_path / "a", GRAPH_FACTS)
    right = a_bundle(tmp_path / "b", GRAPH_FACTS, changed(mode="grad"))
    facts = diff_facts.diff(left, right)
    assert facts["summary"] == "only right: 1 graph" and not facts["only_left"]["graphs"]
    terminal.difference(facts)
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "only right: 1 graph", "the summary comes first"
    assert any("(grad" in line for line in said) and "    reached by case: n 2..9" in said


def test_the_same_calls_compiled_otherwise(tmp_path: Path) -> None:
    other = changed(graphs={"__aot_graph_0": GRAPH_FACTS["bytecode"]})
    facts = diff_facts.diff(a_bundle(tmp_path / "a", GRAPH_FACTS), a_bundle(tmp_path / "b", other))
    assert facts["summary"] == "compiled differently: 1 graph" and not facts["same"]
    newer = a_bundle(tmp_path / "c", other, graph_key={**KEY, "torch": "2.14.1"})
    (one,) = diff_facts.diff(a_bundle(tmp_path / "a", GRAPH_FACTS), newer)["compiled_otherwise"]
    assert one["differs"] == ["torch 2.13.0 and 2.14.1"]


def test_plans_differ_in_their_calls(tmp_path: Path) -> None:
    def a_plan(*ids: str) -> diff_facts.Side:
        calls = [
            CallPlan(
                function="model:f",
                line=3,
                id=i,
                mode="inference",
                wrapping={"backend": "inductor", "options": {}},
                dynamic={},
            )
            for i in ids
        ]
        return diff_facts.Side(tmp_path, Plan(recipe="tiny", target="cpu", calls=calls))

    facts = diff_facts.diff(a_plan("1", "2"), a_plan("2"))
    assert facts["summary"] == "only left: 1 compiled call"
    assert diff_facts.diff(a_plan("1"), a_plan("1"))["same"]
