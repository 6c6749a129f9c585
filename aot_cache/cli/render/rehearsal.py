"""The output of `rehearse`. Formats only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aot_cache.cli.render.terminal import line, table

Facts = Mapping[str, Any]


def rehearsal(facts: Facts) -> None:
    """Print one row for each case, then what went wrong, then the verdict."""
    numbers = ("points", "hits", "events", "distance", "seconds")
    cells = [
        (
            case["name"],
            f"{case['run']} of {case['declared']}",
            case["hits"],
            sum(case["events"].values()),
            _distance(case["distance"]),
            case["where"] or "-",
            f"{case['seconds']:.2f}",
        )
        for case in facts["cases"]
    ]
    table(("case", *numbers[:-1], "farthest from eager", "seconds"), cells, numbers)
    line()
    trouble(facts)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items() if version)
    line(f"{facts['verdict']} ({versions})")


def trouble(facts: Facts) -> None:
    """Print what went wrong."""
    if facts["not_ready"]:
        line(f"not ready: {facts['not_ready']}")
    for case in facts["cases"]:
        if case["not_captured"]:
            line(f"not captured: {case['name']} ran outside captures: {case['not_captured']}")
    for reason in facts["reasons"]:
        line(f"missed: {reason}")


def _distance(value: float | str | None) -> str:
    return f"{value:.2g}" if isinstance(value, float) else value or "-"
