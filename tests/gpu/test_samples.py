"""Every way in which a launch is made, on a real GPU: built without looking at it, loaded, launched, counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS

from aot_cache.builder.pipeline import Built, Request, build

TESTS = Path(__file__).resolve().parents[1]

LAUNCH = """
import json, sys
import aot_cache
report = aot_cache.load(sys.argv[1], strict=True) if sys.argv[1] else None
import torch
assert not torch.cuda.is_initialized(), "load initialised CUDA"
import triton.compiler
compiled = []
original = triton.compiler.compile
triton.compiler.compile = lambda *args, **kwargs: compiled.append(1) or original(*args, **kwargs)
import sample_kernels
from aot_cache.runtime import loader
from aot_cache.recipes.dimensions import enumerate_points
loader.arm("observe")
torch.zeros(1, device="cuda")
aot_cache.ready()
aot_cache.seal()
launched = 0
for case in sample_kernels.recipe.cases:
    for point in enumerate_points(case.dims).points[::3]:
        with case.modes():
            case.call(point)()
        launched += 1
torch.cuda.synchronize()
json.dump({"stats": aot_cache.stats(), "compiled": len(compiled), "points": launched}, sys.stdout)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    from aot_cache.runtime.host_gpu import native

    folder = tmp_path_factory.mktemp("gpu")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return build(Request(target=native()[0], store=folder / "store", model="sample_kernels:recipe"))


def launch(bundle: str, tmp_path: Path) -> dict[str, Any]:
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    done = subprocess.run(
        [sys.executable, "-c", LAUNCH, bundle],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_nothing_compiles_tunes_or_runs_gcc(built: Built, tmp_path: Path) -> None:
    assert built.failed == []
    found = launch(str(built.path), tmp_path)
    harmful = ("compile", "disk_hit", "tuning", "benchmark", "module_load", "gcc")
    assert {kind: found["stats"]["total"][kind] for kind in harmful} == dict.fromkeys(harmful, 0), found["stats"][
        "events"
    ]
    assert found["compiled"] == 0
    assert found["points"] > 30


def test_without_the_bundle_the_same_program_compiles(tmp_path: Path) -> None:
    found = launch("", tmp_path)
    assert found["compiled"] > 20
    assert found["stats"]["after_seal"]["compile"] == found["compiled"]


def test_a_recording_is_what_was_planned(built: Built, tmp_path: Path) -> None:
    """Recorded on the device at the same points: nothing that the plan lacks."""
    from aot_cache.artifact.plan import Plan, diff

    program = tmp_path / "program.py"
    program.write_text(LAUNCH)
    out = tmp_path / "recorded.json"
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
    }
    command = [
        sys.executable,
        "-m",
        "aot_cache",
        "record",
        "--out",
        str(out),
        "--",
        sys.executable,
        str(program),
        "",
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANGS, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    recorded, planned = Plan.read(out), Plan.read(built.path.with_suffix(".plan.json"))
    assert len(recorded.units) > 20
    different = diff(recorded, planned)
    assert different.only_left == [] and different.tunings_left == []
    assert recorded.target == planned.target
