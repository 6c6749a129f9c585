"""Find the Python function under the wrappers of torch and Triton. Imports neither.

Upstream: `torch/_dynamo/eval_frame.py` (`OptimizedModule`; compiled functions are wrapped as `functools.wraps` does),
`triton/runtime/jit.py`, `triton/runtime/autotuner.py` (`fn`).
"""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any

_LAYERS = 32


def code_of(what: Any) -> types.CodeType | None:
    """The code of the function under `what`, see `function_of`."""
    function = function_of(what)
    return None if function is None else function.__code__


def named(function: str) -> Any:
    """What a module has as `module:qualname`; None if it has nothing there. Imports the module."""
    module, _, qualname = function.partition(":")
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def function_of(what: Any) -> types.FunctionType | None:
    """The function under a function, method, module's `forward`, compiled function or module, Triton kernel or autotuner."""
    found = getattr(what, "_orig_mod", what)
    found = found.forward if hasattr(found, "forward") else found
    for _ in range(_LAYERS):
        found = inspect.unwrap(found)
        found = getattr(found, "__func__", found)
        if isinstance(found, types.FunctionType):
            return found
        found = getattr(found, "fn", None)
    return None
