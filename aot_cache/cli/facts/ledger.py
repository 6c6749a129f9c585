"""What serving processes counted for a bundle: from `aot_cache.stats()` as JSON, and from misses files.

The numbers are events and first calls. aot-cache has no code on the path of a hit, so hits are not counted.
Imports neither torch nor Triton.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from aot_cache.cli.facts.coverage_grid import GRAPH, KERNEL, Missed
from aot_cache.errors import DeclarationError
from aot_cache.misses import file as miss_file
from aot_cache.store import Json

Facts = dict[str, Json]

_COUNTS = ("total", "in_capture", "after_seal")
_FORM: dict[str, type] = {
    **dict.fromkeys(_COUNTS, dict),
    "sealed": bool,
    "bundles": list,
    "graphs": list,
    "misses": list,
}
_KERNELS: dict[str, type] = {"digest": str, "units": int, "primed": int, "stale": dict, "pending": list}
_GRAPHS: dict[str, type] = {"digest": str, "primed": int, "found": dict, "stale": dict}
_MISS: dict[str, type] = {"kind": str, "name": str, "in_capture": bool, "why": str}


@dataclass
class Ledger:
    """What is known about a bundle's use.

    Args:
        paths: the files that were read.
        stats: the result of `aot_cache.stats()` of each process.
        misses: the contents of the misses files; None without one.
    """

    paths: list[Path]
    stats: list[Mapping[str, Json]] = field(default_factory=list)
    misses: miss_file.Misses | None = None

    def missed(self) -> list[Missed]:
        """The misses whose point in the declared dimensions is known."""
        found = self.misses.found if self.misses is not None else []
        return [
            Missed(GRAPH, miss.name, case, point, miss.count)
            for miss in found
            if miss.kind == miss_file.GRAPH
            for case, point in miss.facts["points"].items()
        ]


def read(paths: Sequence[Path], digest: str) -> Ledger:
    """The files of `--ledger`, each either the JSON of `aot_cache.stats()` or a misses file.

    Args:
        paths: the files.
        digest: digest of the bundle that they belong to.

    Raises:
        DeclarationError: a file cannot be read or is neither, or its process served another bundle.
    """
    out = Ledger(list(paths))
    misses = [path for path in paths if miss_file.is_misses(path, "ledger")]
    for path in paths:
        if path not in misses:
            out.stats.append(_stats(path, digest))
    if misses:
        out.misses = miss_file.read(misses)
    return out


def _stats(path: Path, digest: str) -> Mapping[str, Json]:
    hint = "write json.dumps(aot_cache.stats()) to it with this version, or give a misses file"
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DeclarationError(f"ledger {path} is not JSON", hint=hint) from error
    why = _wrong(data)
    if why:
        raise DeclarationError(f"ledger {path} is not the JSON of aot_cache.stats(): {why}", hint=hint)
    had = [one["digest"] for one in [*data["bundles"], *data["graphs"]]]
    if digest not in had:
        found = ", ".join(dict.fromkeys(one[:16] for one in had)) or "none"
        expected = f"bundle {digest[:16]} in ledger {path}"
        raise DeclarationError(expected, found, "give the ledger of a process that served this bundle")
    return dict(data)


def _wrong(data: Json) -> str:
    """How `data` differs from the form of `aot_cache.stats()`; empty if it does not."""
    why = miss_file.shape(data, _FORM)
    parts = [] if why else [("bundles", _KERNELS), ("graphs", _GRAPHS), ("misses", _MISS)]
    for name, form in parts:
        why = why or next(filter(None, (miss_file.shape(one, form) for one in data[name])), "")
    if why:
        return why
    counts = [data[name] for name in _COUNTS] + [one["found"] for one in data["graphs"]]
    return "" if all(type(n) is int for found in counts for n in found.values()) else "a count is no whole number"


def facts(ledger: Ledger, digest: str, compiled: int) -> Facts:
    """The ledger of one bundle.

    Args:
        ledger: what was read.
        digest: digest of the bundle.
        compiled: number of compiled graphs in the bundle (graphs may share one; a graph with a break has several).

    Returns:
        `paths`; `processes`: number of processes, and `sealed`: how many of them are sealed; `events`: for each kind that
        happened its `total`, `in_capture` and `after_seal`, for whole processes; `kernels` and `graphs`: number of
        specializations and compiled graphs `in_all` over these processes, and how many of them are `loaded`; `found`: graph
        label → number of first calls that got it; `stale`: name → why it is not installed; `pending`: names of kernels whose
        module is not imported; `misses`: for each function or kernel `count` and `in_capture`; `complete`: whether these are
        all misses, or only the last ones that each process kept.
    """
    bundles = [one for stats in ledger.stats for one in stats["bundles"] if one["digest"] == digest]
    graphs = [one for stats in ledger.stats for one in stats["graphs"] if one["digest"] == digest]
    found: Counter[str] = Counter()
    stale: dict[str, str] = {}
    for one in graphs:
        found.update(one["found"])
    for one in [*bundles, *graphs]:
        stale.update({str(name): str(why) for name, why in one["stale"].items()})
    return {
        "paths": [str(path) for path in ledger.paths],
        "processes": len(ledger.stats),
        "sealed": sum(bool(stats["sealed"]) for stats in ledger.stats),
        "events": _events(ledger.stats),
        "kernels": {"in_all": sum(b["units"] for b in bundles), "loaded": sum(b["primed"] for b in bundles)},
        "graphs": {"in_all": compiled * len(bundles), "loaded": sum(one["primed"] for one in graphs)},
        "found": dict(found),
        "stale": stale,
        "pending": sorted({str(name) for one in bundles for name in one["pending"]}),
        "misses": _misses(ledger),
        "complete": ledger.misses is not None,
    }


def _events(stats: Sequence[Mapping[str, Json]]) -> list[Facts]:
    kinds = dict.fromkeys(kind for one in stats for kind in one["total"])
    rows = [{"kind": str(kind), **{n: sum(s[n].get(kind, 0) for s in stats) for n in _COUNTS}} for kind in kinds]
    return [row for row in rows if row["total"]]


def _misses(ledger: Ledger) -> list[Facts]:
    """Misses by function or kernel, most frequent first. From the misses files if there are any, because they are complete."""
    rows: dict[tuple[str, str], Facts] = {}

    def add(kind: str, name: str, count: int, in_capture: bool, why: Sequence[str]) -> None:
        row = rows.setdefault((kind, name), {"kind": kind, "name": name, "count": 0, "in_capture": False, "why": []})
        row["count"] += count
        row["in_capture"] |= in_capture
        row["why"] += [text for text in why if text not in row["why"]]

    if ledger.misses is not None:
        for miss in ledger.misses.found:
            add(miss.kind, miss.name, miss.count, miss.in_capture, miss.why)
    else:
        for one in (one for stats in ledger.stats for one in stats["misses"]):
            add(one["kind"], one["name"], 1, one["in_capture"], [one["why"]])
    return sorted(rows.values(), key=lambda row: -int(row["count"]))


def annotate(grids: Sequence[Facts], found: Facts) -> None:
    """Add to each row of the grids its `state` in the processes, its missed `calls`, and the first calls that `found` it."""
    calls: Counter[tuple[str, str]] = Counter()
    for miss in found["misses"]:
        calls[KERNEL if miss["kind"] == miss_file.TUNING else miss["kind"], miss["name"]] += miss["count"]
    for row in (row for grid in grids for row in grid["rows"]):
        row["state"] = _state(row, found)
        row["calls"] = calls[row["kind"], row["name"]]
        row["found"] = [sum(found["found"].get(label, 0) for label in labels or ()) for labels in row["cells"]]


def _state(row: Facts, found: Facts) -> str:
    if not found["processes"]:
        return ""
    if row["name"] in found["stale"]:
        return "stale"
    if row["name"] in found["pending"]:
        return "not imported"
    counts = found["kernels" if row["kind"] == KERNEL else "graphs"]
    return "loaded" if counts["loaded"] >= counts["in_all"] else "loaded in part" if counts["loaded"] else "not loaded"
