"""The virtual tensor's few busiest operators, without torch's shape rules.

Every declared point is run, and these operators are most of what host code around kernels does. torch computes their
shapes in 30 to 400 microseconds (partly in Python), which would be most of a build's tracing; here it is 15. Each
answers None where the general way has more to say (values that are known, other memory formats).

Seen to hold: see `versions.TORCH_SEEN`.
"""

from __future__ import annotations

from typing import Any

import torch

from aot_cache.upstream.torch_tensor import SHORT_CUTS, ShortCut, VirtualTensor

_aten = torch.ops.aten


def _quick_factory(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    device = kwargs.get("device")
    if device is None or device.type != "cuda" or kwargs.get("memory_format") not in _PLAIN_FORMATS:
        return None
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return VirtualTensor(torch.empty(args[0], dtype=dtype, device="meta"))


def _quick_zeros(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return _quick_factory(args, kwargs) if dtype.is_floating_point else None  # integers keep their values


def _quick_new(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    source = args[0]
    dtype = kwargs.get("dtype") or source.dtype
    if not isinstance(source, VirtualTensor) or kwargs.get("device") is not None or not dtype.is_floating_point:
        return None
    return VirtualTensor(torch.empty(args[1], dtype=dtype, device="meta"), None, source.device)


def _quick_empty_like(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    source = args[0]
    if not isinstance(source, VirtualTensor) or kwargs.get("device") is not None:
        return None
    if not source.meta_.is_contiguous() or kwargs.get("memory_format") not in _PLAIN_FORMATS:
        return None
    dtype = kwargs.get("dtype") or source.dtype
    return VirtualTensor(torch.empty(source.meta_.shape, dtype=dtype, device="meta"), None, source.device)


def _quick_pointwise(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    source = args[0]
    if (
        not isinstance(source, VirtualTensor)
        or source.known is not None
        or not source.dtype.is_floating_point
        or not source.meta_.is_contiguous()
    ):
        return None
    return VirtualTensor(torch.empty(source.meta_.shape, dtype=source.dtype, device="meta"), None, source.device)


def _quick_view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    source = args[0]
    if not isinstance(source, VirtualTensor) or source.known is not None:
        return None
    return VirtualTensor(source.meta_.view(args[1]), None, source.device)


_PLAIN_FORMATS = (None, torch.contiguous_format, torch.preserve_format)
_POINTWISE = ("neg", "abs", "sigmoid", "exp", "log", "silu", "tanh", "sqrt", "rsqrt")  # floats keep dtype and shape
_SHORT_CUTS: dict[Any, ShortCut] = {
    _aten.empty.memory_format: _quick_factory,
    _aten.randn.default: _quick_factory,
    _aten.rand.default: _quick_factory,
    _aten.zeros.default: _quick_zeros,
    _aten.new_empty.default: _quick_new,
    _aten.new_zeros.default: _quick_new,
    _aten.empty_like.default: _quick_empty_like,
    _aten.view.default: _quick_view,
    **{getattr(_aten, name).default: _quick_pointwise for name in _POINTWISE},
}


def install() -> None:
    """Use the short cuts in this process."""
    SHORT_CUTS.update(_SHORT_CUTS)
