"""The steps of vLLM's GPU worker between its import and the first request.

Upstream: vLLM's `vllm/v1/worker/gpu_worker.py` (`Worker.load_model`, `initialize_from_config`, `compile_or_warm_up_model`),
called in this order by `vllm/v1/executor/` and `vllm/v1/engine/core.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from aot_cache.upstream import patch


def after_steps(steps: Mapping[str, Callable[[], None]]) -> patch.Undo:
    """Call `steps[name]()` behind each call of that method of vLLM's GPU worker which did not raise.

    Returns a function that takes the hooks out.

    Raises:
        AttributeError: this vLLM's worker has no such method; nothing is hooked then.
    """
    worker: Any = importlib.import_module("vllm.v1.worker.gpu_worker").Worker

    def behind(action: Callable[[], None]) -> patch.Answer:
        def step(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            action()
            return result

        return step

    return patch.replace_all(worker, {name: behind(action) for name, action in steps.items()})
