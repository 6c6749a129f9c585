"""Folders with the sample modules in them, what is built there, and processes that serve what was built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limits import HANGS

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SAMPLES = ("sample_model.py", "sample_recipe.py", "sample_doomed.py")

# Two modules with the same names on the same lines, and code that differs in what is inlined only.
TWIN = """
import torch

import sample_model


def inner(x):
    return x * {factor}


@torch.compile
def twin(x):
    return inner(x) + sample_model.SHIFT
"""
TWINS = {"one": 2, "two": 3, "three": 2}


@dataclass(frozen=True)
class Project:
    """A folder with the sample modules; what is built there is kept there."""

    folder: Path

    @classmethod
    def at(cls, folder: Path) -> Project:
        folder.mkdir(parents=True)
        for name in SAMPLES:
            shutil.copy(HERE / name, folder)
        for name, factor in TWINS.items():
            (folder / f"sample_twin_{name}.py").write_text(TWIN.format(factor=factor))
        return cls(folder)

    def bundle(self, name: str = "sample-graphs") -> Path:
        return self.folder / "store" / "bundles" / f"{name}-cpu.safetensors"

    def build(
        self, spec: str = "sample_recipe:recipe", workers: int = 1, more: Sequence[str] = (), **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """`aot-cache build --json`, run in the project's folder; what the tests serve tells more than a rehearsal."""
        command = "-m aot_cache build --target cpu --no-rehearse --store store --json --model".split()
        return subprocess.run(
            [sys.executable, *command, spec, "--workers", str(workers), *more],
            env={**_environment(), "PYTHONPATH": str(ROOT), **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )

    def serve(self, script: str, bundle: Path, **environment: str) -> dict[str, Any]:
        """Run `script` with this folder's modules, a bundle and empty caches; returns the JSON that it says last."""
        with tempfile.TemporaryDirectory(prefix="aot-cache-tests-") as scratch:
            done = subprocess.run(
                [sys.executable, "-c", script],
                env={
                    **_environment(),
                    "PYTHONPATH": os.pathsep.join(map(str, (self.folder, HERE, HERE.parent, ROOT))),
                    "TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor",
                    "AOT_CACHE": str(bundle),
                    "AOT_CACHE_STRICT": "1",
                    **environment,
                },
                cwd=scratch,
                capture_output=True,
                text=True,
                timeout=HANGS,
                check=False,
            )
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


def _environment() -> dict[str, str]:
    ours = ("AOT_CACHE", "TORCHINDUCTOR_", "TORCH_COMPILE", "TORCHDYNAMO_", "TRITON_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "AOT_CACHE_UNTESTED": "1"}  # as in tests/conftest.py


# --- what a fact says -------------------------------------------------------------------------------------------------

CLOSE = 1e-5


def hit(fact: dict[str, Any]) -> bool:
    """Nothing was traced or compiled, by the ledger and by Dynamo's own count, and the result is right."""
    assert not fact["error"], fact
    assert fact["distance"] < CLOSE, f"a wrong result: {fact}"
    return not (fact["frame"] or fact["graph_compile"] or fact["dynamo"])


def found(fact: dict[str, Any], graphs: int = 1) -> bool:
    """A hit that came from the bundle, and not from what this process has had before."""
    return hit(fact) and fact["graph"] == graphs


def missed(fact: dict[str, Any]) -> bool:
    """Dynamo traced it, no graph of the bundle ran, and the result is right."""
    assert not fact["error"], fact
    assert fact["distance"] < CLOSE, f"a wrong result: {fact}"
    return fact["frame"] >= 1 and fact["dynamo"] >= 1 and fact["graph"] == 0
