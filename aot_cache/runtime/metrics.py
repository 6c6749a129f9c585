"""The ledger as Prometheus text, for a server's own `/metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aot_cache.runtime import loader
from aot_cache.runtime.ledger import KINDS

COUNTERS = (
    ("total", "aot_cache_events_total", "Events by kind since the process began."),
    ("in_capture", "aot_cache_events_in_capture_total", "Events by kind while a CUDA graph capture was active."),
    ("after_seal", "aot_cache_events_after_seal_total", "Events by kind after aot_cache.seal()."),
)


def prometheus(stats: Mapping[str, Any] | None = None) -> str:
    """The counters of `stats()` in Prometheus text format.

    Args:
        stats: a result of `aot_cache.stats()`; None calls it.
    """
    found = loader.stats() if stats is None else stats
    lines = []
    for name, metric, text in COUNTERS:
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} counter"]
        lines += [f'{metric}{{kind="{kind}"}} {found[name][kind]}' for kind in KINDS]
    lines += ["# HELP aot_cache_sealed Whether start-up is over.", "# TYPE aot_cache_sealed gauge"]
    lines.append(f"aot_cache_sealed {int(found['sealed'])}")
    return "\n".join([*lines, ""])
