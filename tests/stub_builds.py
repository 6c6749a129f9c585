"""What a build has done, for tests of what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aot_cache.builder.pipeline import Built


def a_built(**more: Any) -> Built:
    """A build of one specialization for an H200, but for what is given."""
    counts = {"size": 9, "units": 1, "graphs": 0, "compiled": 1, "pruned": 0, "points": 1}
    rest = {"path": Path("b"), "digest": "d" * 64, "failed": [], "sampled": [], "seconds": 0.1}
    return Built(**{"target": "h200", **counts, **rest, **more})
