"""What a server missed of compiled functions, built into the next bundle: it hits there, and what cannot be is named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import SEEDS, Built
from projects import found

from aot_cache.artifact import manifest
from aot_cache.artifact.plan import CallPlan, CasePlan
from aot_cache.misses.solve import Solved, points_for
from aot_cache.store import read_bundle

X, N = "L['x']", "L['n']"


@dataclass
class Server:
    """What a serving process knows of its bundle when a call misses."""

    calls: list[CallPlan]
    cases: list[CasePlan]

    @classmethod
    def of(cls, bundle: Path) -> Server:
        whole = manifest.whole(read_bundle(bundle)).to_json()
        return cls([CallPlan(**call) for call in whole["calls"]], [CasePlan(**case) for case in whole["cases"]])

    def structure(self, name: str) -> str:
        return next(call.structure for call in self.calls if call.function == name)

    def solve(self, name: str, sizes: dict[str, list[int]], structure: str = "") -> Solved:
        return points_for(self.calls, self.cases, name, structure or self.structure(name), sizes)

    def miss(
        self, name: str, sizes: dict[str, list[int]], structure: str = "", why: str = "no graph"
    ) -> dict[str, Any]:
        solved = self.solve(name, sizes, structure)
        common = {"in_capture": True, "sealed": True, "action": "eager", "why": why, "pid": 1, "seen": 1}
        own = {"place": "", "wrapping": {}, "mode": "inference", "structure": structure or self.structure(name)}
        return {
            "aot-cache miss": 1,
            "kind": "graph",
            "name": name,
            **common,
            **own,
            "sizes": sizes,
            "points": solved.points,
            "declare": solved.declare,
        }


def test_the_bundle_says_how_sizes_follow(built: Built) -> None:
    server = Server.of(built.bundle)
    assert server.solve("sample_model:decorated", {X: [100, 16]}) == (
        {"decorated": {"n": 100}},
        "decorated: n=Range(2, 100)",
        "",
    )
    assert server.solve("sample_model:scaled", {X: [1, 16], N: [9]}).points == {"scaled": {"k": 9, "n": 1}}
    # Values are static: that sizes follow from them is known all the same.
    assert server.solve("sample_model:tiled", {X: [32, 16]}).declare == "tiled: n=Values(8, 16, 32)"
    # The parameters of a module are the model's own, and a call inside a custom operator is a call.
    assert server.solve("sample_model:Norm.forward", {X: [100, 16]}).points == {"layers": {"n": 100}}
    assert server.solve("sample_model:nested", {X: [100, 16]}).declare == "broken: n=Range(2, 100)"
    assert "always 16" in server.solve("sample_model:decorated", {X: [5, 17]}).why
    assert "already" in server.solve("sample_model:decorated", {X: [5, 16]}).why


@dataclass
class Next:
    """A server whose bundle lacks points, what the next build said of its misses, and what a server has of that."""

    before: dict[str, Any]
    said: dict[str, Any]
    bundle: Path
    facts: dict[str, Any]


BEFORE = """
import aot_cache.auto
import torch
import sample_model as m
from pretend import capture
from serving import FACTS, aot_cache, call, say

aot_cache.ready()
aot_cache.seal()
with torch.inference_mode():
    call("warm-up without drafts", m.decorated, torch.randn(5, 16))
    with capture():
        call("drafts, declared", m.compiled_tiled, torch.randn(16, 16))
        call("decorated 100", m.decorated, torch.randn(100, 16))
        call("tiled 32", m.compiled_tiled, torch.randn(32, 16))
