"""A kernel is what its source says, however Python comes to it: built in one form of a package, it hits in all others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import packaged
import pytest
from limits import HANGS

from aot_cache.store import read_bundle

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Folder:
    """A recipe, the package that it needs in every form, and what was built."""

    path: Path
    forms: dict[str, Path]

    def run(self, form: Path | None, *command: object) -> subprocess.CompletedProcess[str]:
        """A fresh process that has the package in some form."""
        path = [ROOT, ROOT / "tests", self.path / "recipe", *([form] if form is not None else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "CUDA_VISIBLE_DEVICES": ""}
        return subprocess.run(
            [sys.executable, *map(str, command)],
            env={**environment, "TRITON_CACHE_DIR": str(self.path / "triton")},
            cwd=self.path,
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=False,
        )

    def build(self, form: Path | None, recipe: str = "packaged_recipe:recipe", store: str = "store") -> Any:
        """(exit code, what the build says, its error)."""
        command = ("build", "--json", "--workers", 1, "--target", "h200", "--store", store, "--model", recipe)
        done = self.run(form, "-m", "aot_cache", *command)
        said = json.loads(done.stdout).get("bundles", [None])[0]
        return done.returncode, said, next((line for line in done.stderr.splitlines() if "error: " in line), "")

    def serve(self, form: Path, bundle: str, module: str = "pack.kernels") -> dict[str, Any]:
        done = self.run(form, ROOT / "tests" / "packaged_child.py", bundle, module)
        assert done.returncode == 0, done.stderr[-4000:]
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    path = tmp_path_factory.mktemp("packaged")
    (path / "recipe").mkdir()
    (path / "recipe" / "packaged_recipe.py").write_text(packaged.RECIPE)
    return Folder(path, {name: make(path / name) for name, make in packaged.FORMS.items()})


@pytest.fixture(scope="module")
def built(folder: Folder) -> Any:
    code, said, error = folder.build(folder.forms["editable"])
    assert code == 0, error
    return said


@pytest.mark.parametrize("form", packaged.FORMS)
def test_what_was_built_of_one_form_hits_in_every_form(form: str, folder: Folder, built: Any) -> None:
    facts = folder.serve(folder.forms[form], built["path"])
    assert str(folder.path / form) in facts["file"], "it is this form that was imported"
    assert facts["asked"] > 0 and facts["missed"] == [] and facts["stale"] == {}


def test_a_zip_builds_the_same_bundle_and_an_edited_one_another(folder: Folder, built: Any) -> None:
    code, said, error = folder.build(folder.forms["zip"])
    assert (code, said["digest"], said["compiled"], said["nothing_to_do"]) == (0, built["digest"], 0, False), error
    assert folder.build(folder.forms["zip"])[1]["nothing_to_do"]
    packaged.archive(folder.path / "zip", packaged.KERNEL.replace("constexpr(3)", "constexpr(4)"))
    try:
        code, said, error = folder.build(folder.forms["zip"])
    finally:
        packaged.archive(folder.path / "zip")
    assert code == 0 and not said["nothing_to_do"] and said["digest"] != built["digest"], error


def test_a_kernel_without_its_source_is_named_and_the_rest_is_built(folder: Folder) -> None:
    form = packaged.compiled_only(folder.path / "compiled")
    code, said, _ = folder.build(form, store="other")
    (failure,) = said["failed"]
    assert (code, failure["kernel"], said["units"]) == (4, "case packaged", 1)
    assert failure["error"].startswith(
        "at n=1: kernel pack.kernels:times has no source text, which Triton compiles from: only compiled code of "
        "kernels.py is installed; hint: install its package with its .py files"
    )
    assert read_bundle(Path(said["path"])).manifest["kernels"][0]["name"] == "packaged_recipe:own"


def test_a_recipe_that_imports_it_at_once_says_so_too(folder: Folder) -> None:
    (folder.path / "recipe" / "at_once.py").write_text(f"from pack.kernels import run\n{packaged.RECIPE}")
    form = packaged.compiled_only(folder.path / "compiled_too")
    code, said, error = folder.build(form, "at_once:recipe", store="other")
    assert (code, said) == (3, None)
    assert error.startswith(
        "error: kernel pack.kernels:times has no source text, which Triton compiles from: only compiled code of"
    )


CELLS = '''\
import linecache

import torch
import triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, declare

CELL = """{lead}@triton.jit
def times(x, n, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 5, mask=at < n)
"""
NAME = {name!r}
if {kept}:  # as IPython does: no file, and the text of the cell where `inspect` looks
    linecache.cache[NAME] = (len(CELL), None, CELL.splitlines(True), NAME)
exec(compile(CELL, NAME, "exec"), globals())


def run(n, device):
    x = torch.empty(n * 16, device=device)
    times[(1,)](x, x.numel(), WIDTH=64)


@declare(n=Range(1, 4))
def cell(n):
    return Call(run, n, "cuda")


recipe = Recipe("cells", [cell])
'''


def test_a_kernel_of_a_notebooks_cell(folder: Folder) -> None:
    """Served out of another cell, whose number, file and lines are others."""
    module = folder.path / "recipe" / "cells.py"
    module.write_text(CELLS.format(lead="", name="<ipython-input-1-0a1b2c3d4e5f>", kept=True))
    code, said, error = folder.build(None, "cells:recipe")
    assert (code, said["units"]) == (0, 1), error
    for name in ("<ipython-input-7-ffffffffffff>", str(folder.path / "ipykernel_77" / "1234.py")):
        module.write_text(CELLS.format(lead="import math\n\n\n", name=name, kept=True))
        facts = folder.serve(folder.path / "recipe", said["path"], "cells")
        assert facts["asked"] > 0 and facts["missed"] == [] and facts["stale"] == {}
    module.write_text(CELLS.format(lead="", name="<string>", kept=False))
    code, said, error = folder.build(None, "cells:recipe")
    assert (code, said) == (3, None)
    assert error.startswith(
        "error: kernel cells:times has no source text, which Triton compiles from: it was executed as <string>"
    )
