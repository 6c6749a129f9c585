"""The ledger as Prometheus text, for a server's own `/metrics`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from aot_cache.runtime.ledger import KINDS

COUNTERS = (
    ("total", "aot_cache_events_total", "Events by kind since the process began."),
    ("in_capture", "aot_cache_events_in_capture_total", "Events by kind while a CUDA graph capture was active."),
    ("after_seal", "aot_cache_events_after_seal_total", "Events by kind after aot_cache.seal()."),
)
SEALED = ("aot_cache_sealed", "Whether start-up is over.")


def prometheus(stats: Mapping[str, Any] | None = None) -> str:
    """The counters of `stats()` in Prometheus text format.

    Args:
        stats: a result of `aot_cache.stats()`; None calls it.
    """
    if stats is None:
        from aot_cache.runtime import (
            loader,  # not for vLLM's API server, which loads nothing and has the names from here
        )

        stats = loader.stats()
    lines = []
    for name, metric, text in COUNTERS:
        lines += [f"# HELP {metric} {text}", f"# TYPE {metric} counter"]
        lines += [f'{metric}{{kind="{kind}"}} {stats[name][kind]}' for kind in KINDS]
    metric, text = SEALED
    lines += [f"# HELP {metric} {text}", f"# TYPE {metric} gauge", f"{metric} {int(stats['sealed'])}"]
    return "\n".join([*lines, ""])
