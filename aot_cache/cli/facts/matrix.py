"""Facts about a matrix of builds: a row for each, from what its command has printed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aot_cache.builder.matrix import Outcome

Facts = dict[str, Any]

GOOD = ("built", "nothing to do", "planned")
"""The states of a row that is as it should be."""


def rows(outcomes: Iterable[Outcome]) -> list[Facts]:
    """A row for each build. One that has written over another's bundle, or to a folder that is not seen here, has failed."""
    out: list[Facts] = []
    written: dict[str, str] = {}
    for outcome in outcomes:
        row = _row(outcome)
        before = written.setdefault(row["path"], row["label"])
        if row["path"] and before != row["label"]:
            why = f"it wrote to the path of {before}: rename one of the recipes, or give an `out`"
            row |= {"state": "failed", "error": why}
        if row["path"] and not Path(row["path"]).exists():
            why = f"{row['path']} is on {row['host']}, and not here: all machines must see one --store"
            row |= {"state": "failed", "error": why}
        out.append(row)
    return out


def _row(outcome: Outcome) -> Facts:
    unit, document = outcome.unit, outcome.document
    bundle: Facts = (document.get("bundles") or [{}])[0]
    plan: Facts = (document.get("plans") or [{}])[0]
    artifacts = bundle.get("units", 0) + bundle.get("graphs", 0)
    return {
        "label": unit.label,
        "name": unit.name,
        "target": bundle.get("target", unit.target),
        "version": unit.version,
        "state": _state(outcome, bundle),
        "exit_code": outcome.exit_code,
        "seconds": round(outcome.seconds, 2),
        "compiled": bundle.get("compiled", 0),
        "reused": max(0, artifacts - bundle.get("compiled", 0)),
        "points": plan.get("points", bundle.get("points", 0)),
        "size": bundle.get("size", 0),
        "path": bundle["path"] if bundle.get("written") else "",
        "digest": bundle.get("digest", ""),
        "host": outcome.host,
        "attempts": outcome.attempts,
        "error": outcome.lost or document.get("error", {}).get("message", ""),
        "bundle": bundle or None,
        "plan": plan or None,
    }


def _state(outcome: Outcome, bundle: Facts) -> str:
    if outcome.lost:
        return "lost" if outcome.exit_code < 0 else "failed"
    if bundle.get("written") and not bundle["complete"]:
        return "incomplete"
    if outcome.exit_code:
        return "failed"
    if not bundle:
        return "planned"
    return "nothing to do" if bundle["nothing_to_do"] else "built"
