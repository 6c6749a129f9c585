"""Create tensors without asking the driver, as torch does in C++ for pinned memory, device numbers and CUDA tensors.

Replaces functions of `torch`. For host code around kernels, which is not traced by Dynamo.

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
    """Replace these functions in this process. Not undone."""
    module: Any = torch
    tensor: Any = torch.Tensor
    torch._C._set_only_lift_cpu_tensors(True)  # move data to CUDA by an operator, without a device guard in C++
    _device._device_constructors()  # fill the cache of `with torch.device(...)` with torch's own functions
    for name in _FACTORIES:
        setattr(module, name, _without_the_driver(getattr(module, name)))
    for name in _FROM_DATA:
        setattr(module, name, _without_the_driver(_through_the_cpu(getattr(module, name))))
    for name in _METHODS:
        setattr(tensor, name, _without_the_driver(getattr(tensor, name)))
    tensor.pin_memory = lambda self, device=None: self if is_pinned(self) else _pin(self.clone())
    tensor.is_pinned = is_pinned


def named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `.to(...)`, with a numeric device replaced by a named one: for a number, C++ would ask the driver."""
    return ((_device_of(args[0]), *args[1:]) if args else args), _named_device(kwargs)


def _device_of(device: Any) -> Any:
    return torch.device("cuda", device) if type(device) is int else device


def is_pinned(tensor: torch.Tensor, device: Any = None) -> bool:
    """Whether a tensor's memory would be pinned on a host with a GPU."""
    return hasattr(tensor.untyped_storage(), _PINNED)  # a storage stays one Python object as long as a tensor uses it


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
    """Create on the CPU, then move: these functions use a device guard, and without a C++ compiler there is none."""

    @functools.wraps(make)
    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        if device is not None and torch.device(device).type == "cuda":
            return make(data, *args, **kwargs).to(device)
        return make(data, *args, device=device, **kwargs)

    return made
