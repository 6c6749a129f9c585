"""The output of `build`: the targets, what would be built and why, and what was built. Formats only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aot_cache.cli.facts.bundle import many
from aot_cache.cli.render.bundle import overview
from aot_cache.cli.render.rehearsal import trouble
from aot_cache.cli.render.terminal import line, size, table, times

Facts = Mapping[str, Any]


def chosen(facts: Facts) -> None:
    """Print the targets and why they were chosen; then how a native target differs from the table."""
    line(f"target: {', '.join(facts['targets'])} ({facts['why']})")
    for d in facts["differences"]:
        line(f"native: {d['field']} is {d['device']} on this {d['target']}, but {d['table']} in the table")


def builds(rows: Sequence[Facts]) -> None:
    """Print the summary at the end of a build."""
    numbers = ("specializations", "graphs", "compiled now", "does not fit", "failed", "size", "points", "seconds")
    cells = [
        (
            b["target"],
            b["units"],
            b["graphs"],
            b["compiled"],
            b["pruned"],
            len(b["failed"]),
            size(b["size"]),
            f"{b['covered']} of {b['declared']}" if b["declared"] else "-",
            b["coverage"],
            f"{b['seconds']:.2f}",
        )
        for b in rows
    ]
    table(("target", *numbers[:-1], "coverage", "seconds"), cells, numbers)
    for doubt in sorted({b["untested"] for b in rows if b["untested"]}):
        line(f"warning: {doubt}")
    for warning in dict.fromkeys(text for b in rows for text in b["warnings"]):
        line(f"warning: {warning}")
    for b in rows:
        line()
        _rehearsal(b)
        if b["nothing_to_do"]:
            line(f"{b['target']}: nothing to do: nothing has changed since the last build")
        if b["ranks"] > 1:
            line(f"{b['target']}: for a world size of {b['ranks']}")
        _engine(b["target"], b["engine"])
        if b["neighbours"]:
            what = f"{many(b['neighbours'], 'specialization')} beside recorded ones, which differ in the class of one integer"
            line(f"{b['target']}: built, too: {what}")
        for name in b["not_built"]:
            line(f"{b['target']}: recorded, but not built, because --model does not call it: {name}")
        if not b["complete"]:
            lost = f"without {many(len(b['failed']), 'part')} of the recipe"
            line(f"{b['target']}: {f'INCOMPLETE: {lost}' if b['written'] else 'FAILED: nothing could be built'}")
        for failure in b["failed"]:
            line(f"{b['target']}: failed: {failure['kernel']}: {failure['error']}")
        for name, settings in b["sets"].items():
            what = f"{', '.join(settings)} while it makes arguments, and is built with that: a server without it misses"
            line(f"{b['target']}: case {name} sets {what}")
        for name, why in b["per_rank"].items():
            line(f"{b['target']}: built once per rank: {name}: {why}")
        for name, which in b["apart"].items():
            line(f"{b['target']}: differs between ranks: {name}: {which}")
        _became(b)
        if not b["written"]:
            line(f"bundle: none was written; {b['path']} is unchanged")
            continue
        line(f"bundle: {b['path']}")
        line(f"digest: {b['digest']}")
        for instruction in b["dockerfile"]:
            line(f"Dockerfile: {instruction}")
        if b["server"]:
            line(f"server: {b['server']}")


def _engine(target: str, engine: Facts) -> None:
    """Print what became of an engine that was started on the virtual device."""
    if not engine:
        return
    name = f"{engine['name']} {engine['version']}"
    ranks = f", as each of {engine['ranks']} ranks" if engine["ranks"] > 1 else ""
    line(f"{target}: {name} answered {many(engine['requests'], 'kind')} of requests on the virtual device{ranks}")
    models = ", ".join(engine["models"]) or "none"
    line(f"{target}: models that {engine['name']} compiles itself: {models}")
    for what in engine["unreached"]:
        line(f"{target}: not reached: {what}")
    if engine["assumed"]:
        read = f"{many(len(engine['assumed']), 'place')} in {engine['name']} read values that nobody knows (sampled tokens)"
        line(f"{target}: {read}, and got ones: see --json")


def _rehearsal(built: Facts) -> None:
    """Print the result of the rehearsal at the end of a build."""
    found = built["rehearsal"]
    if found is None:
        return
    if not found["passed"]:
        line(f"{built['target']}: the bundle would miss where it is served; it is kept at {built['path']}")
    trouble(found)


def _became(built: Facts) -> None:
    """Print which of the given misses a build covers."""
    given = built["misses"]
    if given.get("given"):
        line(f"{built['target']}: misses: {given['covered']} of {given['given']} covered")
    if given.get("cut_off"):
        line(f"{built['target']}: misses: lines cut off by a killed process: {given['cut_off']}")
    for miss in given.get("uncovered", ()):
        what = f"{miss['kind']} {miss['name']} ({', '.join(filter(None, (times(miss['count']), miss['asked'])))})"
        line(f"{built['target']}: not covered: {what}: {miss['why']}")


def plan(facts: Facts) -> None:
    """Print `build --show-plan`: an overview, then which points reach each compiled call and each kernel."""
    overview(facts)
    _engine(facts["target"], facts["engine"])
    if facts["calls"]:
        line("Each compiled call gets one graph, or one per code path:")
        line()
    for call in facts["calls"]:
        words = filter(None, (f"{call['function']}:{call['line']}", call["mode"], call["options"]))
        _reached(f"{call['label']}  {', '.join(words)}, changes {call['changes']}", call)
    for kernel in facts["kernels"]:
        counts = f"{many(kernel['specializations'], 'specialization')}, {many(kernel['configs'], 'config')}"
        tuned = f"{kernel['tuned']} of {many(kernel['choices'], 'choice')} tuned" if kernel["choices"] else "no choice"
        _reached(f"{kernel['kernel']}: {counts}, {tuned}", kernel)


def _reached(what: str, facts: Facts) -> None:
    line(what)
    for points in facts["reached_by"]:
        line(f"  reached by {points}")
    line()


def matrix(rows: Sequence[Facts], show_plan: bool) -> None:
    """Print a matrix of builds: a row for each, then what went wrong, and the digests."""
    numbers = ("points",) if show_plan else ("compiled now", "reused", "size", "attempts")
    cells = [
        (
            row["name"],
            row["target"] or "-",
            row["version"] or "-",
            row["state"],
            *((row["points"],) if show_plan else (row["compiled"], row["reused"], size(row["size"]), row["attempts"])),
            f"{row['seconds']:.2f}",
            row["host"] or "-",
        )
        for row in rows
    ]
    table(("build", "target", "version", "state", *numbers, "seconds", "host"), cells, (*numbers, "seconds"))
    line()
    for row in rows:
        if row["path"]:
            line(f"bundle: {row['path']}  {row['digest']}")
    for row in rows:
        if row["error"]:
            line(f"{row['label']}: {row['state']}: {row['error']}")
