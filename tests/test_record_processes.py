"""`aot-cache record` of programs with several processes that end in all the ways that engines' processes end.

The kernels are compiled by Triton for a GPU that is not here, and not run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS

from aot_cache.artifact.plan import Plan, merge

HERE = Path(__file__).parent
ENDS = {
    "itself": ["return", "raise", "os._exit", "killed", "terminated"],
    "fork": ["return", "raise", "os._exit", "killed", "terminated"],
    "os.fork": ["return", "killed"],
    "spawn": ["return", "killed"],
    "forkserver": ["return"],
}


def record(folder: Path, where: str, end: str, *options: str, first: Path | None = None) -> Plan:
    """The plan of the program. `first` is put on its import path, before ours."""
    out = folder / "seen.plan.json"
    paths = os.pathsep.join([*([str(first)] if first else []), str(HERE.parent), str(HERE)])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "aot_cache", "record", "--out", str(out), *options, "--"]
        + [sys.executable, "-W", "ignore", str(HERE / "recorded_program.py"), where, end],
        env={**os.environ, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(folder / "triton")},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert out.exists(), done.stderr
    return Plan.read(out)


def blocks(plan: Plan, kernel: str = "scale") -> list[int]:
    units = [unit for unit in plan.units if unit.kernel.endswith(f":{kernel}")]
    return sorted(unit.specialization[-1]["t"][1] for unit in units)


@pytest.mark.parametrize(("where", "end"), [(where, end) for where, ends in ENDS.items() for end in ends])
def test_what_was_launched_is_in_the_plan(tmp_path: Path, where: str, end: str) -> None:
    plan = record(tmp_path, where, end)
    assert blocks(plan) == ([16] if where == "itself" else [16, 32])
    assert plan.origin == "recorded" and plan.recipe == "seen"


@pytest.mark.parametrize(("which", "expected"), [("launched", [128]), ("chosen", [128]), ("all", [64, 128, 256])])
def test_which_candidates_are_recorded(tmp_path: Path, which: str, expected: list[int]) -> None:
    """Triton knows its choice and launches that alone, as it does when its disk cache has it."""
    plan = record(tmp_path, "itself", "return", "--candidates", which)
    assert blocks(plan, "tuned") == expected
    ((number, candidate),) = {
        tuple(v) for unit in plan.units for v in unit.via if v[0] >= 0 and unit.specialization[-1]["t"][1] == 128
    }
    assert plan.tunings[number].choice == plan.tunings[number].candidates[candidate]


def test_ranks_that_chose_differently(tmp_path: Path) -> None:
    """Each rank of a job measures for itself. What the first chose is for all, and what the other chose for that rank."""
    plan = record(tmp_path, str(tmp_path / "ranks"), "return", "--candidates", "chosen")
    assert blocks(plan) == [16, 32] and blocks(plan, "tuned") == [64, 128]
    chosen = {tuple(tuning.ranks): tuning.choice and tuning.choice["BLOCK"] for tuning in plan.tunings}
    assert chosen == {(): 64, (1,): 128}
    assert merge([plan, plan]).tunings == plan.tunings


@pytest.mark.parametrize("theirs", ["that runs the next one", "that ends"])
def test_programs_with_a_sitecustomize_of_their_own(tmp_path: Path, theirs: str) -> None:
    """One that runs the environment's own, as ours does: each finds the other. `tools/gpu/jit_trace` does so."""
    site = tmp_path / "site"
    site.mkdir()
    lines = [f"import sys, pathlib; pathlib.Path({str(tmp_path)!r}, 'ran').open('a').write('x')"]
    if theirs == "that runs the next one":
        lines += ["import importlib.machinery, importlib.util"]
        lines += [
            f"spec = importlib.machinery.PathFinder.find_spec('sitecustomize', [p for p in sys.path if p != {str(site)!r}])"
        ]
        lines += ["if spec: spec.loader.exec_module(importlib.util.module_from_spec(spec))"]
    (site / "sitecustomize.py").write_text("\n".join(lines))
    assert blocks(record(tmp_path, "fork", "return", first=site)) == [16, 32]
    assert (tmp_path / "ran").exists()
