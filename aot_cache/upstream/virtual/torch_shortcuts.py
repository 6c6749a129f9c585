"""Fast shape rules for the virtual tensor's most frequent operators, instead of torch's.

Every declared point is run, and host code around kernels consists mostly of these operators. torch computes their shapes in 30
to 400 microseconds (partly in Python), which would be most of a build's tracing; here it takes 15. Also, for 3 % of random
operands torch's rules for pointwise operators (`torch._prims_common`) give dimensions of size 1 other strides than ATen does,
and strides can be part of a kernel's key. A function returns None if the general path is needed (known values, other memory
formats).

Upstream: the shapes, strides and types that ATen's operators give (`aten/src/ATen/native/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from aot_cache.upstream.virtual.torch_tensor import SHORT_CUTS, ShortCut, VirtualTensor, view_of_normal

_aten = torch.ops.aten


def _new(shape: Sequence[int], dtype: torch.dtype, device: torch.device | None = None) -> VirtualTensor:
    """A new contiguous tensor with unknown values."""
    return VirtualTensor(torch.empty(shape, dtype=dtype, device="meta"), None, device)


def _quick_factory(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    device = kwargs.get("device")
    if device is None or device.type != "cuda" or kwargs.get("memory_format") not in _PLAIN_FORMATS:
        return None
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return _new(args[0], dtype)


def _quick_zeros(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    dtype = kwargs.get("dtype") or torch.get_default_dtype()
    return _quick_factory(args, kwargs) if dtype.is_floating_point else None  # integers keep their values


def _quick_new(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    source = args[0]
    dtype = kwargs.get("dtype") or source.dtype
    if not isinstance(source, VirtualTensor) or kwargs.get("device") is not None or not dtype.is_floating_point:
        return None
    return _new(args[1], dtype, source.device)


def _quick_empty_like(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    source = args[0]
    if not isinstance(source, VirtualTensor) or kwargs.get("device") is not None:
        return None
    if not source.meta_.is_contiguous() or kwargs.get("memory_format") not in _PLAIN_FORMATS:
        return None
    dtype = kwargs.get("dtype") or source.dtype
    return _new(source.meta_.shape, dtype, source.device)


def _quick_view(func: Any) -> ShortCut:
    def view(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
        source = args[0]
        if not isinstance(source, VirtualTensor) or source.known is not None:
            return None
        try:
            made = func(source.meta_, *args[1:], **kwargs)
            if torch.is_inference_mode_enabled() and not source.is_inference():
                return view_of_normal(made, None, source.device)
            return VirtualTensor(made, None, source.device)
        except (IndexError, RuntimeError):
            return None  # the general path reports the error

    return view


def _quick_arithmetic(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    return None if kwargs or args[0].dtype == torch.bool else _result(args, _promoted(*args))


def _quick_division(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    return _quick_arithmetic(args, kwargs) if args[0].dtype.is_floating_point else None


def _quick_bits(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    return None if args[0].dtype.is_floating_point else _result(args, _promoted(*args))


def _quick_comparison(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    return _result(args, torch.bool)


def _quick_unary(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    return _result(args[:1], args[0].dtype) if args[0].dtype.is_floating_point else None


def _quick_mean(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    """Mean over the last dimension, as in norms."""
    source, dims = args[:2]
    if kwargs or not _is_plain_float(source) or dims != [-1] or not source.dim():
        return None
    shape = [*source.meta_.shape[:-1], *([1] if args[2:] == (True,) else [])]
    return _new(shape, source.dtype, source.device)


def _quick_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    source, device = args[0], kwargs.get("device")
    if not _is_plain_float(source) or kwargs.get("memory_format") not in _PLAIN_FORMATS:
        return None
    if (device is not None and device != source.device) or kwargs.get("layout") not in (None, torch.strided):
        return None
    dtype = kwargs.get("dtype") or source.dtype
    return _new(source.meta_.shape, dtype, source.device)


def _quick_mm(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    one, other = args
    if not isinstance(one, VirtualTensor) or not isinstance(other, VirtualTensor) or one.dim() != 2 or other.dim() != 2:
        return None
    (rows, inner), (same, columns) = one.meta_.shape, other.meta_.shape
    if inner != same or one.dtype != other.dtype or one.device != other.device or one.known is not None or kwargs:
        return None
    return _new((rows, columns), one.dtype, one.device)


def _quick_cat(args: tuple[Any, ...], kwargs: dict[str, Any]) -> VirtualTensor | None:
    """Contiguous result, if no tensor looks like channels last (`at::native::cat`, TensorShape.cpp)."""
    tensors, dim = args[0], args[1] if len(args) > 1 else 0
    first = tensors[0] if tensors else None
    if not isinstance(first, VirtualTensor) or not first.dim():
        return None
    dim %= first.dim()
    rest = (*first.meta_.shape[:dim], *first.meta_.shape[dim + 1 :])
    for one in tensors:
        if not isinstance(one, VirtualTensor) or one.dtype != first.dtype or one.device != first.device:
            return None
        shape, strides = one.meta_.shape, one.meta_.stride()
        if (*shape[:dim], *shape[dim + 1 :]) != rest or 0 in shape:
            return None
        if len(shape) in _CHANNELS_LAST and not strides[-1] == 1 < strides[1]:
            return None
    if all(one.known is not None for one in tensors):
        return None
    size = sum(one.meta_.shape[dim] for one in tensors)
    whole = (*rest[:dim], size, *rest[dim:])
    return _new(whole, first.dtype, first.device)


def _is_plain_float(tensor: Any) -> bool:
    """Whether it is a virtual float tensor with unknown values, and with the strides of a new tensor of its shape."""
    return (
        isinstance(tensor, VirtualTensor)
        and tensor.dtype.is_floating_point
        and tensor.meta_.stride() == _strides(tensor.meta_.shape)
        and tensor.known is None
    )


_Geometry = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""
_Operand = tuple[tuple[int, ...], tuple[int, ...], bool]
"""Shape, strides, and whether it is contiguous."""
_NUMBER: _Operand = ((), (), True)


def _result(operands: tuple[Any, ...], dtype: torch.dtype | None) -> VirtualTensor | None:
    """Result of a pointwise operator with unknown values. A number counts as a 0-dimensional tensor, as in ATen."""
    first, unknown = operands[0], False
    found: list[_Operand] = []
    if dtype is None or not isinstance(first, VirtualTensor):
        return None
    for one in operands:
        if isinstance(one, VirtualTensor) and one.device == first.device:
            unknown = unknown or one.known is None
            found.append((one.meta_.shape, one.meta_.stride(), one.meta_.is_contiguous()))
        elif isinstance(one, torch.Tensor):
            return None
        else:
            found.append(_NUMBER)
    geometry = _ordered(*found) if unknown else None
    if geometry is None:
        return None
    return VirtualTensor(torch.empty_strided(*geometry, dtype=dtype, device="meta"), None, first.device)


def _promoted(one: torch.Tensor, other: Any) -> torch.dtype | None:
    """The result type in simple cases (equal types, floats, a number that does not widen the type); else None."""
    if isinstance(other, torch.Tensor):
        if other.dtype == one.dtype:
            return one.dtype
        floats = one.dtype.is_floating_point and other.dtype.is_floating_point
        return torch.promote_types(one.dtype, other.dtype) if floats and one.dim() and other.dim() else None
    kinds = (int, float, bool) if one.dtype.is_floating_point else (int,)
    return one.dtype if type(other) in kinds and one.dtype != torch.bool else None


@lru_cache(maxsize=1 << 16)
def _ordered(*operands: _Operand) -> _Geometry | None:
    """Shape and strides of a pointwise operator's result, by ATen's rule for the order of dimensions in memory.

    None in cases with other rules: channels last, empty tensors, shapes that do not broadcast.
    Source: `TensorIteratorBase`'s `compute_fast_setup_type` and `reorder_dimensions`, aten/src/ATen/TensorIterator.cpp.
    """
    shape, first, _ = operands[0]
    if any(one[0] != shape for one in operands):
        try:
            shape = torch.broadcast_shapes(*(one[0] for one in operands))  # type: ignore[no-untyped-call]
        except RuntimeError:
            return None
    elif all(contiguous for _, _, contiguous in operands):
        return shape, _strides(shape)
    elif all(_is_channels_last(shape, strides) for _, strides, _ in operands):
        return None
    elif all(strides == first for _, strides, _ in operands) and _is_dense(shape, first):
        return shape, first
    if 0 in shape:
        return None
    rows = [_expanded(strides, own, shape) for own, strides, _ in operands]
    order = _inner_first(shape, rows)
    found, step = [0] * len(shape), 1
    for dim in order:
        found[dim], step = step, step * shape[dim]
    return shape, tuple(found)


def _inner_first(shape: tuple[int, ...], rows: list[list[int]]) -> list[int]:
    """Dimensions, fastest first, each pair sorted by the strides of the first operand in which they differ."""

    def after(one: int, other: int) -> int:
        for row in rows:
            if row[one] and row[other]:  # stride 0 is broadcast, and decides nothing
                if row[one] != row[other]:
                    return 1 if row[one] > row[other] else -1
                if shape[one] > shape[other]:
                    return 1
        return 0

    order = list(range(len(shape)))[::-1]
    for number in range(1, len(order)):
        at = number
        for before in range(number - 1, -1, -1):
            told = after(order[before], order[at])
            if told < 0:
                break
            if told > 0:
                order[before], order[at] = order[at], order[before]
                at = before
    return order


def _expanded(strides: tuple[int, ...], own: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    lacking = len(shape) - len(own)
    return [0] * lacking + [
        0 if have == 1 and want != 1 else stride for stride, have, want in zip(strides, own, shape[lacking:])
    ]


def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape) if size > 1):
        if stride != step:
            return False
        step *= size
    return True


_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def _is_channels_last(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    if len(shape) not in _CHANNELS_LAST:
        return False
    tensor = torch.empty_strided(shape, strides, device="meta")
    return tensor.is_contiguous(memory_format=_CHANNELS_LAST[len(shape)])


@lru_cache(maxsize=4096)
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


_PLAIN_FORMATS = (None, torch.contiguous_format, torch.preserve_format)
# The result has the type of a float input.
_POINTWISE = ("neg", "abs", "sigmoid", "exp", "log", "silu", "softplus", "tanh", "sqrt", "rsqrt", "sin", "cos")
_ARITHMETIC = ("add", "sub", "mul")
_BITS = ("bitwise_and", "bitwise_or", "bitwise_xor")
_KINDS = ("Tensor", "Scalar")
_VIEWS = (
    *(getattr(_aten, name).default for name in ("view", "_unsafe_view", "t", "unsqueeze", "expand", "permute")),
    _aten.transpose.int,
    _aten.select.int,
    _aten.slice.Tensor,
)
_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_SHORT_CUTS: dict[Any, ShortCut] = {
    _aten.empty.memory_format: _quick_factory,
    _aten.randn.default: _quick_factory,
    _aten.rand.default: _quick_factory,
    _aten.zeros.default: _quick_zeros,
    _aten.new_empty.default: _quick_new,
    _aten.new_zeros.default: _quick_new,
    _aten.empty_like.default: _quick_empty_like,
    _aten.pow.Tensor_Scalar: _quick_unary,
    _aten.mean.dim: _quick_mean,
    _aten.mm.default: _quick_mm,
    _aten.cat.default: _quick_cat,
    _aten._to_copy.default: _quick_to,
    **{view: _quick_view(view) for view in _VIEWS},
    **{getattr(_aten, name).default: _quick_unary for name in _POINTWISE},
    _aten.div.Tensor: _quick_division,
    **{getattr(_aten, name).Tensor: _quick_arithmetic for name in _ARITHMETIC},
    **{getattr(getattr(_aten, name), kind): _quick_bits for name in _BITS for kind in _KINDS},
    **{getattr(getattr(_aten, name), kind): _quick_comparison for name in _COMPARISONS for kind in _KINDS},
}


def install() -> None:
    """Enable these fast paths in this process."""
    SHORT_CUTS.update(_SHORT_CUTS)
