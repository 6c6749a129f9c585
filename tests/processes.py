"""Processes that bear a mark in their environment: by it a test finds whatever a command has left, whoever its parent is now."""

from __future__ import annotations

import time
from pathlib import Path

MARK = "AOT_TESTS_INTERRUPTED"
SOON = 5.0
"""Seconds that what is left has to end by itself. Workers that noticed only at their next result took 7 to 22."""


def marked(mark: str) -> dict[int, str]:
    """Living processes that were begun with this mark → their command lines."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:100]
        except OSError:  # it has ended, or is another user's
            continue
    return found


def left(mark: str) -> dict[int, str]:
    """What still lives a while after; at once when there is nothing."""
    until = time.monotonic() + SOON
    while (found := marked(mark)) and time.monotonic() < until:
        time.sleep(0.05)
    return found