FACTS["traced"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
say()
"""
AFTER = """
import aot_cache.auto
import torch
import sample_model as m
from serving import aot_cache, call, say

aot_cache.ready(strict=True)
aot_cache.seal()
with torch.inference_mode():
    for n in (100, 64, 2, 80):
        call(f"decorated {n}", m.decorated, torch.randn(n, 16))
    call("tiled 32", m.compiled_tiled, torch.randn(32, 16))
say()
"""


@pytest.fixture(scope="module")
def following(built: Built) -> Next:
    """Built where the first bundle was, of fewer cases: of kinds of calls that nobody missed, the store has the graphs."""
    folder = built.project.folder
    misses = folder / "misses.jsonl"
    before = built.project.serve(BEFORE, built.bundle, AOT_CACHE_MISSES=str(misses))
    assert len(misses.read_text().splitlines()) == 2
    server = Server.of(built.bundle)
    lines = [  # beside what that server wrote: what no build can cover
        server.miss("sample_model:decorated", {X: [5, 17]}),
        server.miss("sample_model:decorated", {X: [5, 16]}, why="SHIFT was 0.5 and is 7.0"),
        server.miss("sample_model:decorated", {X: [100, 16]}, structure="0" * 16),
        server.miss("sample_model:decorated", {X: [1 << 60, 16]}),
        server.miss("sample_model:elsewhere", {X: [100, 16]}, structure="0" * 16),
    ]
    with misses.open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in lines))
    run = built.project.build(
        "sample_recipe:few",
        more=("--misses", "misses.jsonl", "--out", "next.safetensors"),
        PYTHONHASHSEED=SEEDS["here"],
    )
    assert run.returncode == 0, run.stderr
    (said,) = json.loads(run.stdout)["bundles"]
    after = built.project.serve(AFTER, folder / "next.safetensors", AOT_CACHE_POLICY="error")
    return Next(before, said, folder / "next.safetensors", after)


def test_a_capture_takes_a_branch_that_the_warm_up_did_not(following: Next) -> None:
    """What is declared hits, whatever the warm-up did; what is not falls back. Nothing is traced inside the capture."""
    facts = following.before
    assert found(facts["warm-up without drafts"]) and found(facts["drafts, declared"])
    for name in ("decorated 100", "tiled 32"):
        fact = facts[name]
        assert not fact["error"] and fact["distance"] == 0.0 and not fact["frame"] and not fact["graph"], fact
    assert facts["stats"]["in_capture"]["fallback"] == 2 and facts["traced"] == 0
    assert {miss["action"] for miss in facts["stats"]["misses"]} == {"eager"}
    assert all("size" in miss["why"] for miss in facts["stats"]["misses"])


def test_the_loop_closes(following: Next) -> None:
    """Under policy `error`: with the next bundle there is no miss."""
    stats = following.facts["stats"]
    assert stats["misses"] == [] and stats["policy"] == "error"
    assert not any(stats["after_seal"][kind] for kind in ("frame", "graph_compile", "fallback", "refused", "gcc"))


@pytest.mark.parametrize("call", ["decorated 100", "tiled 32"])
def test_what_was_missed_hits_in_the_next_bundle(following: Next, call: str) -> None:
    assert found(following.facts[call])


@pytest.mark.parametrize("call", ["decorated 64", "decorated 2", "decorated 80"])
def test_the_range_is_one_graph_that_grew(following: Next, call: str) -> None:
    assert found(following.facts["decorated 100"]) and found(following.facts[call], 0)


def test_only_what_was_missed_is_compiled(following: Next) -> None:
    assert following.said["compiled"] == 2
    graphs = [graph["function"] for graph in manifest.whole(read_bundle(following.bundle)).to_json()["graphs"]]
    assert sorted(graphs) == ["decorated", "scaled", "tiled", "tiled", "tiled"], "Values are static: one graph more"


def test_the_next_plan_names_the_missed_points(following: Next) -> None:
    cases = {case.name: case for case in Server.of(following.bundle).cases}
    assert cases["decorated"].missed == [{"n": 100}] and cases["tiled"].missed == [{"n": 32}]
    assert [(case.points, case.total) for case in cases.values()] == [(64, 64), (252, 252), (3, 3)]


def test_what_is_not_covered_is_named(following: Next) -> None:
    misses = following.said["misses"]
    assert (misses["given"], misses["covered"]) == (7, 2)
    reasons = sorted(row["why"] for row in misses["uncovered"])
    assert f"case 'decorated' at n={1 << 60}: " in reasons.pop(0), "no tensor is so large"
    assert reasons == [
        "it is declared already, and missed because SHIFT was 0.5 and is 7.0",
        "no declared case calls sample_model:elsewhere",
        "size 1 of x is 17, and always 16 in what was declared (decorated)",
        "the call has another call signature: mode, dtype, device, torch.compile options, source, or number of arguments",
    ]
