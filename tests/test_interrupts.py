"""A build that is interrupted leaves no process behind, whatever it was at, and what it has done is kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS
from processes import MARK, left, marked

ROOT = Path(__file__).parents[1]
RECIPE = """
import torch
import triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, Values, declare, device

@triton.jit
def add(x, n, K: tl.constexpr):
    at = tl.program_id(0) * 64 + tl.arange(0, 64)
    tl.store(x + at, tl.load(x + at, mask=at < n) + K, mask=at < n)

@declare(k=Values(*range(150)))
def kernels(k):
    x = torch.empty(64, device="cuda")
    return Call(lambda: add[(1,)](x, 64, K=k))

FUNCTIONS = [torch.compile(eval(f"lambda x: torch.relu(x * {k}).sum(-1)")) for k in range(30)]

def case_of(number):
    return declare(name=f"g{number}", n=Range(2, 9))(lambda n: Call(FUNCTIONS[number], torch.ones(n, 8, device=device())))

of_kernels = Recipe("kernels", [kernels])
of_graphs = Recipe("graphs", [case_of(number) for number in range(30)])
"""


class Building:
    """A build in an own folder, all processes of which bear a mark."""

    def __init__(self, folder: Path, recipe: str, target: str) -> None:
        self.mark, self.folder = str(folder), folder
        (folder / "recipes.py").write_text(RECIPE)
        (folder / "tmp").mkdir()
        self.command = [
            sys.executable,
            "-m",
            "aot_cache",
            *f"build --model recipes:{recipe} --target {target}".split(),
        ]
        self.environment = {
            **os.environ, MARK: self.mark, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "CUDA_VISIBLE_DEVICES": "",
            "TMPDIR": str(folder / "tmp"),
        }  # fmt: skip
        self.process = subprocess.Popen(
            self.command, cwd=folder, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def wait_for(self, something: str) -> None:
        """Until a process of it has this in its command line, or, for a number, until so many objects are in the store."""
        while not self._there(something):
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.05)

    def _there(self, something: str) -> bool:
        if something.isdigit():
            return len(list((self.folder / "artifacts").rglob("*"))) > int(something)
        return any(something in line for line in marked(self.mark).values())

    def left(self) -> dict[int, str]:
        return left(self.mark)


def until_killed(building: Building) -> Iterator[Building]:
    yield building
    building.process.kill()
    building.process.communicate()


@pytest.fixture(autouse=True)
def hang_ups_arrive() -> Iterator[None]:
    """Whoever runs the tests with `nohup` has them ignored in all children."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[Building]:
    yield from until_killed(Building(tmp_path, "of_kernels", "h200"))


@pytest.fixture
def graphs(tmp_path: Path) -> Iterator[Building]:
    yield from until_killed(Building(tmp_path, "of_graphs", "cpu"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGKILL"])
def test_nothing_lives_on_while_a_compiler_runs(graphs: Building, name: str) -> None:
    """The C++ compiler is the child of a child of a child."""
    graphs.wait_for("cc1plus")
    graphs.process.send_signal(getattr(signal, name))
    _, err = graphs.process.communicate(timeout=HANGS)
    assert graphs.left() == {}
    if name == "SIGKILL":
        return  # nobody is left to say or clean up anything
    assert graphs.process.returncode == 128 + getattr(signal, name)
    assert err.strip().splitlines()[-2:] == [
        "error: interrupted",
        "hint: run it again to continue: what is done is kept",
    ]
    assert "Traceback" not in err and not list((graphs.folder / "tmp").glob("aot-cache-*"))


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_what_is_done_is_not_done_again(kernels: Building, name: str) -> None:
    kernels.wait_for("100")
    kernels.process.send_signal(getattr(signal, name))
    kernels.process.communicate(timeout=HANGS)
    assert kernels.left() == {}
    assert not list(kernels.folder.rglob("*.safetensors")), "nothing half-written"
    done = subprocess.run(
        [*kernels.command, "--json"],
        cwd=kernels.folder,
        env=kernels.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    (built,) = json.loads(done.stdout)["bundles"]
    assert built["units"] == 150 and built["compiled"] < 150


def test_housekeeping_leaves_a_build_alone_and_cleans_up_after_a_killed_one(kernels: Building) -> None:
    def gc(*words: str) -> tuple[int, dict[str, Any]]:
        command = [*kernels.command[:3], "gc", *words, "--json"]
        done = subprocess.run(
            command, cwd=kernels.folder, env=kernels.environment, capture_output=True, text=True, check=False
        )
        return done.returncode, json.loads(done.stdout)

    kernels.wait_for("100")
    code, found = gc("--max-size", "0")
    assert code == 3 and f"process {kernels.process.pid} (" in found["error"]["message"]
    kernels.process.kill()
    kernels.process.communicate()
    assert kernels.left() == {}
    assert list((kernels.folder / "tmp").glob("aot-cache-*"))
    code, found = gc()
    assert code == 0 and found["kept"]["objects"] > 20
    assert "temporary folders" in {row["what"] for row in found["removed"]}
    assert not list((kernels.folder / "tmp").glob("aot-cache-*"))
    subprocess.run(
        [*kernels.command, "-q"], cwd=kernels.folder, env=kernels.environment, capture_output=True, check=True
    )
    before = sorted((kernels.folder / "artifacts").rglob("*"))
    code, found = gc("--max-size", "0")
    gone = {path for path in before if not path.exists()}
    assert code == 0 and {path.parent.name for path in gone} == {"stamps"}, "the bundle names all that was compiled"


def test_further_signals_do_not_cut_the_cleanup_short(tmp_path: Path) -> None:
    """A closed terminal sends SIGHUP, and whoever closed it SIGTERM; a runtime may send SIGTERM again and again."""
    script = """
import os, signal, sys
from aot_cache.process_group import interruptible
from aot_cache.files import scratch
try:
    with interruptible() as came, scratch.folder() as folder:
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    sys.exit(128 + came[0])
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert (done.returncode, done.stderr) == (128 + signal.SIGHUP, "")
    assert not list(tmp_path.iterdir())


def test_a_worker_that_is_killed_takes_its_children_along(graphs: Building) -> None:
    graphs.wait_for("cc1plus")
    worker = next(pid for pid, line in sorted(marked(graphs.mark).items()) if "aot_cache.builder.worker" in line)
    os.kill(worker, signal.SIGKILL)
    _, err = graphs.process.communicate(timeout=HANGS)
    assert graphs.left() == {}
    assert graphs.process.returncode == 3 and "the build worker ended with exit code -9" in err
