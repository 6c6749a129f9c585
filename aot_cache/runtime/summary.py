"""What a start came to, as one line for an engine's log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aot_cache.runtime.ledger import HARMFUL


def of(stats: Mapping[str, Any], seconds: float, more: str = "") -> str:
    """One line.

    Args:
        stats: of `aot_cache.stats()`.
        seconds: spent in loading and installing.
        more: what else to say of what was loaded; it ends with `; `.
    """
    bundles, graphs, total = stats["bundles"], stats["graphs"], stats["total"]
    if not bundles:
        refused = total["rejected_bundle"]
        return f"aot-cache serves without a bundle ({refused} refused); {_events(total)} during start-up"
    primed, units = sum(one["primed"] for one in bundles), sum(one["units"] for one in bundles)
    loaded, declared = sum(one["primed"] for one in graphs), sum(one["graphs"] for one in graphs)
    inside = sum(stats["in_capture"][kind] for kind in HARMFUL)
    return (
        f"aot-cache is ready: {primed} of {units} kernel specializations and {loaded} of {declared} compiled graphs "
        f"loaded in {seconds:.2f} s; {more}{_events(total)} during start-up; {inside} events inside captures"
    )


def _events(total: Mapping[str, int]) -> str:
    names = {"compile": "compiles", "tuning": "tunings", "gcc": "C compiler runs", "frame": "frames traced by Dynamo"}
    other = total["other_compile"]
    counted = [f"{total[kind]} {name}" for kind, name in names.items()]
    return ", ".join([*counted, f"{other} kernels by other compilers"] if other else counted)
