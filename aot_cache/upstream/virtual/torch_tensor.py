"""A tensor with shape, strides, offset and a CUDA device, but without memory.

torch's own FakeTensor does the same, but takes 20 ms for one call of fla's `chunk_gated_delta_rule`, against 1-2 ms here
(2 cores, torch 2.13). Every declared point is run, so this factor decides whether a whole range can be checked. Two more
reasons: index tensors keep their *values* (host code reads varlen `cu_seqlens`), and custom ops run their real implementation,
which launches their kernels, instead of their fake one.

Upstream: `torch/_tensor.py` (`Tensor._make_wrapper_subclass`), `torch/_C` (its dispatch queries),
`torch/utils/_python_dispatch.py` (`TorchDispatchMode`).
"""

from __future__ import annotations

import contextlib
import copy
import math
import mmap
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from aot_cache.errors import DataDependent, TraceError, one_line
from aot_cache.upstream.virtual import this_gpu
from aot_cache.upstream.virtual.torch_fake import (
    VIEWS_OF_HOST,
    implementation_of,
    is_python,
    leaves,
    only_for,
    run_of_others,
    runs_on,
    written,
)

KNOWN_LIMIT = 1 << 16
"""Index tensors with up to this many elements keep their values."""
KNOWN_FLOATS = 1 << 10
"""The same limit for float tensors: host code reads a scale or a threshold, not the table of a rotary embedding."""

_FIRST, _ALIGNED = 1 << 21, 512  # blocks of torch's CUDA allocator are aligned to 512 bytes
_BUILTIN_NAMESPACES = frozenset({"aten", "prim", "prims", "_c10d_functional", "profiler"})

_INDEX_FACTORIES = ("aten::arange", "aten::full", "aten::zeros", "aten::ones", "aten::scalar_tensor")

_aten = torch.ops.aten
# Inference mode does not decompose composite operators.
_EQUAL = _aten.equal.default
_SCALARS = frozenset({_aten._local_scalar_dense.default, _aten.item.default, _aten.is_nonzero.default})
_TO_COPY = _aten._to_copy.default
_TO_DEVICE = {_aten.to.device, _aten.to.prim_Device}
"""`Tensor.to(device)`, which inference mode does not decompose from torch 2.15 on."""
_COPY_ = _aten.copy_.default
_EMPTY = _aten.empty.memory_format
_HUGE = 1 << 28
"""Tensors on the CPU with this many elements take no memory before they are written to."""
_NO_RESERVE = 0x4000  # Linux's MAP_NORESERVE, which Python's module does not name before 3.14
_PRIM_DEVICE = torch.ops.prim.device.default
_RECORD_STREAM = _aten.record_stream.default


ShortCut = Callable[[tuple[Any, ...], dict[str, Any]], "VirtualTensor | None"]
SHORT_CUTS: dict[Any, ShortCut] = {}
"""Operator → a fast path to its result; it returns None if the general path is needed. See `torch_shortcuts`."""


_addresses: dict[tuple[int, int], int] = {}
_next = _FIRST


