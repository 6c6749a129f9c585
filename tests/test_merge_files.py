"""`aot-cache merge`: plans of several processes and what was missed, as one plan."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aot_cache.artifact.plan import CallPlan, Plan, Unit
from aot_cache.builder.merge_files import merge_files
from aot_cache.errors import DeclarationError

DRAFT: dict[str, Any] = {"source": "a" * 64, "options": {}, "overrides": {}, "via": [[-1, -1]]}


def plan(path: Path, *blocks: int, target: str = "h100", **more: Any) -> Path:
    units = [Unit(kernel="m:k", specialization=[{"t": ["constexpr", block]}], **DRAFT) for block in blocks]
    whole = {"recipe": "r", "origin": "recorded", "closures": {"m:k": {}}, **more}
    Plan(target=target, units=units, **whole).write(path)
    return path


def missed(path: Path, **facts: Any) -> Path:
    line = {"aot-cache miss": 1, "kind": "kernel", "name": "no_such_module:k", "in_capture": False, "sealed": True}
    line |= {"action": "unsafe", "why": "new", "pid": 1, "seen": 1, "nearest": []}
    unit = {"kernel": "no_such_module:k", "source": "s", "specialization": [], "options": {}, "overrides": {}}
    path.write_text(json.dumps({**line, "unit": unit, **facts}) + "\n")
    return path


def blocks(found: Plan) -> list[int]:
    return sorted(unit.specialization[0]["t"][1] for unit in found.units)


def test_each_specialization_is_there_once(tmp_path: Path) -> None:
    merged = merge_files([plan(tmp_path / "a", 16, 32), plan(tmp_path / "b", 32, 64)])
    assert blocks(merged.plan) == [16, 32, 64] and (merged.misses, merged.uncovered) == (0, [])


def test_one_plan_stays_as_it_is(tmp_path: Path) -> None:
    path = plan(tmp_path / "a", 16)
    assert merge_files([path]).plan == Plan.read(path)


def test_a_miss_that_cannot_be_merged_is_named(tmp_path: Path) -> None:
    merged = merge_files([plan(tmp_path / "a", 16), missed(tmp_path / "m")])
    ((name, why),) = merged.uncovered
    assert (merged.misses, name) == (1, "no_such_module:k") and "can be imported" in why and blocks(merged.plan) == [16]


@pytest.mark.parametrize("case", ["no plan", "two targets", "calls", "no file"])
def test_what_cannot_be_merged(tmp_path: Path, case: str) -> None:
    call = CallPlan(function="m:f", line=1, id="i", mode="grad", wrapping={}, dynamic={}, hint={}, reached={})
    given, words = {
        "no plan": ([missed(tmp_path / "m")], "a plan among the files"),
        "two targets": ([plan(tmp_path / "a"), plan(tmp_path / "b", target="h200")], "one target"),
        "calls": ([plan(tmp_path / "a"), plan(tmp_path / "c", calls=[call])], "call signatures"),
        "no file": ([tmp_path / "none"], "cannot read"),
    }[case]
    with pytest.raises(DeclarationError, match=words):
        merge_files(given)
