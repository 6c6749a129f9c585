"""The ledgers of an engine's worker processes, for the process that answers `/metrics`: small files in one folder.

AOT_CACHE_STATS names the folder. A process writes its `stats()` there as PID.json at `ready`, at `seal`, and at each
event that is counted after that. Such an event is a compile, a load or a tuning, beside which a small file costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VARIABLE = "AOT_CACHE_STATS"


def write(folder: str, stats: Mapping[str, Any]) -> None:
    """Replace this process's file. A folder that cannot be written to is no error: these are metrics."""
    path = Path(folder, f"{os.getpid()}.json")
    with contextlib.suppress(OSError):
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(stats))
        os.replace(draft, path)


def read(folder: str) -> dict[int, dict[str, Any]]:
    """Process id → what it counted last. A file that is not readable (yet) is passed over."""
    out = {}
    for path in sorted(Path(folder).glob("*.json")):
        with contextlib.suppress(OSError, ValueError):
            out[int(path.stem)] = json.loads(path.read_text())
    return out
