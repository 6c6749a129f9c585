"""Facts about the misses of serving processes, as plain JSON-able dicts. Imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aot_cache.misses.describe import asked
from aot_cache.misses.file import Miss, Misses
from aot_cache.store import Json

Facts = dict[str, Json]


def misses(found: Misses, paths: Sequence[Path]) -> Facts:
    """The contents of misses files, most frequent misses first."""
    rows = [_row(miss) for miss in found.found]
    return {
        "kind": "misses",
        "paths": [str(path) for path in paths],
        "different": len(rows),
        "count": sum(row["count"] for row in rows),
        "in_capture": sum(row["in_capture"] for row in rows),
        "declarable": sum(bool(row["declare"]) for row in rows),
        "cut_off": found.cut_off,
        "misses": sorted(rows, key=lambda row: -row["count"]),
    }


def _row(miss: Miss) -> Facts:
    return {
        "kind": miss.kind,
        "name": miss.name,
        "count": miss.count,
        "in_capture": miss.in_capture,
        "sealed": miss.sealed,
        "actions": miss.actions,
        "why": miss.why,
        "asked": asked(miss),
        "place": miss.facts.get("place", ""),
        "declare": miss.facts.get("declare", ""),
        "points": miss.facts.get("points", {}),
        "nearest": miss.facts.get("nearest", []),
    }
