"""A collector of ours in the registry that vLLM's `/metrics` shows.

Upstream: vLLM's `vllm/v1/metrics/prometheus.py` (`get_prometheus_registry`), taken by name in
`vllm/entrypoints/serve/instrumentator/metrics.py` (`attach_router`); `prometheus_client`'s custom collectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from aot_cache.upstream import patch

_PLACES = ("vllm.v1.metrics.prometheus", "vllm.entrypoints.serve.instrumentator.metrics")
_NAME = "get_prometheus_registry"


def add_collector(collect: Callable[[], Any]) -> None:
    """Add a collector, whose `collect` yields `prometheus_client` families, to each registry that vLLM will show."""
    collector = type("AotCacheCollector", (), {"collect": staticmethod(collect)})()
    known: list[Any] = []

    def get_prometheus_registry(original: Any) -> Any:
        registry = original()
        if not any(registry is one for one in known):
            known.append(registry)
            registry.register(collector)
        return registry

    patch.replace_in(_PLACES, _NAME, get_prometheus_registry)
