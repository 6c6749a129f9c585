"""Environments of `tools/check_torch`: one for each release of torch, made once and kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("torch", "triton", "transformers", "fla-core")
EXTRAS = ("qwen", "serve", "dev")


@dataclass(frozen=True)
class Spec:
    """What was asked for: `2.14`, or `2.13x3.6` for another Triton than torch's own."""

    torch: str
    triton: str = ""

    @classmethod
    def of(cls, text: str) -> Spec:
        torch, _, triton = text.partition("x")
        return cls(torch, triton)

    @property
    def text(self) -> str:
        return f"{self.torch}x{self.triton}" if self.triton else self.torch


@dataclass(frozen=True)
class Environment:
    """An interpreter with a torch in it; `before` are folders that go before what is installed there."""

    python: Path
    before: tuple[Path, ...] = ()

    def variables(self, **more: str) -> dict[str, str]:
        """The environment variables of what runs here: this checkout, whatever else is installed."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("AOT_CACHE", "PYTHON"))}
        path = os.pathsep.join(map(str, (ROOT, *self.before)))
        return {**kept, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", **more}

    def versions(self) -> dict[str, str]:
        """The releases of PACKAGES, and Python's."""
        code = (
            "import json, platform, sys; from importlib import metadata\n"
            "print(json.dumps({'python': platform.python_version(), **{n: metadata.version(n) for n in sys.argv[1:]}}))"
        )
        done = _run([str(self.python), "-c", code, *PACKAGES], self.variables())
        found: dict[str, str] = json.loads(done)
        return found


def environment(spec: Spec, given: Mapping[str, Path], cache: Path) -> Environment:
    """The environment for `spec`: the folder that was given, or CACHE/VERSION, which is made if it is not there."""
    folder = given.get(spec.text, cache / spec.text)
    found = Environment(folder / "bin" / "python")
    if not found.python.exists():
        if spec.text in given:
            raise SystemExit(f"check_torch: no {found.python}: --env wants the folder of a virtual environment")
        _make(spec, folder, found)
    _with_checkout(found)
    return found


def with_transformers(base: Environment, release: str, cache: Path) -> Environment:
    """`base` with another transformers, which is installed into a folder of its own."""
    folder = cache / f"transformers-{release}-{base.python.resolve().name}"
    if not (folder / "transformers").is_dir():
        _pip(base, "--target", str(folder), _pinned("transformers", release))  # with what it wants; torch is none of it
    return Environment(base.python, (folder,))


def _make(spec: Spec, folder: Path, made: Environment) -> None:
    """A virtual environment with that torch and the newest of everything else."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    print(f"check_torch: making {folder}", file=sys.stderr, flush=True)
    _run([sys.executable, "-m", "venv", str(folder)], dict(os.environ))
    _pip(made, _pinned("torch", spec.torch))
    _pip(made, _pinned("torch", spec.torch), "--editable", f"{ROOT}[{','.join(EXTRAS)}]")
    if spec.triton:
        _pip(made, "--no-deps", _pinned("triton", spec.triton))


def _with_checkout(found: Environment) -> None:
    """The names of recipes are an installed package's, and so aot-cache must be installed; its code is this checkout's."""
    code = "from importlib import metadata; print(len(metadata.entry_points(group='aot_cache.recipes')))"
    if _run([str(found.python), "-c", code], found.variables()).strip() == "0":
        _pip(found, "--no-deps", "--editable", str(ROOT))


def _pinned(package: str, release: str) -> str:
    """`2.14` → `torch==2.14.*`; a whole release as it is."""
    return f"{package}=={release}" if release.count(".") > 1 else f"{package}=={release}.*"


def _pip(where: Environment, *arguments: str) -> None:
    _run([str(where.python), "-m", "pip", "--disable-pip-version-check", "install", "-q", *arguments], dict(os.environ))


def _run(command: Sequence[str], variables: Mapping[str, str]) -> str:
    done = subprocess.run(command, env=dict(variables), capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"check_torch: {' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout
