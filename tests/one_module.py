"""A recipe that is one module's text, built for a GPU that is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from aot_cache.artifact import target as targets
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request

ROOT = Path(__file__).parents[1]


def built_for_h200(folder: Path, module: str, source: str) -> Built:
    """Write `source` as a module to `folder` and build the recipe in it, with that as the current folder."""
    (folder / f"{module}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))
        return pipeline.build(Request(target=targets.get("h200"), store=folder / "store", model=f"{module}:recipe"))