def _address(storage: torch.UntypedStorage) -> int:
    """Where a storage begins. Two that exist at the same time do not overlap: host code tells tensors apart by it."""
    global _next
    size = storage.nbytes()
    found = _addresses.get((storage._cdata, size))
    if found is None:
        found = _addresses[storage._cdata, size] = _next
        _next += -(-max(size, 1) // _ALIGNED) * _ALIGNED
    return found


class _Values:
    """Shared state of the values that several views have; `lost` once unknown values were written to any part of them."""

    def __init__(self) -> None:
        self.lost = False


class VirtualTensor(torch.Tensor):
    """A tensor on the virtual device. `meta_` has its geometry; `known` its values, or None if host code cannot read them."""

    meta_: torch.Tensor
    values_: torch.Tensor | None
    shared_: _Values

    @property
    def known(self) -> torch.Tensor | None:
        return None if self.shared_.lost else self.values_

    @staticmethod
    def __new__(
        cls: type[VirtualTensor],
        meta: torch.Tensor,
        known: torch.Tensor | None = None,
        device: torch.device | None = None,
        shared: _Values | None = None,
    ) -> VirtualTensor:
        out: VirtualTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            layout=meta.layout,
            device=device or this_gpu.device(),
        )
        out.meta_ = meta
        out.values_ = known
        out.shared_ = shared or _Values()
        return out

    def data_ptr(self) -> int:
        # Pointer alignment is part of a Triton key: return an address as from torch's allocator, plus the offset.
        if self.numel() == 0:
            return 0
        return _address(self.meta_.untyped_storage()) + int(self.storage_offset()) * self.element_size()

    def untyped_storage(self) -> torch.UntypedStorage:
        # Triton's AMD backend needs the storage's size (2 GiB buffer addressing).
        return self.meta_.untyped_storage()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"VirtualTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __getitem__(self, index: Any) -> Any:
        # Tensor.__getitem__ uses a CUDA device guard in C++, which a CPU build of torch does not have.
        return _index(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        view, indices = _parts(self, index)
        if any(_is_unknown_mask(one) for one in indices):
            view.shared_.lost = True  # how many places are written to is not known, and no shape depends on it
        elif indices:
            value = (
                value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=self.dtype, device=self.device)
            )
            _aten.index_put_.default(view, indices, value)
        elif isinstance(value, torch.Tensor):
            view.copy_(value)
        else:
            view.fill_(value)

    # The methods below also use a device guard in C++ before they dispatch.

    def tolist(self) -> Any:
        return _values(self, "tolist()").tolist()

    def item(self) -> Any:
        return _values(self, "item()").item()

    def numpy(self, *, force: bool = False) -> Any:
        # Inherited, it would give whatever lies where the tensor has no memory.
        if self.device.type == "cuda" and not force:
            raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu() first")
        return _values(self, "numpy()").numpy()

    def __int__(self) -> int:
        return int(_values(self, "int()").item())

    def __index__(self) -> int:
        return int(_values(self, "index()").item())

    def __float__(self) -> float:
        return float(_values(self, "float()").item())

    def __bool__(self) -> bool:
        return bool(_values(self, "bool()").item())

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> torch.Tensor:
        if self.meta_.is_contiguous(memory_format=memory_format):
            return self
        out: torch.Tensor = _aten.clone.default(self, memory_format=memory_format)
        return out

    def nonzero(self, *, as_tuple: bool = False) -> Any:
        found = _aten.nonzero.default(self)
        return found.unbind(1) if as_tuple else found

    def new_tensor(  # type: ignore[override]
        self, data: Any, dtype: Any = None, device: Any = None, **_: Any
    ) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def copy_(self, source: torch.Tensor, non_blocking: bool = False) -> VirtualTensor:
        _COPY_(self, source, non_blocking)
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> VirtualTensor:
        if id(self) not in memo:
            copied = VirtualTensor(copy.deepcopy(self.meta_), copy.deepcopy(self.known), self.device)
            copied.__dict__.update(copy.deepcopy(extras_of(self), memo))
            memo[id(self)] = copied.requires_grad_(self.requires_grad)
        found: VirtualTensor = memo[id(self)]
        return found

    def __len__(self) -> int:
        if self.dim() == 0:
            raise TypeError("len() of a 0-d tensor")
        return int(self.shape[0])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub has the method without its class
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    __torch_function__: Any = torch._C._disabled_torch_function_impl


_OWN = ("meta_", "values_", "shared_")


def extras_of(tensor: torch.Tensor) -> dict[str, Any]:
    """Attributes that other code has set on a tensor, e.g. that it is a parameter, or how it is loaded."""
    return {name: value for name, value in tensor.__dict__.items() if name not in _OWN}


def become(tensor: torch.Tensor, other: VirtualTensor) -> None:
    """Implement `tensor.data = other`: `tensor` becomes virtual, whatever it was, and keeps its identity."""
    wanted, extras = tensor.requires_grad, extras_of(tensor)
    if isinstance(tensor, torch.nn.Parameter):
        extras["_is_param"] = True
    with torch.no_grad():
        twin = VirtualTensor(other.meta_, other.values_, other.device, other.shared_)
    torch._C._swap_tensor_impl(tensor, twin)
    tensor.__class__, tensor.__dict__ = VirtualTensor, {**extras, **{name: twin.__dict__[name] for name in _OWN}}
    tensor.requires_grad_(wanted)


