"""Let this thread do, while a capture is under way, what the capture would otherwise be lost for: load a module.

The driver asks each thread what it minds (`cuThreadExchangeStreamCaptureMode`, `hipThreadExchangeStreamCaptureMode`, both
public); torch does the same around its own allocations (`c10/cuda/CUDAGraphsC10Utils.h`, `CUDAStreamCaptureModeGuard`).

Upstream: `torch/version.py` (`hip`), through `torch_capture`; beside it the drivers' public functions alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from typing import Any

from aot_cache.upstream.hooks import torch_capture

_RELAXED = 2  # CU_STREAM_CAPTURE_MODE_RELAXED, hipStreamCaptureModeRelaxed
_ENTRANCES = {
    False: ("libcuda.so.1", "cuThreadExchangeStreamCaptureMode"),
    True: ("libamdhip64.so", "hipThreadExchangeStreamCaptureMode"),
}


@contextlib.contextmanager
def relaxed() -> Iterator[None]:
    """Inside, potentially unsafe calls of this thread are not held against any capture.

    Where the driver cannot be asked nothing changes: what is done inside is then done as without this.
    """
    exchange = _exchange(torch_capture.on_rocm())
    mode = ctypes.c_int(_RELAXED)
    exchanged = exchange is not None and exchange(ctypes.byref(mode)) == 0  # `mode` is what it was from here on
    try:
        yield
    finally:
        if exchange is not None and exchanged:
            exchange(ctypes.byref(mode))


@functools.cache
def _exchange(rocm: bool) -> Callable[[Any], int] | None:
    library, name = _ENTRANCES[rocm]
    try:
        found: Callable[[Any], int] = getattr(ctypes.CDLL(library), name)
    except (OSError, AttributeError):
        return None
    return found
