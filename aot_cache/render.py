"""Tables and lines from the dicts of `report`. Formats only: nothing is computed or looked up here.

What is shown can come from a file of unknown origin, so no text is ever read as markup or reaches the terminal with its
control characters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from aot_cache.report import SHORT, reached_text

Json = Any
Facts = Mapping[str, Json]
WIDE = 100_000
"""Columns when stdout is no terminal: a pipe or a log shall have whole names, not ones folded at 80."""


def clean(text: object) -> str:
    """`text` on one line and without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in str(text))


def line(text: object = "") -> None:
    """One line on stdout, never folded: people copy them."""
    sys.stdout.write(clean(text) + "\n")


def document(value: Json) -> None:
    """The one JSON document of `--json`."""
    sys.stdout.write(json.dumps(value, indent=1) + "\n")


def table(head: Sequence[str], rows: Iterable[Sequence[object]], right: Sequence[str] = ()) -> None:
    """A table on stdout; the columns in `right` hold numbers."""
    drawn = Table(box=box.SIMPLE, pad_edge=False, show_edge=False)
    for name in head:
        drawn.add_column(Text(name), justify="right" if name in right else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(Text(clean(cell)) for cell in row))
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else WIDE, highlight=False)
    console.print(drawn)


def size(count: int | None) -> str:
    """Bytes for people; `-` where there are none to speak of."""
    if count is None:
        return "-"
    amount, units = float(count), ["B", "kB", "MB", "GB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{amount:.1f} {units[0]}"


class Progress:
    """Bars on stderr for `build(progress=...)`; silent where stderr is no terminal."""

    def __init__(self) -> None:
        self.target = ""
        self._tasks: dict[str, TaskID] = {}
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=Console(file=sys.stderr), disable=not sys.stderr.isatty(), transient=True)

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not total:
            return
        label = f"{self.target}: {stage}" if self.target else stage
        if label not in self._tasks:
            self._tasks[label] = self._bars.add_task(label, total=total)
        self._bars.update(self._tasks[label], completed=done, total=total)


# --- plans and bundles ------------------------------------------------------------------------------------------------


def plan_or_bundle(facts: Facts) -> None:
    """`inspect`, and `build --show-plan`."""
    for name, value in _summary(facts):
        line(f"{name + ':':<10} {value}")
    line()
    right = ("specializations", "configs", "size")
    rows = [(k["kernel"], k["specializations"], k["configs"], size(k["bytes"]), _tuned(k)) for k in facts["kernels"]]
    if rows or not facts["calls"]:
        table(("kernel", *right, "tuned"), rows, right)
    _graphs(facts)
    for one in facts.get("specializations", ()):
        _specialization(one)


def _graphs(facts: Facts) -> None:
    """Graphs of a bundle, or the calls that a plan asks graphs for."""
    if facts.get("graphs"):
        line()
        right = ("kernels", "guards", "size")
        rows = [
            (
                f"{g['function']}:{g['line']}",
                g["mode"],
                g["options"],
                g["changes"],
                len(g["kernels"]),
                len(g["guards"]) + len(g["identities"]),
                size(g["bytes"]),
                f"{len(g['open'])} open" if g["open"] else "tuned" if g["chosen"] else "no choice",
            )
            for g in facts["graphs"]
        ]
        table(("graph", "mode", "options", "changes", *right, "tuned"), rows, right)
    elif facts["calls"] and "graphs" not in facts:
        line()
        calls = [(f"{c['function']}:{c['line']}", c["mode"], c["options"], c["changes"]) for c in facts["calls"]]
        table(("compiled call", "mode", "options", "changes"), calls)
    if "specializations" in facts:
        for graph in facts.get("graphs", ()):
            _graph(graph)


def _graph(graph: Facts) -> None:
    """One graph with everything that is asked of a call."""
    line()
    line(f"{graph['function']}:{graph['line']}, {graph['mode']}, changes {graph['changes']}")
    for points in reached_text(graph["reached"]):
        line(f"  reached by {points}")
    for name in graph["kernels"]:
        line(f"  kernel {name}")
    for guard in [*graph["identities"], *graph["guards"]]:
        line(f"  guard {guard}")


