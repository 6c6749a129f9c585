"""The steps of vLLM's GPU worker between its import and the first request.

Upstream: vLLM's `vllm/v1/worker/gpu_worker.py` (`Worker.load_model`, `initialize_from_config`, `compile_or_warm_up_model`),
called in this order by `vllm/v1/executor/` and `vllm/v1/engine/core.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from aot_cache.upstream import patch

MODULE = "vllm.v1.worker.gpu_worker"


def cache_blocks(worker: Any) -> int | None:
    """How many blocks the KV cache of a worker has; None if it is not known (yet)."""
    found = getattr(getattr(worker, "cache_config", None), "num_gpu_blocks", None)
    return found if isinstance(found, int) else None


def after_steps(steps: Mapping[str, Callable[[Any], None]]) -> patch.Undo:
    """Call `steps[name](worker)` behind each call of that method of vLLM's GPU worker which did not raise.

    Returns a function that takes the hooks out.

    Raises:
        AttributeError: this vLLM's worker has no such method; nothing is hooked then.
    """
    worker: Any = importlib.import_module(MODULE).Worker

    def behind(action: Callable[[Any], None]) -> patch.Answer:
        def step(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            action(self)
            return result

        return step

    return patch.replace_all(worker, {name: behind(action) for name, action in steps.items()})
