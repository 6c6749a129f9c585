"""A collector of ours in the registry that SGLang's `/metrics` shows.

Upstream: SGLang's `sglang/srt/utils/common.py` (`add_prometheus_middleware`, which imports `CollectorRegistry` from
`prometheus_client` when it is called, and makes the one registry that it shows), taken by name in
`sglang/srt/entrypoints/http_server.py`; `prometheus_client`'s custom collectors.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from aot_cache.upstream import patch

PLACES = ("sglang.srt.utils.common", "sglang.srt.entrypoints.http_server")
NAME = "add_prometheus_middleware"


def add_collector(collect: Callable[[], Any]) -> None:
    """Add a collector, whose `collect` yields `prometheus_client` families, to the registry that SGLang will show."""
    collector = type("AotCacheCollector", (), {"collect": staticmethod(collect)})()

    def registry(original: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        made.register(collector)
        return made

    def add_prometheus_middleware(original: Any, *args: Any, **kwargs: Any) -> Any:
        with patch.OnThisThread(importlib.import_module("prometheus_client"), "CollectorRegistry").replaced(registry):
            return original(*args, **kwargs)

    patch.replace_in(PLACES, NAME, add_prometheus_middleware)
