"""Host code of an engine on CUDA tensors without memory that Dynamo can trace; all other tensors are real.

`torch_fake.HostMode` makes every tensor fake, and host code of an engine fills arrays of numpy and sends them to the device.

Upstream: `torch/overrides.py` (`TorchFunctionMode`), `torch/_C` (`DisableTorchFunction`),
`torch/utils/_python_dispatch.py` (`_disable_current_modes`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from aot_cache.upstream.virtual import this_gpu, torch_fake

_aten: Any = torch.ops.aten
_MAKE = (torch.tensor, torch.as_tensor)


class _Host(torch_fake.OnTheDevice):  # type: ignore[no-untyped-call]  # its base class has an untyped hook
    """CUDA tensors are fake, all others are real; no memory is pinned."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in torch_fake.PINNING:
            return args[0]
        if func is _aten.is_pinned.default:
            return False
        if func in torch_fake.VIEWS_OF_HOST:
            func, kwargs = _aten._to_copy.default, {"device": this_gpu.device()}
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Functions(TorchFunctionMode):
    """Functions that call the driver before they dispatch."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.new_tensor and args[0].device.type == "cuda":
            options = {"dtype": kwargs.get("dtype") or args[0].dtype, "device": kwargs.get("device") or args[0].device}
            return self.__torch_function__(torch.tensor, types, args[1:], options)
        if func in _MAKE and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            place = this_gpu.device()
            kwargs.pop("device")
            return _aten._to_copy.default(func(*args, **kwargs), device=place)
        return func(*args, **kwargs)


@contextlib.contextmanager
def running() -> Iterator[None]:
    """For host code of an engine. Launches of Triton kernels do nothing."""
    modes: Any = (_Host, _Functions)  # torch's base classes are untyped
    with modes[0](), modes[1](), torch_fake.without_launches():
        yield


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Inside `running`, for a compile: Dynamo sees the fake tensors, and no modes."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        yield
