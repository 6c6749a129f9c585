"""Streams and events of the virtual device. They can be created, waited for and compared, but nothing runs on them.

They are subclasses of torch's classes, because C++ checks the type (`record_stream`). torch's own constructors and methods
call the driver, so each of them is replaced here.

Upstream: `torch/_C` (`Stream`, `Event`, which can be subclassed and created from numbers), `torch/cuda/streams.py`,
`torch/cuda/__init__.py` (`StreamContext`, `current_stream`, `default_stream`, `set_stream`).
"""

from __future__ import annotations

import itertools
import threading
from typing import Any

import torch

from aot_cache.errors import TraceError
from aot_cache.upstream.virtual import this_gpu

_CUDA_TYPE = 1  # c10::DeviceType::CUDA
_PLAIN_STREAM: Any = torch.Stream
_PLAIN_EVENT: Any = torch.Event
_numbers = itertools.count(1)  # 0 is the default stream, as in CUDA
_here = threading.local()


class Context:
    """Stands for `torch.cuda.device` and similar classes. Does nothing, because this process uses only one device."""

    def __init__(self, *_: Any) -> None:
        pass

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None: ...


def _is_elsewhere(device: Any) -> bool:
    """Whether `device` names another device than CUDA. `torch.cuda.Event(True)` names none; a number is a CUDA device."""
    return isinstance(device, (str, torch.device)) and torch.device(device).type != "cuda"


class Event(_PLAIN_EVENT):  # type: ignore[misc]  # torch's class is untyped
    """Stands for an event, for each of torch's ways to create one."""

    cuda_event = 0

    def __new__(cls, device: Any = None, **_: Any) -> Any:
        if _is_elsewhere(device):
            return _PLAIN_EVENT(device, **_)
        return super().__new__(cls, this_gpu.device())

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None: ...
    def wait(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...
    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        raise TraceError(
            "host code measures GPU time, which is unknown while tracing", hint="leave that out of the recipe"
        )


class Stream(_PLAIN_STREAM):  # type: ignore[misc]  # torch's class is untyped
    """Stands for a stream, for each of torch's ways to create one."""

    def __new__(cls, device: Any = None, priority: int = 0, **given: Any) -> Any:
        if _is_elsewhere(device):
            return _PLAIN_STREAM(device, **given)
        number = given["stream_id"] if "stream_id" in given else next(_numbers)
        stream = super().__new__(cls, stream_id=number, device_index=this_gpu.number(), device_type=_CUDA_TYPE)
        stream.priority = priority
        return stream

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -1

    @property
    def cuda_stream(self) -> int:
        return int(self.stream_id)

    @property
    def _as_parameter_(self) -> Any:
        import ctypes

        return ctypes.c_void_p(self.cuda_stream)

    def synchronize(self) -> None: ...
    def wait_stream(self, _: Any) -> None: ...
    def wait_event(self, _: Any) -> None: ...
    def query(self) -> bool:
        return True

    def record_event(self, event: Any = None) -> Any:
        return Event() if event is None else event

    def __enter__(self) -> Stream:
        _here.__dict__.setdefault("before", []).append(current())
        _here.current = self
        return self

    def __exit__(self, *_: object) -> None:
        _here.current = _here.before.pop()


class StreamContext(Context):
    """Stands for `torch.cuda.stream(...)`. With None it changes nothing."""

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream

    def __enter__(self) -> StreamContext:
        if self.stream is not None:
            self.stream.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.__exit__()


class ExternalStream(Stream):
    """Stands for a stream that another library created."""

    def __new__(cls, stream_ptr: int, device: Any = None, **_: Any) -> Any:
        return super().__new__(cls, device, stream_id=stream_ptr)


_DEFAULT: Stream = Stream(stream_id=0)


def default(_device: Any = None) -> Stream:
    return _DEFAULT


def current(_device: Any = None) -> Stream:
    """The current stream of this thread."""
    found: Any = getattr(_here, "current", _DEFAULT)
    return found  # type: ignore[no-any-return]


def set_current(stream: Any) -> None:
    if stream is not None:
        _here.current = stream


def pretend() -> None:
    """Replace torch's streams and events in this process. Not undone."""
    global _DEFAULT
    _DEFAULT = Stream(stream_id=0)  # of this process's GPU
    cuda: Any = torch.cuda
    cuda.Event = Event
    cuda.Stream = Stream
    cuda.ExternalStream = ExternalStream
    cuda.StreamContext = cuda.stream = StreamContext
    cuda.current_stream = current
    cuda.default_stream = default
    cuda.set_stream = set_current
    module: Any = torch
    module.Stream, module.Event = Stream, Event
    c: Any = torch._C
    c._cuda_getCurrentRawStream = lambda _device: current().cuda_stream
