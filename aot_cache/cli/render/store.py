"""The output of `gc`. Formats only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aot_cache.cli.render.terminal import line, size, table

Facts = Mapping[str, Any]


def removals(facts: Facts) -> None:
    """Print what goes and why, what stays, and what a person should know."""
    rows = [(row["what"], row["count"], size(row["bytes"]), row["why"]) for row in facts["removed"]]
    if rows:
        table(("what", "count", "size", "why"), rows, ("count", "size"))
        line()
    for row in facts["removed"]:
        for path in row["paths"]:
            line(f"{row['what']}: {path}")
    kept = ", ".join(f"{count} {what}" for what, count in facts["kept"].items() if count)
    verb = "would remove" if facts["dry_run"] else "removes"
    what = size(facts["bytes"]) if rows else "nothing"
    line(f"{facts['store']}: {verb} {what}; stays: {kept or 'nothing'} ({size(facts['kept_bytes'])})")
    for user in facts["in_use_by"]:
        line(f"in use by {user}: nothing is removed while it runs")
    for note in facts["notes"]:
        line(f"note: {note}")
