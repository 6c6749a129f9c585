"""What all tests share."""

from __future__ import annotations

import compileall
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
from limits import HANGS, PATIENCE

if TYPE_CHECKING:
    from aot_cache.store import Store

# No test of ours asserts on time: a busy machine must not fail one.
hypothesis.settings.register_profile("aot-cache", deadline=None, print_blob=True)
hypothesis.settings.load_profile("aot-cache")

GPU_TESTS = Path(__file__).parent / "gpu"

# A developer's own AOT_CACHE* variables would change what the tests see, fixtures of any scope included.
for _name in [name for name in os.environ if name.startswith("AOT_CACHE")]:
    del os.environ[_name]
os.environ["AOT_CACHE_UNTESTED"] = "1"  # whether a release works is for the tests to say, not for the table

# Each source is compiled once in a run: by the compilers in this folder, which ask the real ones. Workers and children inherit.
COMPILED = "" if "AOT_TESTS_COMPILED" in os.environ else tempfile.mkdtemp(prefix="aot-tests-compiled-")
if COMPILED:
    os.environ["AOT_TESTS_COMPILED"] = COMPILED
    os.environ["PATH"] = os.pathsep.join([str(Path(__file__).parent / "compilers"), os.environ.get("PATH", os.defpath)])

    # The same for what hundreds of processes import, which may be told to write no bytecode.
    compileall.compile_dir(Path(__file__).parents[1] / "aot_cache", quiet=2)

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts what runs in its background so, and all children inherit it: a Ctrl-C of a test would reach nobody.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Two at a time: tests of a file share costly fixtures and stay in one process, and so do all of tests/graphs."""
    from xdist.scheduler import LoadFileScheduling

    class ByFixture(LoadFileScheduling):  # type: ignore[misc]  # it has no types
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "graphs" if "/graphs/" in file else file

    return ByFixture(config, log)


def pytest_sessionfinish() -> None:
    """What was compiled goes with the run, which is over where it began."""
    if COMPILED:
        shutil.rmtree(COMPILED, ignore_errors=True)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Everything under tests/gpu is marked `gpu`, and what is marked is skipped where there is no GPU.

    A report in XML says whose contract a test holds, which `tools/check_torch` reads.
    """
    for item in items:
        for mark in item.iter_markers("contract"):
            item.user_properties += [("contract", module) for module in mark.args]
        if PATIENCE != 1:
            item.add_marker(pytest.mark.timeout(float(config.getini("timeout")) * PATIENCE), append=False)
        if GPU_TESTS in item.path.parents:
            item.add_marker("gpu")
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return  # nobody asks: do not look
    missing = _why_no_gpu()
    for item in marked:
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))


@cache
def _why_no_gpu() -> str:
    """Why tests on a GPU cannot run here; empty when they can."""
    if not (Path("/dev/nvidiactl").exists() or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()):
        return "no GPU: no device file"
    # In a process of its own: asking initialises the driver, after which forked children cannot use the GPU, and this
    # process would import torch, which other tests check that they can do without.
    code = "import torch; print(torch.cuda.is_available(), torch.version.cuda or torch.version.hip)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS, check=False)
    if done.returncode:
        return f"no GPU: torch does not import: {done.stderr.strip().splitlines()[-1]}"
    found, toolkit = done.stdout.split()
    return "" if found == "True" else f"no GPU: torch (for {toolkit}) finds none"


@pytest.fixture(autouse=True)
def _settings_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test sets without saying so ends with it."""
    for name in [name for name in os.environ if name.startswith("AOT_CACHE") and name != "AOT_CACHE_UNTESTED"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AOT_CACHE_UNTESTED", "1")


@pytest.fixture
def clean_store(tmp_path: Path) -> Store:
    """An empty store in a folder of its own."""
    from aot_cache.store import Store

    return Store(tmp_path / "store")
