"""What a build has imported: installed packages by their RECORD, wherever they are installed, and other files by content."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = """
import json, sys
from dataclasses import asdict
from aot_cache.builder import fingerprint
from aot_cache.builder.fingerprint import Inputs
before = json.loads(sys.argv[1])
if before:
    print(json.dumps(fingerprint.changed(Inputs(**before))))
else:
    import big, big.part, recipe
    print(json.dumps(asdict(fingerprint.inputs())))
"""


def run(*path: Path, before: Any = None) -> Any:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *path)))}
    command = [sys.executable, "-c", SCRIPT, json.dumps(before)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def layer(tmp_path: Path) -> Path:
    """A folder on the path in which a package is installed, as `pip install --target` does."""
    folder = tmp_path / "layer"
    (folder / "big").mkdir(parents=True)
    (folder / "big" / "__init__.py").write_text("")
    (folder / "big" / "part.py").write_text("")
    info = folder / "big-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: big\nVersion: 1.0\n")
    (info / "RECORD").write_text("big/__init__.py,sha256=x,0\nbig/part.py,sha256=y,0\nbig-1.0.dist-info/RECORD,,\n")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "recipe.py").write_text("")
    return folder


def test_what_is_installed_in_a_layer_is_not_hashed(layer: Path) -> None:
    recipes = layer.parent / "recipes"
    found = run(recipes, layer)
    assert found["packages"]["big"].startswith("1.0 ")
    mine = [path for path in found["files"] if path.startswith(str(layer.parent))]
    assert mine == [str(recipes / "recipe.py")]
    assert run(recipes, layer, before=found) == ""
    record = layer / "big-1.0.dist-info" / "RECORD"
    record.write_text(record.read_text().replace("sha256=y", "sha256=z"))
    assert run(recipes, layer, before=found) == "package big"
    (recipes / "recipe.py").write_text("1")
    assert run(recipes, before=found) == "package big"


def test_a_checkout_and_an_editable_install_are_hashed(layer: Path) -> None:
    """A checkout has metadata beside it, but nothing that says what is in its files."""
    (layer / "big-1.0.dist-info").rename(layer / "big.egg-info")
    (layer / "big.egg-info" / "METADATA").rename(layer / "big.egg-info" / "PKG-INFO")
    (layer / "big.egg-info" / "RECORD").unlink()
    (layer / "big.egg-info" / "top_level.txt").write_text("big\n")
    found = run(layer.parent / "recipes", layer)
    assert "big" not in found["packages"]
    assert {str(layer / "big" / "part.py"), str(layer / "big" / "__init__.py")} <= set(found["files"])


def test_an_editable_install_is_hashed(layer: Path) -> None:
    """Its metadata is where packages are installed, and its files are elsewhere."""
    site = layer.parent / "site"
    site.mkdir()
    (layer / "big-1.0.dist-info").rename(site / "big-1.0.dist-info")
    (site / "big-1.0.dist-info" / "RECORD").write_text("big.pth,,\n")
    (site / "big-1.0.dist-info" / "top_level.txt").write_text("big\n")
    found = run(layer.parent / "recipes", site, layer)
    assert "big" not in found["packages"] and str(layer / "big" / "part.py") in found["files"]
