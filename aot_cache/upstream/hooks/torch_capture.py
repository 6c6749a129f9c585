"""What torch knows of CUDA's state, asked without initialising it; which captures are under way, and when they begin and end.

Upstream: `torch/cuda/graphs.py` (`CUDAGraph.capture_begin`, `capture_end`),
through which `torch.cuda.graph`, `make_graphed_callables` and Inductor's `cudagraph_trees` go as well.
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
"""Graphs that are being captured → (capture mode, thread). Weakly: a graph that is thrown away captures no more."""
_lock = threading.Lock()


def cuda_is_up() -> bool:
    """Whether this process has initialised CUDA. Imports and initialises nothing."""
    torch = sys.modules.get("torch")
    return torch is not None and hasattr(torch, "cuda") and bool(torch.cuda.is_initialized())


def on_rocm() -> bool:
    """Whether this process's torch is one for AMD's GPUs."""
    torch = sys.modules.get("torch")
    return torch is not None and getattr(torch.version, "hip", None) is not None


def capturing() -> bool:
    """Whether compiling, tuning or loading now, on this thread, could break a capture or get into one.

    So it is while the current stream is captured, and as long as a capture forbids it to this thread: one in mode
    `global`, whoever began it, or one in mode `thread_local` that this thread began, whatever stream is current now.
    """
    if not cuda_is_up():
        return False
    import torch

    try:
        if torch.cuda.is_current_stream_capturing():
            return True
    except RuntimeError:  # the legacy stream may not even be asked while another one is captured
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
    """Which of the GPUs that the process sees is the current one; the process must have initialised CUDA."""
    import torch

    return int(torch.cuda.current_device())


def watch_captures(before: Callable[[], None], after: Callable[[], None]) -> Callable[[], None]:
    """Call `before()` ahead of each `CUDAGraph.capture_begin` and `after()` behind each `capture_end`; note what is under way.

    `before` runs with the stream current that will be captured. Returns a function that takes the hooks out.
    torch 2.14 has public hooks (`register_graph_capture_start_hook`), which come too late for this: their start is called
    with the capture under way, when nothing may be loaded any more.
    """
    import torch

    graph: Any = torch.cuda.CUDAGraph
    ending = "capture_end_pre" if hasattr(graph, "capture_end_pre") else "capture_end"  # newer: the first half of it

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
    """`torch.cuda.graph(graph)`, after whose failure the process can go on, and which says what failed first.

    Upstream: where `capture_end` raises, `torch.cuda.graph.__exit__` does not give back the stream that was current, and the
    generators stay in their capture (`CUDAGeneratorState::capture_prologue` without its `capture_epilogue`): each random
    number after it raises "Offset increment outside graph capture". The error that broke the capture is only the context of
    what `capture_end` says.
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
