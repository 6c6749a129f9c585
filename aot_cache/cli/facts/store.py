"""Facts about what is removed from a store, as plain JSON-able dicts. Imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aot_cache.store import Json
from aot_cache.store.gc import Plan

Facts = dict[str, Json]


def removals(plan: Plan, store: Path, users: Sequence[str], dry_run: bool) -> Facts:
    """What goes and what stays.

    Args:
        users: who builds with the store now.
    """
    rows: list[Facts] = [
        {
            "what": removal.what,
            "count": len(removal.paths),
            "bytes": removal.bytes,
            "why": removal.why,
            "paths": [str(path) for path in removal.paths] if removal.what in ("bundles", "temporary folders") else [],
        }
        for removal in plan.removals
    ]
    return {
        "store": str(store),
        "dry_run": dry_run,
        "removed": rows,
        "bytes": sum(removal.bytes for removal in plan.removals),
        "kept": dict(plan.kept),
        "kept_bytes": plan.kept_bytes,
        "in_use_by": list(users),
        "notes": list(plan.notes),
    }
