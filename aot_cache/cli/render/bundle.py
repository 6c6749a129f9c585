"""Print a plan or a bundle, as `inspect` shows it. Formats only."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console

from aot_cache.artifact.plan_of_ranks import ranks_text
from aot_cache.cli.facts.bundle import SHORT, many, reached_text
from aot_cache.cli.facts.coverage_grid import signs
from aot_cache.cli.render import grid as render_grid
from aot_cache.cli.render.terminal import line, signature_lines, size, stamp_lines, table
from aot_cache.store import Json

Facts = Mapping[str, Json]
SCREEN = 120
"""Maximum width of a coverage grid if stdout is no terminal. A wider grid is shown in another form."""


def plan_or_bundle(facts: Facts) -> None:
    """Print everything that `inspect` shows."""
    overview(facts)
    right = ("specializations", "configs", "size")
    rows = [(k["kernel"], k["specializations"], k["configs"], size(k["bytes"]), _tuned(k)) for k in facts["kernels"]]
    if rows or not facts["calls"]:
        table(("kernel", *right, "tuned"), rows, right)
        line()
    _graphs(facts)
    for one in facts.get("specializations", ()):
        _specialization(one)
    if "ledger" in facts:
        _ledger(facts["ledger"])


def overview(facts: Facts) -> None:
    """Print an overview: the summary, what the bytes are used for, and the coverage grids."""
    for name, value in _summary(facts):
        line(f"{name + ':':<10} {value}")
    line()
    if "sizes" in facts:
        _sizes(facts["sizes"], facts["bytes"])
    _grids(facts)


def _sizes(rows: Sequence[Facts], whole: int) -> None:
    cells = [
        (
            row["kind"],
            row["objects"] or "",
            size(row["bytes"]),
            f"{row['bytes'] / whole:.1%}",
            _bar(row["bytes"], whole),
        )
        for row in rows
    ]
    table(("bytes for", "objects", "size", "share", ""), cells, ("objects", "size", "share"))
    line()


def _bar(part: int, whole: int, width: int = 24) -> str:
    eighths = round(8 * width * part / whole)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _grids(facts: Facts) -> None:
    """Print the coverage grids, and explain the signs in them."""
    width = max(80, Console().width) if sys.stdout.isatty() else SCREEN
    for grid in facts["grids"]:
        for text in render_grid.lines(grid, width):
            line(text)
        line()
    told = list(signs(facts["grids"]))
    for text in told:
        line(text)
    if told:
        line()


def _graphs(facts: Facts) -> None:
    """Print the graphs of a bundle, or the compiled calls of a plan."""
    if facts.get("graphs"):
        right = ("kernels", "guards", "size")
        rows = [
            (
                g["label"],
                f"{g['function']}:{g['line']}" + ("" if g["rank"] is None else f" (rank {g['rank']})"),
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
        table(("", "graph", "mode", "options", "changes", *right, "tuned"), rows, right)
    elif facts["calls"] and "graphs" not in facts:
        calls = [
            (c["label"], f"{c['function']}:{c['line']}", c["mode"], c["options"], c["changes"]) for c in facts["calls"]
        ]
        table(("", "compiled call", "mode", "options", "changes"), calls)
    if "specializations" in facts:
        for graph in facts.get("graphs", ()):
            _graph(graph)


def _graph(graph: Facts) -> None:
    """Print one graph with its points, kernels and guards."""
    line()
    line(f"{graph['label']}  {graph['function']}:{graph['line']}, {graph['mode']}, changes {graph['changes']}")
    if graph["rank"] is not None:
        line(f"  only for rank {graph['rank']}: {graph['per_rank']}")
    for points in reached_text(graph["reached"]):
        line(f"  reached by {points}")
    for name in graph["kernels"]:
        line(f"  kernel {name}")
    for guard in [*graph["identities"], *graph["guards"]]:
        line(f"  guard {guard}")


def _summary(facts: Facts) -> Iterator[tuple[str, object]]:
    yield "recipe", f"{facts['recipe']} ({facts['origin']})"
    yield "target", f"{facts['target']}, {facts['device']}" if "device" in facts else facts["target"]
    yield "triton", facts["triton"]
    if facts["ranks"] > 1:
        yield "ranks", f"world size {facts['ranks']}"
    for kernel, which in facts["apart"].items():
        yield "differs", f"{kernel}: {which}"
    if facts["kind"] == "bundle":
        yield "digest", facts["digest"]
        yield from signature_lines(facts)
        yield "size", f"{size(facts['bytes'])} ({facts['bytes']} bytes)"
        yield "complete", "yes" if facts["complete"] else f"no, {len(facts['failed'])} failed"
    for failure in facts["failed"]:
        yield "failed", f"{failure['kernel']}: {failure['error']}"
    yield "kernels", f"{facts['kernel_count']}, in {facts['units']} specializations"
    if facts["calls"]:
        yield "graphs", len(facts["graphs"]) if "graphs" in facts else f"for {len(facts['calls'])} call signatures"
    for one in facts.get("functions", ()):
        what = f"needs a recipe: {one['why']}" if one["why"] else many(one["calls"], "kind") + " of call"
        yield "recorded", f"{one['function']}: {what}"
    if facts.get("graph_key"):
        yield "graphs for", ", ".join(f"{name} {value}" for name, value in facts["graph_key"].items() if value)
    if "pruned" in facts:
        yield "pruned", f"{facts['pruned']} that do not fit the target"
    if facts.get("at_start", {}).get("specializations"):
        waiting = facts["at_start"]
        yield "at start", f"{waiting['specializations']} are compiled when {', '.join(waiting['constants'])} is known"
    for engine in sorted({entry["engine"] for entry in facts.get("engine_caches", ())}):
        kinds = Counter(entry["kind"] for entry in facts["engine_caches"] if entry["engine"] == engine)
        yield f"cache of {engine}", ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
    yield "coverage", facts["coverage"]
    yield from stamp_lines(facts)
    for case in facts["cases"]:
        dims = " ".join(f"{dim}={values}" for dim, values in case["dims"].items())
        seen = f"{case['points']} points" if case["points"] == case["total"] else f"{case['points']} of {case['total']}"
        more = "".join(f", and {point}" for point in case["missed"])
        doc = f": {case['doc']}" if case["doc"] else ""
        what = f"({seen}, {case['mode']})" if case["built"] else "(failed: not in the bundle)"
        yield "case", f"{case['name']}: {dims}{more} {what}{doc}"
    if facts["untuned"]:
        yield "untuned", f"{facts['untuned']} choices are not tuned and use the first config that fits"
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
    line(f"{one['label']}  {one['kernel']}")
    line(f"  {one['signature']}")
    if "key" in one:
        line(f"  {size(one['bytes'])}, {one['shared']} bytes of shared memory, key {one['key']}")
    else:
        line(f"  id {one['id']}")
    line(f"  source {one['parts']['source'][:SHORT]}")
    if one["ranks"]:
        line(f"  only for {ranks_text(one['ranks'])}")
    for text in one["reached_by"]:
        line(f"  reached by {text}")


def _ledger(found: Facts) -> None:
    """Print what serving processes counted (`--ledger`)."""
    line()
    line(f"ledger:    {', '.join(found['paths'])}")
    if found["processes"]:
        line(f"processes: {found['processes']}, {found['sealed']} of them sealed")
        for name, what in (("kernels", "specializations"), ("graphs", "compiled graphs")):
            if found[name]["in_all"]:
                line(f"loaded:    {found[name]['loaded']} of {found[name]['in_all']} {what}")
    for name, why in found["stale"].items():
        line(f"stale:     {name}: {why}")
    for name in found["pending"]:
        line(f"pending:   {name}: its module is not imported")
    if found["events"]:
        line()
        names = ("total", "in_capture", "after_seal")
        head = ("event", "in all", "in captures", "after seal()")
        table(head, [(e["kind"], *(e[name] for name in names)) for e in found["events"]], head[1:])
    if found["misses"]:
        line()
        rows = [
            (m["kind"], m["name"], m["count"], "yes" if m["in_capture"] else "no", "; ".join(m["why"]))
            for m in found["misses"]
        ]
        table(("kind", "missed", "count", "in capture", "why"), rows, ("count",))
        if not found["complete"]:
            line("these are the last misses that each process kept; a misses file has all of them")