class VirtualMode(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base class has an untyped hook
    """While active, tensors made on `cuda` are virtual."""

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch wraps each dispatch in torch.compiler.disable, 20 % of a point's time

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if isinstance(func, HigherOrderOperator):
            with self:  # `flex_attention`: run its implementation in plain operators
                return func.py_kernels[torch._C.DispatchKey.CompositeExplicitAutograd](*args, **(kwargs or {}))
        if func.namespace not in _BUILTIN_NAMESPACES:
            with self:  # a custom op's implementation creates tensors, too
                return dispatch(func, args, kwargs or {})
        return dispatch(func, args, kwargs or {})


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operator on the geometry of its arguments, and on their values if all are known.

    Raises:
        DataDependent: the operator needs unknown values.
        TraceError: torch has no shape rule for the operator, it rejects the arguments, or it has no CUDA kernel.
    """
    quick = SHORT_CUTS.get(func)
    if quick is not None:
        made = quick(args, kwargs)
        if made is not None:
            return made
    tensors = [t for t in leaves(args) if isinstance(t, VirtualTensor)]
    if kwargs:
        tensors += [t for t in leaves(tuple(kwargs.values())) if isinstance(t, VirtualTensor)]
    device = args[1] if func in _TO_DEVICE and len(args) > 1 else kwargs.get("device")
    wants_cuda = device is not None and torch.device(device).type == "cuda"
    if not tensors and not wants_cuda:
        if func in VIEWS_OF_HOST:
            return _view_of_host(args[0])
        if func is _EMPTY and math.prod(args[0]) >= _HUGE:
            return _reserved(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        return run_of_others(func, args, kwargs) if func.namespace not in _BUILTIN_NAMESPACES else func(*args, **kwargs)
    if func._schema.is_mutable and any(type(to) is torch.Tensor for to in written(func, args, kwargs)):
        return _write_to_host(func, args, kwargs)
    if func in _SCALARS:
        value = _values(args[0], "item()").item()
        return bool(value) if func is _aten.is_nonzero.default else value
    if func is _EQUAL:
        return args[0].shape == args[1].shape and torch.equal(*(_values(one, "equal()") for one in args))
    if func is _RECORD_STREAM:
        return None
    if func is _PRIM_DEVICE:
        return tensors[0].device
    if func.namespace not in _BUILTIN_NAMESPACES:
        implementation = implementation_of(func, "CUDA")
        if implementation is not None:
            return _run(func, implementation, args, kwargs)
        if found := only_for(func, "CUDA"):
            raise TraceError(
                f"operator {func} has no CUDA kernel, only {found}", hint="check which device its library found"
            )
        if not func._schema.returns:  # it only writes to its arguments
            _forget(func, args, kwargs)
            return None
    if func is _TO_COPY and device is not None and torch.device(device).type == "cpu":
        source = tensors[0]
        if source.known is not None:
            return func(source.known, **kwargs)
    return _compute(func, args, kwargs, tensors, device)


def _reserved(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the CPU whose memory is taken when it is written to: a server's host code makes ones that this machine has no
    memory for, and asks only for their strides."""
    size = math.prod(shape) * dtype.itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    return torch.frombuffer(pages, dtype=dtype).view(tuple(shape))


def _view_of_host(tensor: torch.Tensor) -> VirtualTensor:
    """A CUDA tensor in a CPU tensor's memory: it has the values that host code writes there."""
    known = tensor if tensor.numel() <= KNOWN_LIMIT else None
    return VirtualTensor(tensor.to("meta"), known)


def _write_to_host(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Write to a plain tensor: host code will read it, so the values that are written must be known."""

    def known(tensor: Any) -> Any:
        return _values(tensor, f"{func._schema.name} to a tensor on the CPU")

    return func(*_swap(args, known), **_swap(kwargs, known))


def _run(func: Any, implementation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator's own implementation: Python, or C++ that may itself be made of operators."""
    try:
        return implementation(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if is_python(func, "CUDA") or not runs_on(func, "CUDA"):
            raise
        raise TraceError(
            f"operator {func} is compiled code, and has no shape rule: {one_line(error)}",
            hint="register one (torch.library.register_fake)",
        ) from error


def _compute(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[VirtualTensor], device: Any
) -> Any:
    if func._schema.name == "aten::to":
        return _to(func, args, kwargs)
    if kwargs.get("generator") is not None:  # its numbers are never known, and its device does not exist here
        kwargs = {**kwargs, "generator": None}
    known = _known(func, args, kwargs, tensors, device)
    meta_kwargs = {**kwargs, "device": "meta"} if device is not None else kwargs
    try:
        if _has_geometry_of(known, func, tensors):
            out = torch.empty_strided(known.shape, known.stride(), dtype=known.dtype, device="meta")
        else:
            out = func(*_swap(args, _meta_of), **_swap(meta_kwargs, _meta_of))
    except (NotImplementedError, RuntimeError) as error:
        if known is not None:  # the shape depends on values, which are known (boolean masks, nonzero, equal)
            out = _swap_one(known, lambda tensor: tensor.to("meta"))
        else:
            raise _no_shape(func, tensors, error) from error
    out_device = torch.device(device) if device is not None else _device_of(tensors)
    if out_device.type == "cuda":
        out_device = this_gpu.device()
    return _wrap(out, known, tensors, out_device, func._schema.is_mutable, _is_view(func))


def _has_geometry_of(known: Any, func: Any, tensors: list[VirtualTensor]) -> bool:
    """Whether the result lies in memory as its values on the CPU do. Asking for its shape, too, takes half a millisecond, and
    most of what host code computes from known values is made of these operators."""
    if not isinstance(known, torch.Tensor):
        return False
    if func._schema.name in _INDEX_FACTORIES:
        return True
    return _is_elementwise(func) and all(
        t.values_ is not None and t.values_.stride() == t.meta_.stride() for t in tensors
    )


@cache
def _is_elementwise(func: Any) -> bool:
    """Whether ATen's `TensorIterator` gives the result its shape and strides, on any device."""
    return torch.Tag.pointwise in func.tags and not func._schema.is_mutable and not _is_view(func)


@cache
def _is_view(func: Any) -> bool:
    return any(result.alias_info is not None and not result.alias_info.is_write for result in func._schema.returns)


def _to(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`Tensor.to`: inference mode does not decompose it, and its C++ code uses a device guard."""
    named = {a.name: value for a, value in zip(func._schema.arguments, args)} | kwargs
    tensor = named["self"]
    like = named.get("other")
    dtype = named.get("dtype") or (like.dtype if like is not None else tensor.dtype)
    device = named.get("device") if named.get("device") is not None else (like.device if like is not None else None)
    device = tensor.device if device is None else torch.device(device)
    same_place = device.type == tensor.device.type
    if dtype == tensor.dtype and same_place and not named.get("copy"):
        return tensor
    options = {"dtype": dtype, "device": device}
    if named.get("memory_format") is not None:
        options["memory_format"] = named["memory_format"]
    return dispatch(_TO_COPY, (tensor,), options)


def _no_shape(func: Any, tensors: list[VirtualTensor], error: Exception) -> TraceError:
    if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
        return DataDependent(
            f"the result of {func} depends on values of {tensors}, which are not declared",
            hint="make the tensor from values in the recipe (torch.tensor([...], device='cuda'))",
        )
    if not isinstance(error, NotImplementedError):  # the call itself is wrong, on any device
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        return TraceError(
            f"{func} rejects tensors of shape {shapes}: {one_line(error)}", hint="correct the recipe's call"
        )
    return TraceError(
        f"operator {func} has no shape rule for the meta device", hint="register one (torch.library.register_fake)"
    )


def _known(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[VirtualTensor], device: Any) -> Any:
    """The result's values if all inputs' values are known and few; else None."""
    others = [t for t in leaves(args) if isinstance(t, torch.Tensor) and not isinstance(t, VirtualTensor)]
    unknown = any(t.known is None for t in tensors) or any(t.numel() > KNOWN_LIMIT for t in others)
    unknown = unknown or (func.namespace not in _BUILTIN_NAMESPACES and not runs_on(func, "CPU"))
    if unknown or torch.Tag.nondeterministic_seeded in func.tags:
        _forget(func, args, kwargs)
        return None
    if not tensors and not others and not _is_index_factory(func, args, kwargs):
        return None
    if _is_elementwise(func) and _is_large([*tensors, *others]):
        return None  # no values would be kept
    cpu_kwargs = {**kwargs, "device": "cpu"} if device is not None else kwargs
    return func(*_swap(args, _known_of), **_swap(cpu_kwargs, _known_of))


def _is_large(operands: list[Any]) -> bool:
    """Whether what they are broadcast to has more elements than are kept."""
    if math.prod(tensor.numel() for tensor in operands) <= KNOWN_LIMIT:
        return False
    try:
        shape: tuple[int, ...] = torch.broadcast_shapes(*(tensor.shape for tensor in operands))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return False  # the operator reports the error
    return math.prod(shape) > KNOWN_LIMIT


def _forget(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Mark the values of everything an operator writes to as unknown, for all views."""
    for tensor in written(func, args, kwargs):
        if isinstance(tensor, VirtualTensor):
            tensor.shared_.lost = True


def _is_index_factory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the operator creates a small integer tensor (arange, full, zeros …), whose values host code may read."""
    name = func._schema.name
    if name not in _INDEX_FACTORIES:
        return False
    if name != "aten::arange":
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
        dtype = given.get("dtype")
        if dtype is None and type(given.get("fill_value")) in (bool, int):
            dtype = torch.int64  # or bool: the fill value decides
        if dtype is None or dtype.is_floating_point or dtype.is_complex:
            return False
        return math.prod(given.get("size", ())) <= KNOWN_LIMIT
    return all(abs(a) <= KNOWN_LIMIT for a in args if isinstance(a, (int, float)))


def view_of_normal(
    out: torch.Tensor, values: torch.Tensor | None, device: torch.device, shared: _Values | None = None
) -> VirtualTensor:
    """A view, made in inference mode, of a tensor that was not: it is no inference tensor either, and torch's C++ code, which
    gives it the version counter of its base, requires that."""
    with torch.inference_mode(False):
        return VirtualTensor(out, values, device, shared)


def _wrap(out: Any, known: Any, inputs: list[VirtualTensor], device: torch.device, mutable: bool, aliases: bool) -> Any:
    if isinstance(out, torch.Tensor):
        if mutable:
            for tensor in inputs:  # in-place and out= operators return the given tensor
                if tensor.meta_ is out:
                    if tuple(tensor.shape) != tuple(out.shape):  # `unsqueeze_`: so have its values
                        become(tensor, VirtualTensor(out, tensor.values_, tensor.device, tensor.shared_))
                    return tensor
        values = known if isinstance(known, torch.Tensor) and known.numel() <= _most(known) else None
        shared = _shared_with(values, inputs)
        if aliases and torch.is_inference_mode_enabled() and not any(tensor.is_inference() for tensor in inputs):
            return view_of_normal(out, values, device, shared)
        return VirtualTensor(out, values, device, shared)
    if isinstance(out, (list, tuple)):
        parts = known if isinstance(known, (list, tuple)) and len(known) == len(out) else [None] * len(out)
        return type(out)(_wrap(o, k, inputs, device, mutable, aliases) for o, k in zip(out, parts))
    return out


def _most(known: torch.Tensor) -> int:
    return KNOWN_FLOATS if known.is_floating_point() else KNOWN_LIMIT


def _shared_with(values: torch.Tensor | None, inputs: list[VirtualTensor]) -> _Values | None:
    """The shared state of the input whose values these are a view of; None if of none."""
    if values is not None:
        for tensor in inputs:
            mine = tensor.values_
            if mine is not None and mine.untyped_storage().data_ptr() == values.untyped_storage().data_ptr():
                return tensor.shared_
    return None


_assumed: list[Callable[[str, str], None]] = []
"""The callback of `assuming`, if host code that reads unknown values reads ones."""


@contextlib.contextmanager
def assuming(note: Callable[[str, str], None]) -> Iterator[None]:
    """Inside, host code that reads unknown values reads ones. `note` is called with what is read, and where."""
    _assumed.append(note)
    try:
        yield
    finally:
        _assumed.remove(note)


def _ones(tensor: VirtualTensor, what: str) -> torch.Tensor:
    """Values for a tensor of which none are known."""
    inside = (__file__, os.path.dirname(torch.__file__) + os.sep)
    frame = next((f for f, _ in traceback.walk_stack(None) if not f.f_code.co_filename.startswith(inside)), None)
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else "?"
    _assumed[-1](f"{what} of {tensor!r}", place)
    with _disable_current_modes():
        return torch.ones(tensor.shape, dtype=tensor.dtype, device="cpu")


def _values(tensor: Any, what: str) -> torch.Tensor:
    if not isinstance(tensor, VirtualTensor):
        return tensor  # type: ignore[no-any-return]
    if tensor.known is None and _assumed:
        return _ones(tensor, what)
    if tensor.known is None:
        raise DataDependent(
            f"{what} reads the values of {tensor!r}, which are not declared",
            hint="make it from values in the recipe (torch.tensor([...], device='cuda')), or pass the number as an argument",
        )
    return tensor.known


def _index(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """`tensor[index]`, by operators that need no device guard."""
    out, indices = _parts(tensor, index)
    found: torch.Tensor = out
    if indices:
        found = _aten.index.Tensor(out, indices)
    elif out is tensor:
        found = _aten.alias.default(out)
    return found


def _is_unknown_mask(index: Any) -> bool:
    return isinstance(index, VirtualTensor) and index.dtype == torch.bool and index.known is None


def _parts(tensor: torch.Tensor, index: Any) -> tuple[Any, list[Any]]:
    """(a view of `tensor` for numbers and slices in `index`, the tensors in it, by dimension of that view)"""
    items = [_of_array(item) for item in (index if isinstance(index, tuple) else (index,))]
    taken = sum(1 for i in items if i is not None and i is not Ellipsis)
    if Ellipsis in [i for i in items if not isinstance(i, torch.Tensor)]:
        at = next(n for n, i in enumerate(items) if i is Ellipsis)
        items[at : at + 1] = [slice(None)] * (tensor.dim() - taken)
    out, dim = tensor, 0
    indices: list[Any] = []
    for item in items:
        if item is None:
            out = out.unsqueeze(dim)
            dim += 1
        elif isinstance(item, slice):
            if item != slice(None):
                bounds = [int(bound) if isinstance(bound, torch.Tensor) else bound for bound in (item.start, item.stop)]
                out = _aten.slice.Tensor(out, dim, *bounds, item.step or 1)
            dim += 1
        elif isinstance(item, (torch.Tensor, list)):
            item = item if isinstance(item, torch.Tensor) else torch.tensor(item)
            indices += [None] * (dim - len(indices)) + _places(item)
            dim += item.dim() if item.dtype == torch.bool else 1
        else:
            out = _aten.select.int(out, dim, int(item))
    return out, indices


def _of_array(item: Any) -> Any:
    """An array of numpy as a tensor, as which torch takes it in an index."""
    is_array = hasattr(item, "__array__") and hasattr(item, "ndim") and not isinstance(item, torch.Tensor)
    return torch.as_tensor(item) if is_array and item.ndim else item


def _places(index: torch.Tensor) -> list[torch.Tensor]:
    """An index as numbers: a mask of known values as the places where it is set, one tensor for each of its dimensions."""
    known = index.known if isinstance(index, VirtualTensor) else index
    if index.dtype != torch.bool or known is None:
        return [index]
    return list(known.nonzero(as_tuple=True))


def _swap(values: Any, swap: Any) -> Any:
    if isinstance(values, dict):
        return {name: _swap_one(value, swap) for name, value in values.items()}
    return [_swap_one(value, swap) for value in values]


def _swap_one(value: Any, swap: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return swap(value)
    if isinstance(value, (list, tuple)):
        return type(value)(_swap(value, swap))
    return value


def _meta_of(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, VirtualTensor):
        return tensor.meta_
    # An operator may mix a CPU scalar with a CUDA tensor. It must stay 0-dimensional on the meta device for type promotion.
    return tensor.to("meta")


def _known_of(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, VirtualTensor):
        assert tensor.known is not None
        return tensor.known
    return tensor


def _device_of(tensors: list[VirtualTensor]) -> torch.device:
    for tensor in tensors:
        if tensor.device.type == "cuda":
            return this_gpu.device()
    return tensors[0].device
