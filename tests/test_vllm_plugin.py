"""The vLLM plug-in beside a small package with vLLM's names, processes and order of steps, and a real bundle for the CPU.

That vLLM itself has these names and this order is what `test_vllm_contract.py` holds.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS

from aot_cache.engines.vllm import plugin

ROOT = Path(__file__).parents[1]
FAKE = Path(__file__).parent / "fake_vllm"
Json = Any
OURS = "LOG vllm.aot_cache"


def environment(folder: Path, package: Path = FAKE, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AOT_CACHE")}
    paths = os.pathsep.join(map(str, [package, ROOT]))
    caches = {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton"}
    return {**kept, **caches, "PYTHONPATH": paths, "AOT_CACHE_UNTESTED": "1", **more}


def built(folder: Path, recipe: str, package: Path = FAKE) -> Path:
    """A bundle of what a stand-in serves, for the CPU."""
    out = folder / "bundle.safetensors"
    asked = ["--model", recipe, "--target", "cpu", "--store", str(folder), "--out", str(out)]
    command = [sys.executable, "-m", "aot_cache", "build", *asked, "--no-rehearse"]
    done = subprocess.run(
        command, env=environment(folder, package), capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built(tmp_path_factory.mktemp("bundle"), "fake_vllm_model:recipe")


def serve(folder: Path, method: str, **more: str) -> tuple[Json, list[str]]:
    """(what the server printed, the lines of its log)."""
    command = [sys.executable, str(FAKE / "server.py"), method]
    ran = subprocess.run(
        command, env=environment(folder, **more), capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout), [line for line in ran.stderr.splitlines() if "aot" in line.lower()]


EXPECTED = [[round(math.cos(3 * n) + 1, 4) for n in range(size)] for size in (4, 9, 16)]


def rounded(served: list[list[float]]) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in served]


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_a_server_with_the_plug_in(bundle: Path, tmp_path: Path, method: str) -> None:
    """Nothing is traced, one line is logged, the API server loads nothing and shows the worker's ledger."""
    found, log = serve(tmp_path, method, AOT_CACHE=str(bundle), TMPDIR=str(tmp_path))
    worker = found["worker"]
    assert worker["said"] == "compilation times" and rounded(worker["served"]) == EXPECTED
    assert worker["frames"] == 0, "Dynamo's own counter"
    assert worker["stats"]["sealed"] and worker["stats"]["total"]["graph"] > 0
    assert not any(worker["stats"]["total"][kind] for kind in ("frame", "graph_compile", "rejected_bundle"))
    assert not list(tmp_path.glob("inductor/**/*.so"))
    assert found["exit"] == 0
    (line,) = [line for line in log if OURS in line]
    assert line.startswith(f"{OURS} INFO aot-cache is ready: ") and "1 of 1 compiled graphs" in line
    assert "aot_cache.engines.vllm.plugin" in found["api server"]
    assert not {"aot_cache.runtime.session", "aot_cache.store.bundle"} & set(found["api server"])
    assert not found["torch"]
    lines = [line for line in found["metrics"].splitlines() if not line.startswith("#")]
    total = {
        line.split("{")[1].split('"')[1]: float(line.rpartition(" ")[2]) for line in lines if "events_total" in line
    }
    assert total["rejected_bundle"] == 0 and total["frame"] == 0 and "compile" in total
    assert [line.rpartition(" ")[2] for line in lines if line.startswith("aot_cache_sealed")] == ["1.0"]
    assert not list(tmp_path.glob("aot-cache-stats-*")), "the folder of the ledgers stays"


def test_nothing_happens_without_a_bundle(tmp_path: Path) -> None:
    found, log = serve(tmp_path, "spawn")
    worker = found["worker"]
    assert (worker["loaded"], worker["patched"], log) == (False, False, [])
    assert "aot_cache" not in found["metrics"]
    assert found["api server"] == ["aot_cache", "aot_cache.engines", "aot_cache.engines.vllm", *found["api server"][3:]]
    assert worker["frames"] > 0 and rounded(worker["served"]) == EXPECTED


def test_a_policy_alone_arms_the_guard(tmp_path: Path) -> None:
    found, log = serve(tmp_path, "spawn", AOT_CACHE_POLICY="observe")
    assert found["worker"]["stats"]["total"]["frame"] > 0 and rounded(found["worker"]["served"]) == EXPECTED
    (line,) = [line for line in log if OURS in line]
    assert "serves without a bundle" in line


