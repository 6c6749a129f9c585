"""Other packages' functions through the recipes of tests/third_party: those whose package is here, against the record."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from build_third_party import lines, table
from third_party_packages import FOLDER, PACKAGES

ROOT = Path(__file__).parents[1]
RECORD = json.loads((ROOT / "artifacts" / "measurements" / "third_party_2core.json").read_text())
BUILT = {"liger"}
"""These are compiled, too: it takes seconds. Of the others it is looked at what would be."""
MODULES = {"liger-kernel": "liger_kernel", "fla-core": "fla"}
"""What a package is imported as, where that is not its name."""


def build(folder: Path, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "aot_cache",
            "build",
            "--target",
            "h200",
            "--store",
            str(folder / "store"),
            *arguments,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(FOLDER)]), "CUDA_VISIBLE_DEVICES": ""},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("recipe", PACKAGES)
def test_what_is_built_is_what_the_record_says(recipe: str, tmp_path: Path) -> None:
    package = PACKAGES[recipe].distribution
    if importlib.util.find_spec(MODULES.get(package, package)) is None:
        pytest.skip(f"{package} is not installed")
    told = ["--model", f"{recipe}:recipe", "--json"]
    if recipe in BUILT:
        (found,) = build(tmp_path, *told)["bundles"]
        assert found["compiled"] == found["units"] and found["covered"] == found["declared"]
    else:
        (found,) = build(tmp_path, *told, "--show-plan")["plans"]
    assert found["units"] > 0 and not found["failed"] and found["graphs" if recipe in BUILT else "calls"] in (0, [])
    (recorded,) = [one for one in RECORD["builds"] if (one["recipe"], one["target"]) == (recipe, "h200")]
    if importlib.metadata.version(package) == recorded["version"]:
        assert found["units"] == recorded["specializations"]


def test_every_recipe_is_short_and_recorded() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(PACKAGES) == {one["recipe"] for one in RECORD["builds"]}
    assert {recipe: lines(recipe) for recipe in PACKAGES if lines(recipe) > 15} == {}


def test_no_failure_of_the_record_is_ours() -> None:
    ours = [one["recipe"] for one in RECORD["builds"] for failed in one["failures"] if failed["whose"] == "ours"]
    assert ours == []


def test_what_is_published_is_what_was_recorded() -> None:
    published = (ROOT / "docs" / "third-party.md").read_text()
    assert "\n".join(table(RECORD["builds"])) in published, (
        "tools/bench/build_third_party.py prints the table for docs/third-party.md"
    )
