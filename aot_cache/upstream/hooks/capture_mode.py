"""Let this thread load a module during a capture, which would otherwise invalidate the capture.

The driver has a capture mode for each thread (`cuThreadExchangeStreamCaptureMode`, `hipThreadExchangeStreamCaptureMode`, both
public). torch changes it around its own allocations (`c10/cuda/CUDAGraphsC10Utils.h`, `CUDAStreamCaptureModeGuard`).

Upstream: `torch/version.py` (`hip`), through `torch_capture`; otherwise only public functions of the drivers.
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
    """Inside, potentially unsafe calls of this thread do not invalidate any capture.

    If the driver's function is not available, nothing is changed.
    """
    exchange = _exchange(torch_capture.on_rocm())
    mode = ctypes.c_int(_RELAXED)
    exchanged = exchange is not None and exchange(ctypes.byref(mode)) == 0  # `mode` now holds the previous mode
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