def _summary(facts: Facts) -> Iterable[tuple[str, object]]:
    yield "recipe", f"{facts['recipe']} ({facts['origin']})"
    yield "target", f"{facts['target']}, {facts['device']}" if "device" in facts else facts["target"]
    yield "triton", facts["triton"]
    if facts["kind"] == "bundle":
        yield "digest", facts["digest"]
        yield "size", f"{size(facts['bytes'])} ({facts['bytes']} bytes)"
        yield "complete", "yes" if facts["complete"] else f"no, {len(facts['failed'])} failed"
        for failure in facts["failed"]:
            yield "failed", f"{failure['kernel']}: {failure['error']}"
    yield "units", facts["units"]
    if facts["calls"]:
        yield "graphs", len(facts["graphs"]) if "graphs" in facts else f"for {len(facts['calls'])} kinds of calls"
    if facts.get("graph_key"):
        yield "graphs for", ", ".join(f"{name} {value}" for name, value in facts["graph_key"].items() if value)
    if "pruned" in facts:
        yield "pruned", f"{facts['pruned']} that do not fit the target"
    yield "coverage", facts["coverage"]
    for case in facts["cases"]:
        dims = " ".join(f"{dim}={values}" for dim, values in case["dims"].items())
        seen = f"{case['points']} points" if case["points"] == case["total"] else f"{case['points']} of {case['total']}"
        more = "".join(f", and {point}" for point in case["missed"])
        doc = f": {case['doc']}" if case["doc"] else ""
        yield "case", f"{case['name']}: {dims}{more} ({seen}, {case['mode']}){doc}"
    if facts["untuned"]:
        yield "untuned", f"{facts['untuned']} choices are not tuned: the first config that fits is used"
    if "specializations" in facts:
        for name, value in facts.get("key", {}).items():
            yield "key", f"{name} = {value if isinstance(value, str) else json.dumps(value)}"


def _tuned(kernel: Facts) -> str:
    if not kernel["choices"]:
        return "no choice"
    if kernel["tuned"] in (0, kernel["choices"]):
        return "tuned" if kernel["tuned"] else "untuned"
    return f"{kernel['tuned']} of {kernel['choices']}"


def _specialization(one: Facts) -> None:
    line()
    line(one["kernel"])
    line(f"  {one['signature']}")
    if "key" in one:
        line(f"  {size(one['bytes'])}, {one['shared']} bytes of shared memory, key {one['key']}")
    else:
        line(f"  id {one['id']}")
    line(f"  source {one['parts']['source'][:SHORT]}")
    for text in one["reached_by"]:
        line(f"  reached by {text}")


def misses(facts: Facts) -> None:
    """`inspect --misses`."""
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
    head = ("kind", "name", "asked for", "count", "in capture", "done instead", "why", "declare, or what differs")
    if rows:
        table(head, rows, ("count",))
        line()
    line(f"different misses: {facts['different']}, {facts['in_capture']} of them inside captures")
    line(f"missed calls in all: {facts['count']}")
    line(f"covered by a wider declaration: {facts['declarable']}; `aot-cache build --misses` builds what can be built")
    if facts["cut_off"]:
        line(f"lines cut off, by a process that was killed: {facts['cut_off']}")


def times(count: int) -> str:
    """`once`, or `12 times`."""
    return "once" if count == 1 else f"{count} times"


def difference(facts: Facts) -> None:
    """`diff`: what each side has and the other lacks."""
    if facts["same"]:
        line("the same is launched by both")
    for side, path in (("only_left", facts["left"]), ("only_right", facts["right"])):
        only = facts[side]
        if not only["units"] and not only["tunings"]:
            continue
        line(f"only in {path}: {len(only['units'])} specializations, {len(only['tunings'])} choices")
        for unit in only["units"]:
            line(f"  {unit['kernel']} (source {unit['source'][:SHORT]})")
            line(f"    {unit['signature']}")
            for text in unit["reached_by"]:
                line(f"    reached by {text}")
        for tuning in only["tunings"]:
            line(f"  {tuning['kernel']}: choice of {tuning['candidates']} configs for ({', '.join(tuning['key'])})")


# --- hosts and targets ------------------------------------------------------------------------------------------------


def findings(facts: Facts) -> None:
    """`verify`: a line for each finding, or `ok`."""
    for found in facts["findings"]:
        line(f"{found['kind']}: {found['what']}")
    if not facts["findings"]:
        line("ok")


def explanation(facts: Facts) -> None:
    """`explain`: this host beside the bundle."""
    table(
        ("part", "bundle", "this host", ""), [(p["name"], p["bundle"], p["host"], p["status"]) for p in facts["parts"]]
    )
    line()
    line("this bundle loads here" if facts["loads"] else "this bundle does not load here: see the parts that differ")


def targets(rows: Sequence[Facts]) -> None:
    """The table of targets and, below it, where its numbers come from."""
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
    """A mapping as a table of two columns."""
    table(head, [(k, v if isinstance(v, (str, int, float)) else json.dumps(v)) for k, v in facts.items()])
