"""SGLang's plug-in beside a small package with SGLang's names, processes and order of steps, and a real bundle for the CPU.

That SGLang itself has these names and this order is what `test_sglang_contract.py` holds.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS
from test_vllm_plugin import built, environment

FAKE = Path(__file__).parent / "fake_sglang"
Json = Any
OURS = "LOG sglang.aot_cache"
SERVED = [
    [[round(step(n), 4) for n in range(size)] for size in (4, 9, 16)]
    for step in (lambda n: math.cos(3 * n) + 1, lambda n: math.sin(5 * n) - 1)
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("bundle"), "fake_sglang_model:recipe", FAKE)


def serve(folder: Path, package: Path = FAKE, **more: str) -> tuple[Json, list[str]]:
    """(what the server printed, our lines of its log)."""
    ran = subprocess.run(
        [sys.executable, str(package / "sglang_server.py")],
        env=environment(folder, package, **more),
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert found["exit"] == 0
    assert [[[round(x, 4) for x in row] for row in rows] for rows in found["served"]] == SERVED
    return found, [line for line in ran.stderr.splitlines() if "aot" in line.lower()]


def test_a_server_with_the_plug_in(bundle: Path, tmp_path: Path) -> None:
    """Target and draft: nothing is traced, one line is logged, and the API server loads nothing and shows the ledger."""
    found, log = serve(tmp_path, AOT_CACHE=str(bundle), TMPDIR=str(tmp_path))
    stats = found["stats"]
    assert found["frames"] == 0, "Dynamo's own counter"
    assert stats["sealed"] and stats["total"]["graph"] == 2 and not any(stats["after_seal"].values())
    assert not any(stats["total"][kind] for kind in ("frame", "graph_compile", "rejected_bundle"))
    (line,) = [line for line in log if OURS in line]
    assert line.startswith(f"{OURS} INFO aot-cache is ready: ") and "2 of 2 compiled graphs" in line
    assert not {"aot_cache.runtime.session", "aot_cache.store.bundle"} & set(found["ours"]) and not found["torch"]
    lines = [line for line in found["metrics"].splitlines() if not line.startswith("#")]
    assert [line.rpartition(" ")[2] for line in lines if line.startswith("aot_cache_sealed")] == ["1.0"]
    assert len([line for line in lines if "aot_cache" in line and 'kind="frame"' in line and line.endswith(" 0.0")]) > 0


def test_what_was_recorded_is_built_and_served(tmp_path: Path) -> None:
    """The three steps of docs/sglang.md, with no recipe: scheduler processes are recorded."""
    plan, out = tmp_path / "server.plan.json", tmp_path / "server.safetensors"
    record = ["record", "--out", str(plan), "--", sys.executable, str(FAKE / "sglang_server.py")]
    build = ["build", "--plan", str(plan), "--target", "cpu", "--store", str(tmp_path), "--out", str(out)]
    for command in (record, build):
        done = subprocess.run(
            [sys.executable, "-m", "aot_cache", *command],
            env=environment(tmp_path, FAKE),
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    found, log = serve(tmp_path / "empty", AOT_CACHE=str(out), AOT_CACHE_STRICT="1")
    assert found["frames"] == 0 and not any(found["stats"]["after_seal"].values())
    assert len([line for line in log if OURS in line and "2 of 2 compiled graphs" in line]) == 1


def test_nothing_happens_without_a_bundle(tmp_path: Path) -> None:
    found, log = serve(tmp_path)
    assert found["frames"] > 0 and not log and "aot_cache" not in found["metrics"]
    assert "aot_cache.upstream.patch" not in found["ours"]


def test_a_policy_alone_arms_the_guard(tmp_path: Path) -> None:
    found, log = serve(tmp_path, AOT_CACHE_POLICY="observe")
    assert found["stats"]["total"]["frame"] > 0
    (line,) = [line for line in log if OURS in line]
    assert "serves without a bundle" in line


def test_a_bundle_that_cannot_be_used_is_one_warning(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no bundle")
    _, log = serve(tmp_path, AOT_CACHE=str(broken))
    assert len([line for line in log if "AotCacheWarning" in line]) == 1
    assert len([line for line in log if "(1 refused)" in line]) == 1


def test_strict_is_said_and_sglang_still_serves(tmp_path: Path) -> None:
    _, log = serve(tmp_path, AOT_CACHE=str(tmp_path / "none"), AOT_CACHE_STRICT="1")
    assert any(f"{OURS} WARNING aot-cache: no bundle" in line for line in log)


@pytest.mark.parametrize(
    ("file", "step"),
    [("managers/scheduler.py", "class Scheduler"), ("model_executor/model_runner.py", "def init_cuda_graphs")],
)
def test_a_step_that_sglang_no_longer_has_is_one_warning(bundle: Path, tmp_path: Path, file: str, step: str) -> None:
    """It serves; the bundle is loaded where that step is still there."""
    package = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(FAKE), str(package)], check=True)
    name = step.split()[1]
    for path in package.rglob("*.py"):
        if path.name != "fake_sglang_model.py":
            path.write_text(path.read_text().replace(name, f"Old{name}"))
    assert f"Old{name}" in (package / "sglang" / "srt" / file).read_text()
    _, log = serve(tmp_path, package, AOT_CACHE=str(bundle))
    warned = [line for line in log if f"{OURS} WARNING" in line]
    assert warned and all(name in line for line in warned)
