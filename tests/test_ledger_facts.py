"""aot_cache.cli.facts.ledger: what serving processes counted, beside the bundle that they had."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from a_missed_call import MISS

from aot_cache.artifact.plan import CasePlan
from aot_cache.cli.facts import coverage_grid
from aot_cache.cli.facts import ledger as ledger_facts
from aot_cache.cli.facts.coverage_grid import GRAPH, KERNEL, Served
from aot_cache.errors import DeclarationError

DIGEST, OTHER = "d" * 64, "e" * 64


def stats(**more: Any) -> dict[str, Any]:
    """What `aot_cache.stats()` gives, by hand, of a process that loaded two bundles."""
    bundle = {"digest": DIGEST, "units": 3, "primed": 2, "stale": {"m:old": "other source"}, "pending": ["m:late"]}
    missed = [{"kind": kind, "name": "m:scale", "in_capture": False, "why": "no"} for kind in ("kernel", "tuning")]
    return {
        "sealed": True,
        "total": {"graph": 5, "fallback": 2, "gcc": 0},
        "in_capture": {"graph": 0, "fallback": 2, "gcc": 0},
        "after_seal": {"graph": 1, "fallback": 2, "gcc": 0},
        "bundles": [bundle, {**bundle, "digest": OTHER, "primed": 3}],
        "graphs": [{"digest": DIGEST, "primed": 4, "found": {"g1": 3}, "stale": {}}],
        "misses": missed,
        **more,
    }


def written(folder: Path, *documents: Any, name: str = "ledger") -> Path:
    path = folder / name
    path.write_text("\n".join(map(json.dumps, documents)))
    return path


def test_the_facts_of_several_processes(tmp_path: Path) -> None:
    paths = [written(tmp_path, stats(), name="one"), written(tmp_path, stats(sealed=False), name="two")]
    facts = ledger_facts.facts(ledger_facts.read(paths, DIGEST), DIGEST, compiled=4)
    assert (facts["processes"], facts["sealed"], facts["paths"]) == (2, 1, [str(path) for path in paths])
    assert facts["kernels"] == {"in_all": 6, "loaded": 4}, "of this bundle, not of the other one"
    assert facts["graphs"] == {"in_all": 8, "loaded": 8} and facts["found"] == {"g1": 6}
    assert facts["events"] == [
        {"kind": "graph", "total": 10, "in_capture": 0, "after_seal": 2},
        {"kind": "fallback", "total": 4, "in_capture": 4, "after_seal": 4},
    ]
    assert (facts["stale"], facts["pending"]) == ({"m:old": "other source"}, ["m:late"])
    assert [(m["kind"], m["name"], m["count"]) for m in facts["misses"]] == [
        ("kernel", "m:scale", 2),
        ("tuning", "m:scale", 2),
    ]
    assert not facts["complete"]


def test_a_misses_file_has_them_all(tmp_path: Path) -> None:
    """The stats keep the last ones only, and the same ones: they are not counted twice."""
    paths = [written(tmp_path, stats(), name="s"), written(tmp_path, MISS, {**MISS, "pid": 2, "seen": 3}, name="m")]
    ledger = ledger_facts.read(paths, DIGEST)
    facts = ledger_facts.facts(ledger, DIGEST, 4)
    assert [(m["name"], m["count"], m["in_capture"]) for m in facts["misses"]] == [("m:layer", 15, True)]
    assert facts["complete"] and facts["processes"] == 1
    (missed,) = ledger.missed()
    assert (missed.name, missed.case, missed.point, missed.count) == ("m:layer", "decode", {"n": 600}, 15)


def test_a_misses_file_alone(tmp_path: Path) -> None:
    facts = ledger_facts.facts(ledger_facts.read([written(tmp_path, MISS)], DIGEST), DIGEST, 4)
    assert facts["processes"] == 0 and facts["events"] == [] and facts["misses"][0]["count"] == 12


def a_grid(ledger: ledger_facts.Ledger) -> list[dict[str, Any]]:
    units = [
        Served("g1", GRAPH, "m:layer", {"decode": [{"n": "1..8"}]}),
        Served("g2", GRAPH, "m:layer", {"decode": [{"n": "9..16"}]}),
        *(Served(name, KERNEL, f"m:{name}", {"decode": [{"n": "1..16"}]}) for name in ("scale", "old", "late")),
    ]
    return coverage_grid.grids(
        [CasePlan(name="decode", dims={"n": "1..16"}, points=16, total=16, sampled=[])], units, ledger.missed()
    )


def test_the_grid_says_what_was_seen(tmp_path: Path) -> None:
    ledger = ledger_facts.read([written(tmp_path, stats(), name="s"), written(tmp_path, MISS, name="m")], DIGEST)
    grids = a_grid(ledger)
    ledger_facts.annotate(grids, ledger_facts.facts(ledger, DIGEST, 4))
    (grid,) = grids
    rows = {row["name"]: row for row in grid["rows"]}
    assert [column["values"] for column in grid["columns"]] == ["1..8", "9..16", "600"]
    assert rows["m:layer"]["found"] == [3, 0, 0] and rows["m:layer"]["missed"] == [0, 0, 12]
    assert {name: row["state"] for name, row in rows.items()} == {
        "m:layer": "loaded",
        "m:scale": "loaded in part",
        "m:old": "stale",
        "m:late": "not imported",
    }
    assert {name: row["calls"] for name, row in rows.items()} == {"m:layer": 12, "m:scale": 0, "m:old": 0, "m:late": 0}


def test_without_stats_nothing_is_said_of_what_is_loaded(tmp_path: Path) -> None:
    ledger = ledger_facts.read([written(tmp_path, MISS)], DIGEST)
    grids = a_grid(ledger)
    ledger_facts.annotate(grids, ledger_facts.facts(ledger, DIGEST, 4))
    assert {row["state"] for row in grids[0]["rows"]} == {""}


def test_a_choice_that_was_missed_is_the_kernel_s(tmp_path: Path) -> None:
    ledger = ledger_facts.read([written(tmp_path, stats())], DIGEST)
    grids = a_grid(ledger)
    ledger_facts.annotate(grids, ledger_facts.facts(ledger, DIGEST, 5))
    rows = {row["name"]: row for row in grids[0]["rows"]}
    assert rows["m:scale"]["calls"] == 2 and rows["m:layer"]["state"] == "loaded in part"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "list where"),
        ("{}", "it has no total"),
        (json.dumps(stats(bundles=[3])), "int where digest"),
        (json.dumps(stats(bundles=[{"digest": 3}])), "digest is int"),
        (json.dumps(stats(graphs=[{}])), "it has no digest"),
        (json.dumps(stats(misses=[{"kind": "graph"}])), "it has no name"),
        (json.dumps(stats(total={"graph": "5"})), "no whole number"),
        (json.dumps(stats(graphs=[{"digest": DIGEST, "primed": 0, "found": {"g1": []}, "stale": {}}])), "whole number"),
        (json.dumps(stats(bundles=[], graphs=[])), "found none"),
    ],
)
def test_what_is_no_ledger(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "ledger"
    path.write_text(text)
    with pytest.raises(DeclarationError, match=words):
        ledger_facts.read([path], DIGEST)


def test_a_ledger_of_another_bundle(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match=f"bundle {'f' * 16}.*{DIGEST[:16]}, {OTHER[:16]}"):
        ledger_facts.read([written(tmp_path, stats())], "f" * 64)
    with pytest.raises(DeclarationError, match="nowhere"):
        ledger_facts.read([tmp_path / "nowhere"], DIGEST)
