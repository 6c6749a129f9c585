"""The steps of an SGLang scheduler process between its start and the first request.

Upstream: SGLang's `sglang/srt/managers/scheduler.py`: `run_scheduler_process` makes a `Scheduler`, one in a process for each
rank, and tells its parent that it is ready when `__init__` has returned. In it, `init_model_worker` makes the workers of target
and draft, their memory pools and their graphs. `sglang/srt/model_executor/model_runner.py`: target and draft are each a
`ModelRunner`, whose `load_model` comes before `init_cuda_graphs`. Other processes import both modules, and make neither.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from aot_cache.upstream import patch

SCHEDULER = "sglang.srt.managers.scheduler"
RUNNER = "sglang.srt.model_executor.model_runner"


def around_scheduler(begin: Callable[[], None], end: Callable[[], None]) -> patch.Undo:
    """Call `begin()` before a scheduler is made, and `end()` once it is; its module is imported.

    Raises:
        AttributeError: this SGLang has no such class; nothing is hooked then.
    """

    def __init__(original: Any, *args: Any, **kwargs: Any) -> None:
        begin()
        original(*args, **kwargs)
        end()

    return patch.replace(importlib.import_module(SCHEDULER).Scheduler, "__init__", __init__)


def around_steps(ready: Callable[[], None]) -> patch.Undo:
    """Call `ready()` once a model is loaded, and before its graphs are captured; their module is imported.

    Raises:
        AttributeError: this SGLang has no such steps; nothing is hooked then.
    """

    def load_model(original: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        ready()
        return result

    def init_cuda_graphs(original: Any, *args: Any, **kwargs: Any) -> Any:
        ready()
        return original(*args, **kwargs)

    steps = {"load_model": load_model, "init_cuda_graphs": init_cuda_graphs}
    return patch.replace_all(importlib.import_module(RUNNER).ModelRunner, steps)
