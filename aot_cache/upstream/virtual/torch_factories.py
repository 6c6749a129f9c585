"""Ways to new tensors that ask the driver in C++ before they dispatch: pinned memory, a device by its number, CUDA itself.

For host code around kernels, which nobody traces: functions of `torch` are replaced.

Upstream: `torch` and `torch/_tensor.py` (which functions make tensors, and take `device` and `pin_memory` by name),
`torch/utils/_device.py` (`_device_constructors`), `torch/_C` (`_set_only_lift_cpu_tensors`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _device

_FACTORIES = (
    *("empty", "zeros", "ones", "full", "empty_strided", "empty_permuted", "eye", "arange", "linspace", "logspace"),
    *("rand", "randn", "randint", "randperm", "empty_like", "zeros_like", "ones_like", "full_like"),
    *("rand_like", "randn_like", "randint_like", "asarray"),
)
_FROM_DATA = ("tensor", "as_tensor")
_METHODS = ("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided")
_PINNED = "_aot_cache_pinned"


def pretend() -> None:
    """Make tensors by ways around the driver in this process, for good."""
    module: Any = torch
    tensor: Any = torch.Tensor
    torch._C._set_only_lift_cpu_tensors(True)  # data goes to CUDA by an operator, not under a device guard in C++
    _device._device_constructors()  # what `with torch.device(...)` is about: kept from now on, of torch's own functions
    for name in _FACTORIES:
        setattr(module, name, _without_the_driver(getattr(module, name)))
    for name in _FROM_DATA:
        setattr(module, name, _without_the_driver(_through_the_cpu(getattr(module, name))))
    for name in _METHODS:
        setattr(tensor, name, _without_the_driver(getattr(tensor, name)))
    tensor.pin_memory = lambda self, device=None: self if is_pinned(self) else _pin(self.clone())
    tensor.is_pinned = is_pinned


def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `.to(...)`; a device that is a number has its name, for which C++ would ask the driver."""
    return ((_device_of(args[0]), *args[1:]) if args else args), _named_device(kwargs)


def _device_of(device: Any) -> Any:
    return torch.device("cuda", device) if type(device) is int else device


def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    """Whether a tensor is in memory that would have been pinned, where there is a GPU."""
    return hasattr(tensor.untyped_storage(), _PINNED)  # a storage is one object as long as any tensor is in it


def _pin(tensor: torch.Tensor) -> torch.Tensor:
    setattr(tensor.untyped_storage(), _PINNED, True)
    return tensor


def _named_device(kwargs: dict[str, Any]) -> dict[str, Any]:
    if type(kwargs.get("device")) is int:
        return {**kwargs, "device": _device_of(kwargs["device"])}
    return kwargs


def _without_the_driver(make: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make)
    def made(*args: Any, **kwargs: Any) -> Any:
        pinned = kwargs.pop("pin_memory", False)
        out = make(*args, **_named_device(kwargs))
        return _pin(out) if pinned else out

    return made


def _through_the_cpu(make: Callable[..., Any]) -> Callable[..., Any]:
    """Without a compiler there is no device guard at all, and these take one."""

    @functools.wraps(make)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is not None and torch.device(device).type == "cuda":
            return make(data, *args, **kwargs).to(device)
        return make(data, *args, device=device, **kwargs)

    return made
