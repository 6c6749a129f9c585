"""Explain errors about kernels whose source cannot be read: Triton compiles from text, and raises at their definition.

Upstream: `triton/runtime/jit.py` (`JITCallable.__init__`: `inspect.getsourcelines`, and a `ValueError` from its `OSError`).
"""

from __future__ import annotations

import os
from types import FunctionType

from aot_cache.errors import TraceError
from aot_cache.upstream.codec import triton_names


def unreadable(error: BaseException | None) -> TraceError | None:
    """The error to show if `error` is about a kernel without source text; else None."""
    if not isinstance(error, (OSError, ValueError)):
        return None
    if not isinstance(error, OSError) and not isinstance(error.__cause__, OSError):
        return None
    function, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is triton_names.JITCallable.__init__.__code__:
            function = trace.tb_frame.f_locals.get("fn")
        trace = trace.tb_next
    if not isinstance(function, FunctionType):
        return None
    what = f"kernel {function.__module__}:{function.__qualname__} has no source text, which Triton compiles from"
    file = function.__code__.co_filename
    if file.startswith("<"):  # from `exec`; a notebook's cells have text that `inspect` finds
        return TraceError(f"{what}: it was executed as {file}", hint="define it in a file")
    why = f"only compiled code of {os.path.basename(file)} is installed"
    return TraceError(f"{what}: {why}", hint="install its package with its .py files; a server needs them, too")
