"""CUDA's state as torch knows it, without initialising CUDA; which captures are active, and when they begin and end.

Upstream: `torch/cuda/graphs.py` (`CUDAGraph.capture_begin`, `capture_end`),
which `torch.cuda.graph`, `make_graphed_callables` and Inductor's `cudagraph_trees` use as well.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from aot_cache.upstream import patch

_under_way: weakref.WeakKeyDictionary[Any, tuple[str, int]] = weakref.WeakKeyDictionary()
"""Graph being captured → (capture mode, thread). Weak keys: a deleted graph captures no more."""
_lock = threading.Lock()


def cuda_is_up() -> bool:
    """Whether this process has initialised CUDA. Imports and initialises nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "cuda") and bool(torch.cuda.is_initialized())


def on_rocm() -> bool:
    """Whether this process's torch is a ROCm build."""
    torch = sys.modules.get("torch")
    return torch is not None and getattr(torch.version, "hip", None) is not None


def capturing() -> bool:
    """Whether compiling, tuning or loading on this thread could now break a capture, or be recorded by one.

    True if the current stream is being captured, if any thread has an active capture in mode `global`, or if this thread has
    one in mode `thread_local` (on any stream).
    """
    if not cuda_is_up():
        return False
    import torch

    try:
        if torch.cuda.is_current_stream_capturing():
            return True
    except RuntimeError:  # the legacy stream cannot even be queried during a capture on another stream
        return True
    me = threading.get_ident()
    with _lock:
        found = list(_under_way.values())
    return any(mode == "global" or (mode == "thread_local" and thread == me) for mode, thread in found)


def device_name() -> str:
    """The current device's name; the process must have initialised CUDA."""
    import torch

    return str(torch.cuda.get_device_name(torch.cuda.current_device()))


def device_number() -> int:
    """The index of the current GPU; the process must have initialised CUDA."""
    import torch

    return int(torch.cuda.current_device())


def watch_captures(before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Call `before()` before each `CUDAGraph.capture_begin` and `after()` after each `capture_end`; track active captures.

    `before` runs while the stream to be captured is current. Returns a function that takes the hooks out.
    torch 2.14 has public hooks (`register_graph_capture_start_hook`), but they run too late: the start hook is called when the
    capture is already active and nothing may be loaded.
    """
    import torch

    graph: Any = torch.cuda.CUDAGraph
    ending = "capture_end_pre" if hasattr(graph, "capture_end_pre") else "capture_end"  # newer releases: its first half

    def capture_begin(begin: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        before()
        mode = kwargs.get("capture_error_mode", args[1] if len(args) > 1 else "global")
        with _lock:
            _under_way[self] = (mode, threading.get_ident())
        try:
            return begin(self, *args, **kwargs)
        except BaseException:
            _ended(self)
            raise

    def capture_end(end: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return end(self, *args, **kwargs)
        finally:
            _ended(self)
            after()

    take_out = patch.replace_all(graph, {"capture_begin": capture_begin, ending: capture_end})

    def undo() -> None:
        take_out()
        with _lock:
            _under_way.clear()

    return undo


@contextmanager
def captured(graph: Any) -> Iterator[None]:
    """`torch.cuda.graph(graph)` that leaves the process usable after a failure, and raises the first error.

    Upstream: if `capture_end` raises, `torch.cuda.graph.__exit__` does not restore the previous stream, and the generators stay
    in capture state (`CUDAGeneratorState::capture_prologue` without its `capture_epilogue`), so that each later random number
    raises "Offset increment outside graph capture". The error that broke the capture is only the context of the error of
    `capture_end`.
    """
    import torch

    stream, broke = torch.cuda.current_stream(), None
    try:
        with torch.cuda.graph(graph):
            try:
                yield
            except BaseException as error:
                broke = error
                raise
    except BaseException:
        torch.cuda.set_stream(stream)
        for generator in torch.cuda.default_generators:
            fresh = torch.Generator(device=generator.device).manual_seed(generator.initial_seed())
            generator.graphsafe_set_state(fresh)
        if broke is not None:
            raise broke from None
        raise


def _ended(graph: Any) -> None:
    with _lock:
        _under_way.pop(graph, None)
