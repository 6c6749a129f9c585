"""Tables and lines from the dicts of `cli.facts`. Formats only: nothing is computed or looked up here.

Texts may come from a file of unknown origin, so they are never parsed as markup, and control characters are removed.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from aot_cache.cli.facts.bundle import SHORT
from aot_cache.store import Json, signature

Facts = Mapping[str, Json]
_LOG = logging.getLogger("aot_cache.cli")
WIDE = 100_000
"""Width if stdout is no terminal, so that names in a pipe or log are not folded at 80 columns."""


def clean(text: object) -> str:
    """`text` in one line, without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in str(text))


def line(text: object = "") -> None:
    """Print one line, never folded, so that it can be copied."""
    sys.stdout.write(clean(text) + "\n")


def document(value: Json) -> None:
    """Print the JSON document of `--json`."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    """Print a table. Columns in `right` contain numbers, and are aligned right."""
    drawn = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for name in head:
        drawn.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(clean(cell)) for cell in row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDE, highlight=False)
    console.print(drawn)


def size(count: int | None) -> str:
    """A number of bytes for people; `-` for None."""
    if count is None:
        return "-"
    amount, units = float(count), ["B", "kB", "MB", "GB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


class Progress:
    """Progress on stderr for `build(progress=...)`: bars on a terminal, else a line from time to time (image builds)."""

    FIRST = 4.0
    """Seconds until the first line; shorter builds print none."""
    SECONDS = 10.0
    """Seconds between further lines."""
    LONG = 600.0
    """Estimated remaining seconds of a stage above which a hint is printed."""
    quiet = False
    """Whether no progress is shown (-q)."""

    def __init__(self) -> None:
        self.target = ""
        self._began = time.monotonic()
        self._due = self._began + self.FIRST
        self._stages: dict[str, float] = {}
        self._tasks: dict[str, TaskID] = {}
        self._last: tuple[str, int, int] = ("starting", 0, 0)
        self._over, self._lock = threading.Event(), threading.Lock()
        self._speaker: threading.Thread | None = None
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()),
            *(TextColumn("left:"), TimeRemainingColumn()),
        )
        console = Console(file=sys.stderr)
        on_terminal = sys.stderr.isatty()
        self._bars = Bars(*columns, console=console, disable=self.quiet or not on_terminal, transient=True)
        self._lines = not self.quiet and not on_terminal

    def __enter__(self) -> Progress:
        self._bars.start()
        if self._lines:  # lines are printed even if a stage makes no progress
            self._speaker = threading.Thread(target=self._keep_saying, daemon=True, name="aot-cache progress")
            self._speaker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._speaker is not None:
            self._speaker.join()
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not total:
            return
        label = self._label(stage)
        now = time.monotonic()
        began = self._stages.setdefault(label, now)
        self._last = (label, done, total)
        if done == total:
            _LOG.info("%s %d/%d, %.1f s", label, done, total, now - began)
        if self._lines:
            self._say()
        elif not self._bars.disable:
            if label not in self._tasks:
                self._tasks[label] = self._bars.add_task(label, total=total)
            self._bars.update(self._tasks[label], completed=done, total=total)

    def _label(self, stage: str) -> str:
        return f"{self.target}: {stage}" if self.target else stage

    def _keep_saying(self) -> None:
        while not self._over.wait(max(0.1, self._due - time.monotonic())):
            self._say()

    def _say(self) -> None:
        """Print the last progress, if a line is due."""
        now = time.monotonic()
        with self._lock:
            if now < self._due:
                return
            self._due = now + self.SECONDS
        label, done, total = self._last
        began = self._stages.get(label, now)
        left = (now - began) / done * (total - done) if done else 0.0
        more = f", about {left / 60:.0f} min left" if left > self.LONG else ""
        more += "; hint: a narrower --range takes less" if more and done < total / 2 else ""
        what = f"{label} {done}/{total}" if total else self._label(label)
        sys.stderr.write(f"{clean(what)}, {now - self._began:.0f} s{more}\n")
        sys.stderr.flush()


# --- misses and differences --------------------------------------------------------------------------------------------


def misses(facts: Facts) -> None:
    """Print `inspect --misses`."""
    rows = [
        (
            m["kind"],
            m["name"],
            m["asked"],
            m["count"],
            "yes" if m["in_capture"] else "no",
            ", ".join(m["actions"]),
            "; ".join(m["why"]),
            m["declare"] or "; ".join(m["nearest"]) or "-",
        )
        for m in facts["misses"]
    ]
    head = ("kind", "name", "call", "count", "in capture", "action", "why", "declare, or what differs")
    if rows:
        table(head, rows, ("count",))
        line()
    line(f"different misses: {facts['different']}, {facts['in_capture']} of them inside captures")
    line(f"missed calls in total: {facts['count']}")
    line(f"covered by a wider declaration: {facts['declarable']}; `aot-cache build --misses` builds what can be built")
    if facts["cut_off"]:
        line(f"lines cut off by a killed process: {facts['cut_off']}")


def times(count: int) -> str:
    """`once`, or `12 times`."""
    return "once" if count == 1 else f"{count} times"


def difference(facts: Facts) -> None:
    """Print `diff`: a summary, then what each side has and the other lacks."""
    line(facts["summary"])
    for side, path in (("only_left", facts["left"]), ("only_right", facts["right"])):
        only = facts[side]
        if any(only.values()):
            line(f"only in {path}:")
        for unit in only["units"]:
            line(f"  {unit['kernel']} (source {unit['source'][:SHORT]})")
            line(f"    {unit['signature']}")
            _reached(unit)
        for tuning in only["tunings"]:
            line(f"  {tuning['kernel']}: choice of {tuning['candidates']} configs for ({', '.join(tuning['key'])})")
        for found in [*only.get("graphs", ()), *only.get("calls", ())]:
            _compiled(found)
    if facts["compiled_otherwise"]:
        line("compiled differently for the same calls:")
    for found in facts["compiled_otherwise"]:
        _compiled(found)


def _compiled(found: Facts) -> None:
    """Print a graph, or a compiled call of a plan."""
    words = " ".join(filter(None, (found["mode"], found["options"])))
    line(f"  {found['function']} ({words}; changes: {found['changes']})")
    if found.get("differs"):
        line(f"    differs in {', '.join(found['differs'])}")
    _reached(found)


def _reached(found: Facts) -> None:
    for text in found["reached_by"]:
        line(f"    reached by {text}")


# --- hosts and targets ------------------------------------------------------------------------------------------------


def findings(facts: Facts) -> None:
    """Print `verify`: a line for each finding, or `ok`."""
    for found in facts["findings"]:
        line(f"{found['kind']}: {found['what']}")
    if not facts["findings"]:
        line("ok")
    for name, text in signature_lines(facts):
        if name != "not signed":  # which is a finding
            line(f"{name}: {text}")
    stamp(facts)


def signed(facts: Facts) -> None:
    """Print `sign`."""
    for bundle in facts["bundles"]:
        more = "" if bundle["complete"] else "; it is incomplete: something in it could not be built"
        line(f"signed {bundle['path']} (digest {bundle['digest'][:SHORT]}) in {bundle['signature']}{more}")
    line(f"key {facts['key'][: signature.SHORT]}")


def signature_lines(facts: Facts) -> list[tuple[str, str]]:
    """(label, text) of each line about the signatures of a bundle; none if there are none and none are wanted."""
    found = facts.get("signature")
    if not found:
        return []
    if found["checked"] and not found["keys"]:
        return [("not signed", found["why_not"])]
    if not found["checked"] and found["signatures"]:
        return [("signed", f"{times(found['signatures'])}, not checked: name the key (--key)")]
    return [("signed by", f"key {key[: signature.SHORT]}") for key in found["keys"]]


def stamp(facts: Facts) -> None:
    """Print the rehearsals of a bundle, a line for each device."""
    for name, text in stamp_lines(facts):
        line(f"{name}: {text}")


def stamp_lines(facts: Facts) -> list[tuple[str, str]]:
    """(label, text) of each line about rehearsals."""
    out = []
    for run in facts.get("rehearsed", ()):
        versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
        worst = max((case["distance"] for case in run["cases"]), default=0.0)
        out.append(("rehearsed", f"{run['text']}, {run['date']}, within {worst:.2g} of eager ({versions})"))
    if facts.get("stamp_ignored"):
        out.append(("not rehearsed", facts["stamp_ignored"]))
    return out


def explanation(facts: Facts) -> None:
    """Print `explain`: the bundle's key parts beside this host's."""
    table(
        ("part", "bundle", "this host", ""), [(p["name"], p["bundle"], p["host"], p["status"]) for p in facts["parts"]]
    )
    line()
    line("this bundle loads here" if facts["loads"] else "this bundle does not load here: see which parts differ")


def targets(rows: Sequence[Facts]) -> None:
    """Print the table of targets and, below it, the sources of its numbers."""
    right = ("SMs", "shared memory", "memory")
    cells = [
        (
            t["id"],
            t["name"],
            f"{t['backend']} {t['arch']}",
            t["multiprocessors"],
            t["shared_memory_per_block_optin"],
            size(t["memory_bytes"]),
            "measured" if t["measured"] else "published",
        )
        for t in rows
    ]
    table(("target", "device", "arch", *right, "numbers"), cells, right)
    line()
    for t in rows:
        line(f"{t['id']}: {t['source']}")


def pairs(facts: Facts, head: Sequence[str]) -> None:
    """Print a mapping as a table of two columns."""
    table(head, [(k, v if isinstance(v, (str, int, float)) else json.dumps(v)) for k, v in facts.items()])
