"""Where the time of a block goes: a thread looks at this one every few milliseconds, and the parts add up to the whole.

A sample's weight is the time since the sample before, so that nothing is lost while C code holds the interpreter's lock.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

Json = Any
EVERY = 0.001
"""Seconds between samples, where the interpreter's lock is free."""
_OURS = f"{Path(__file__).resolve().parents[2] / 'aot_cache'}/"


@contextmanager
def sampled(rows: list[Json], least: float = 2.0) -> Iterator[None]:
    """Fill `rows` with what the block was at.

    `ours` is the innermost function of aot_cache on the stack, `inside` the first two of others that it had called, `ms` the
    milliseconds. Rows of less than `least` are one row, and the last is the sum.
    """
    spent: Counter[tuple[str, str]] = Counter()
    thread, end = threading.get_ident(), threading.Event()
    block = sys._getframe(2)  # noqa: SLF001  # under contextlib's own
    interval = sys.getswitchinterval()

    def look() -> None:
        last = time.perf_counter()
        while not end.wait(EVERY):
            frame = sys._current_frames().get(thread)  # noqa: SLF001  # documented, for debuggers
            now = time.perf_counter()
            if frame is not None:
                spent[_place(frame, block)] += now - last
            last = now

    watcher = threading.Thread(target=look, name="budget", daemon=True)
    sys.setswitchinterval(EVERY)
    began = time.perf_counter()
    watcher.start()
    try:
        yield
    finally:
        whole = time.perf_counter() - began
        end.set()
        watcher.join()
        sys.setswitchinterval(interval)
        found = [{"ours": o, "inside": i, "ms": round(1e3 * s, 1)} for (o, i), s in spent.most_common()]
        rows += [row for row in found if row["ms"] >= least]
        small = sum(row["ms"] for row in found if row["ms"] < least)
        rows.append({"ours": "less than that", "inside": "", "ms": round(small, 1)})
        unseen = 1e3 * whole - sum(row["ms"] for row in rows)
        rows.append({"ours": "before the first sample and after the last", "inside": "", "ms": round(unseen, 1)})
        rows.append({"ours": "the whole", "inside": "", "ms": round(1e3 * whole, 1)})


def _place(frame: FrameType | None, block: FrameType) -> tuple[str, str]:
    others: list[FrameType] = []
    while frame is not None and frame is not block and not frame.f_code.co_filename.startswith(_OURS):
        if not frame.f_code.co_filename.startswith("<frozen importlib"):  # between an import and what it runs
            others.append(frame)
        frame = frame.f_back
    inside = " > ".join(map(_named, others[:-3:-1]))
    if frame is None or frame is block:
        return "outside of aot_cache", inside
    return f"{frame.f_code.co_filename[len(_OURS) :]}:{frame.f_code.co_name}", inside


def _named(frame: FrameType) -> str:
    return f"{frame.f_globals.get('__name__', '?')}:{frame.f_code.co_name}"
