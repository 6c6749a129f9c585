"""Create the handles and workspaces of cuBLAS, cuBLASLt and cuDNN before a capture, during which they cannot be created.

torch creates a handle at a thread's first use of a library on a device, and cuBLAS's workspace at its first use on a stream
(`aten/src/ATen/cuda/CublasHandlePool.cpp`, `aten/src/ATen/cudnn/Handle.cpp`). Measured on an H200, torch 2.11: inside a
capture the first matrix product, convolution or attention of cuDNN fails without this; random numbers of the default generator
need nothing; FFT plans and linear algebra solvers (cuFFT, cuSOLVER) are not created here.

Upstream: `torch/backends/cudnn/__init__.py` (`is_available`, `enabled`), and which operators use which library;
`aten/src/ATen/native/cudnn/RNN.cpp` (`_cudnn_init_dropout_state` makes the handle).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_done: set[tuple[int, int, int]] = set()
"""(device, stream, thread), because each thread has its own handles."""
_lock = threading.Lock()


def prime() -> None:
    """Use the libraries once on the current device and stream, unless this thread already has. CUDA must be initialised.

    cuDNN is used if torch has it and it is enabled: torch uses it for convolutions, and for attention on Hopper and later.
    """
    place = _place()
    with _lock:
        if place in _done:
            return
        _done.add(place)
    _use_each()


@contextlib.contextmanager
def meanwhile() -> Iterator[None]:
    """Load the libraries on another thread while the block runs, for the current device and stream; CUDA must be initialised.

    Loading them takes a tenth of a second and more, in C. The thread's handles go to torch's pool when it ends, and the next
    thread that needs some takes them, so `prime` is quick after it. What fails here is left to `prime`, which reports it.
    """
    try:
        done = _place() in _done
    except RuntimeError:
        done = True
    if done:
        yield
        return
    device, stream = torch.cuda.current_device(), torch.cuda.current_stream()

    def use() -> None:
        with contextlib.suppress(Exception), torch.cuda.device(device), torch.cuda.stream(stream):
            _use_each()

    thread = threading.Thread(target=use, name="aot-cache libraries", daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()


def _place() -> tuple[int, int, int]:
    return torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream, threading.get_ident()


def _use_each() -> None:
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        small = torch.ones(16, 16, device="cuda", dtype=torch.float16)
        torch.mm(small, small)
        torch.nn.functional.linear(small, small, small[0])  # with a bias: cuBLASLt
        libraries: Any = torch.backends.cudnn
        if libraries.is_available() and libraries.enabled:
            _make_cudnn_handle()


def _make_cudnn_handle() -> None:
    """Make the handle, and load no more of cuDNN.

    The state of a dropout needs the handle alone: 9 to 30 ms on an H200. A convolution needs it, too, but loads cuDNN's engines:
    0.3 to 1.2 s, also for a model that never uses one. What a captured convolution or attention needs is loaded inside the
    capture, which allows that (`tests/gpu/test_libraries_on_gpu.py`).
    """
    if torch.version.hip is None:
        torch._cudnn_init_dropout_state(0.5, True, 0, dtype=torch.uint8, device="cuda")
    else:  # MIOpen has no such operator
        small = torch.ones(1, 1, 16, 16, device="cuda", dtype=torch.float16)
        torch.nn.functional.conv2d(small, small[:, :, :3, :3])
