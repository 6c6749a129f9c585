"""How long a start took and what aot-cache counted in it, compared with an earlier start."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

Json = Any


BEGAN = time.perf_counter()
"""Import this module first, so that the time includes all other imports."""


class Clock:
    """Seconds from the import of this module to each stage of a start."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def mark(self, stage: str) -> None:
        self.seconds[stage] = round(time.perf_counter() - BEGAN, 3)


def record(clock: Clock, stats: Json) -> Json:
    """The contents of a `--record` file: the stages, and the counts of `aot_cache.stats()` now."""
    events = {kind: count for kind, count in stats["total"].items() if count}
    in_capture = {f"{kind}, in a capture": count for kind, count in stats["in_capture"].items() if count}
    return {
        "name": "with a bundle" if stats["bundles"] else "no bundle",
        "seconds": clock.seconds,
        "events": {**events, **in_capture, "misses": len(stats["misses"])},
    }


def read(path: Path) -> Json:
    """Read a file that `--record` wrote.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no record of a start.
    """
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not {"name", "seconds", "events"} <= found.keys():
        raise ValueError(f"{path} is no record of a start: write one with --record")
    return found


def table(now: Json, earlier: Json | None = None) -> str:
    """A text table: stages in seconds, then events. Rows that neither start has are left out."""
    columns = [now] if earlier is None else [now, earlier]
    lines = [f"{'':28}" + "".join(f"{column['name']:>16}" for column in columns)]
    for part, missing, form in (("seconds", "-", "{:.2f} s"), ("events", "0", "{}")):
        for name in dict.fromkeys(name for column in columns for name in column[part]):
            values = [form.format(column[part][name]) if name in column[part] else missing for column in columns]
            lines.append(f"{name:28}" + "".join(f"{value:>16}" for value in values))
    return "\n".join(lines)
