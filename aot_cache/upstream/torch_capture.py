"""What torch knows of CUDA's state, asked without initialising it; and the moment before a capture begins.

Seen to hold: see `versions.TORCH_SEEN`. Upstream: `torch/cuda/graphs.py` (`CUDAGraph.capture_begin`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


def cuda_is_up() -> bool:
    """Whether this process has initialised CUDA. Imports and initialises nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "cuda") and bool(torch.cuda.is_initialized())


def capturing() -> bool:
    """Whether a capture is active on the current stream."""
    if not cuda_is_up():
        return False
    import torch

    return bool(torch.cuda.is_current_stream_capturing())


def device_name() -> str:
    """The current device's name; the process must have initialised CUDA."""
    import torch

    return str(torch.cuda.get_device_name(torch.cuda.current_device()))


def before_capture(action: Callable[[], None]) -> Callable[[], None]:
    """Call `action()` before each `CUDAGraph.capture_begin`. Returns a function that takes it out."""
    import torch

    graph: Any = torch.cuda.CUDAGraph
    original = graph.capture_begin

    def capture_begin(self: Any, *args: Any, **kwargs: Any) -> Any:
        action()
        return original(self, *args, **kwargs)

    graph.capture_begin = capture_begin

    def undo() -> None:
        graph.capture_begin = original

    return undo
