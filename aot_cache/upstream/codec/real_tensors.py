"""Facts about tensors (parameter or not, their memory), and a mode that fills tensors that a recipe leaves uninitialised.

Upstream: `torch/utils/_python_dispatch.py` (`TorchDispatchMode`), and which operators of aten return uninitialised memory;
`torch/nn/parameter.py` (`_is_param`, which marks subclasses of tensors as parameters).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Storage = Any
_SPREAD = 0.1
_UNSET = frozenset(
    {"empty", "empty_strided", "empty_permuted", "empty_like", "new_empty", "new_empty_strided", "empty_quantized"}
)
"""Operators of aten that return uninitialised memory."""


class Filling(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base class has an untyped hook
    """While active, fills new uninitialised tensors: small random floats from one seed; zeros for integers and booleans.

    Zeros, because an integer may be an index. Must not be active while a compiled function runs: under such a mode Dynamo
    skips frames.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if func.namespace == "aten" and func.overloadpacket.__name__ in _UNSET and isinstance(made, torch.Tensor):
            self._fill(made)
        return made

    def _fill(self, made: torch.Tensor) -> None:
        if made.device.type == "meta" or not made.numel():
            return
        if not (made.is_floating_point() or made.is_complex()):
            made.zero_()
            return
        generator = self._generators.get(made.device)
        if generator is None:
            generator = torch.Generator(made.device).manual_seed(self._seed)
            self._generators[made.device] = generator
        wide = made.dtype if made.dtype.itemsize > 1 else torch.float32  # torch.randn has no 8-bit dtypes
        values = torch.randn(made.shape, generator=generator, dtype=wide, device=made.device)
        made.copy_(values.mul_(_SPREAD))


def storage_of(tensor: torch.Tensor) -> tuple[tuple[str, int], Storage] | None:
    """((device, address), storage) of a tensor; None if it has no memory of its own."""
    try:
        found = tensor.untyped_storage()
        address = found.data_ptr()
    except (RuntimeError, NotImplementedError):
        return None
    return ((str(found.device), address), found) if address else None


def inner_tensors(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Attribute name → inner tensor, for a tensor subclass; empty for a plain tensor."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        return {}
    return {name: getattr(tensor, name) for name in flatten()[0]}


def is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) or bool(getattr(tensor, "_is_param", False))