def test_a_bundle_that_cannot_be_used_is_one_warning(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no bundle")
    found, log = serve(tmp_path, "spawn", AOT_CACHE=str(broken))
    assert rounded(found["worker"]["served"]) == EXPECTED and found["exit"] == 0
    assert len([line for line in log if "AotCacheWarning" in line]) == 1
    assert len([line for line in log if "(1 refused)" in line]) == 1


def test_strict_is_said_and_vllm_still_serves(tmp_path: Path) -> None:
    found, log = serve(tmp_path, "spawn", AOT_CACHE=str(tmp_path / "none"), AOT_CACHE_STRICT="1")
    assert rounded(found["worker"]["served"]) == EXPECTED and found["exit"] == 0
    assert any("LOG vllm.aot_cache WARNING aot-cache: no bundle" in line for line in log)


@pytest.mark.parametrize("missing", ["initialize_from_config", "Worker"])
def test_a_step_that_vllm_no_longer_has_is_one_warning(bundle: Path, tmp_path: Path, missing: str) -> None:
    moved = FAKE / "vllm" / "v1" / "worker" / "gpu_worker.py"
    package = tmp_path / "moved"
    subprocess.run(["cp", "-r", str(FAKE), str(package)], check=True)
    (package / moved.relative_to(FAKE)).write_text(moved.read_text().replace(missing, f"{missing}_of_old"))
    code = (
        "import logging; logging.basicConfig(format='LOG %(name)s %(levelname)s %(message)s');"
        "from vllm.plugins import load_general_plugins; load_general_plugins();"
        "import vllm.v1.worker.gpu_worker, aot_cache; print(len(aot_cache.stats()['bundles']))"
    )
    given = environment(tmp_path, AOT_CACHE=str(bundle)) | {"PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=given, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "1"), ran.stderr
    (line,) = [line for line in ran.stderr.splitlines() if "vllm.aot_cache" in line]
    assert "WARNING" in line and missing in line


def test_whatever_our_part_raises_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "aot_cache", None)  # an import that fails
    plugin._ready(None)
    plugin._seal(None)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]


STUB = """
import sys
from aot_cache.upstream.hooks import triton_launcher
triton_launcher._stub_libcuda(sys.argv[1], triton_launcher.utils_source())
"""
API_SERVER = """
import ctypes, sys
from vllm.plugins import load_general_plugins
load_general_plugins()
ctypes.CDLL(f"{sys.argv[1]}/libcuda.so.1", ctypes.RTLD_GLOBAL)
from triton.backends.nvidia.driver import CudaUtils
CudaUtils()
assert "aot_cache.runtime.session" not in sys.modules
"""


def python(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", *arguments]
    return subprocess.run(
        command, env=environment(folder, **more), capture_output=True, text=True, timeout=HANGS, check=False
    )


def test_the_api_server_needs_no_c_compiler(tmp_path: Path) -> None:
    """An API server whose model asks Triton for the GPU when it is imported, as Qwen3.5's does: seen on an H200.

    There is no driver here: its library is one with the same names.
    """
    out = tmp_path / "bundle.safetensors"
    asked = ["--model", "sample_at_start:recipe", "--target", "h200", "--store", str(tmp_path), "--out", str(out)]
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT)])
    built = python(tmp_path, "-m", "aot_cache", "build", *asked, "--no-rehearse", PYTHONPATH=paths)
    assert built.returncode == 0, built.stdout + built.stderr
    assert python(tmp_path, "-c", STUB, str(tmp_path)).returncode == 0
    server = ("-c", API_SERVER, str(tmp_path))
    empty = {"TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": f"{tmp_path}/empty"}
    started = python(tmp_path, *server, AOT_CACHE=str(out), CC="/bin/false", **empty)
    assert started.returncode == 0, started.stderr
    without = python(tmp_path, *server, CC="/bin/false", **empty)
    assert "CalledProcessError" in without.stderr
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(out.read_bytes()[:-1000])
    compiled = python(tmp_path, *server, AOT_CACHE=str(broken), **empty)
    assert compiled.returncode == 0, "a bundle that cannot be read: gcc is run"
