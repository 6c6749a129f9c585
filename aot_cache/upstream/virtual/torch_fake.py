"""Tensors without memory that Dynamo can trace, with custom operators that run their own Python code on them.

torch's `FakeTensorMode` uses a custom operator's *shape rule*. To find what host code compiles, the operator itself must run,
because it may call compiled functions inside (a compiled function in an opaque custom op). Our own tensors
(`torch_tensor.VirtualTensor`) are faster, but Dynamo does not trace them.

Upstream: `torch/_subclasses/fake_tensor.py`, `torch/utils/_mode_utils.py` (`no_dispatch`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch._higher_order_ops import utils as hop_utils
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_aten: Any = torch.ops.aten
PINNING = (_aten._pin_memory.default, _aten.pin_memory.default)
_TO = tuple(getattr(_aten.to, name) for name in _aten.to.overloads())
VIEWS_OF_HOST: set[Any] = set()
"""Operators of others that give a CUDA tensor in the memory of a pinned CPU tensor."""
BUILTIN = frozenset({"aten", "prim", "prims", "_c10d_functional", "profiler", "inductor", "higher_order"})
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""Errors that torch raises when host code reads the values of a tensor without memory."""

_base: Any = FakeTensorMode
_KNOWN: Any = hop_utils.registered_hop_fake_fns


class HostMode(_base):  # type: ignore[misc]  # torch's class is untyped
    """A `FakeTensorMode` for host code: operators outside of torch run their implementation for the device."""

    def __init__(self, device: str) -> None:
        # Loops in a graph (`while_loop`) need a shape environment. Sizes stay concrete; unknown values are refused.
        environment = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        super().__init__(allow_non_fake_inputs=True, shape_env=environment, static_shapes=True)
        self._key = "CUDA" if device == "cuda" else "CPU"

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator) and func not in _KNOWN:
            # Up to torch 2.12 some rules (e.g. for a Triton kernel in a graph) are registered for FakeTensorMode only.
            return func.python_key_table[FakeTensorMode](self, *args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.record_stream.default:
            return None
        if func is _aten.detach_.default and not isinstance(args[0], FakeTensor):
            return args[0]  # a new `torch.tensor(..., device="meta")`, in inference mode
        if func in PINNING:  # no memory to pin
            func, args, kwargs = _aten.clone.default, args[:1], {}
        elif kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func in _TO:  # not decomposed in inference mode; a constant would really be moved
            with self:
                return func.decompose(*args, **kwargs)
        if func is _GROUPED_MM and args[0].dtype != torch.bfloat16:
            return _grouped_mm(*args)
        if getattr(func, "namespace", "aten") not in BUILTIN:
            implementation = implementation_of(func, self._key)
            if implementation is not None:
                # If it reads values, fall through to its shape rule, assuming that it calls nothing compiled.
                with contextlib.suppress(*NEEDS_VALUES), self:
                    return implementation(*args, **kwargs)
        return super().dispatch(func, types, args, kwargs)


def implementation_of(func: Any, key: str) -> Any:
    """The implementation of an operator outside of torch for a dispatch key; None if only its shape rule can be used.

    An operator written in C++ uses its shape rule if it has one: it accesses memory, and launches no Triton kernels.
    """
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    for name in (key, "CompositeExplicitAutograd", "CompositeImplicitAutograd"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), name):
            if name == key and not is_python(func, key) and _has_shape_rule(func):
                return None
            return lambda *args, **kwargs: func.redispatch(keys, *args, **kwargs)
    return None


def runs_on(func: Any, key: str) -> bool:
    """Whether an operator has code for a dispatch key, and not only a shape rule."""
    names = (key, "CompositeExplicitAutograd", "CompositeImplicitAutograd")
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), name) for name in names)


def is_python(func: Any, key: str) -> bool:
    """Whether the implementation for a dispatch key was registered from Python."""
    namespace, _, name = func.name().partition("::")
    return f"{namespace}/{name}/{key}" in torch.library._impls


def _has_shape_rule(func: Any) -> bool:
    """Whether the result's shape is known: by a shape rule, or because nothing is returned."""
    return not func._schema.returns or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Meta")


_DEVICES = ("CPU", "XPU", "HPU", "MPS", "PrivateUse1")


def only_for(func: Any, key: str) -> str:
    """The devices that an operator outside of torch supports, if it does not support that of `key`; else an empty text.

    Also empty if it has only a shape rule. With code only for another device it would raise on this one.
    """
    if implementation_of(func, key) is not None or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
        return ""
    return ", ".join(name for name in _DEVICES if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), name))


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes to."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    return leaves([given.get(argument.name) for argument in func._schema.arguments if argument.is_write])


def leaves(values: Any) -> list[Any]:
    """The items of nested lists and tuples, flattened."""
    out = []
    for value in values:
        if isinstance(value, (list, tuple)):
            out += leaves(value)
        else:
            out.append(value)
    return out


def run_of_others(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator outside of torch without virtual arguments, without calling the active mode again."""
    implementation = implementation_of(func, "CUDA")
    if implementation is not None:
        return implementation(*args, **kwargs)
    with _disable_current_modes():
        return func(*args, **kwargs)


_GROUPED_MM = _aten._grouped_mm.default


def _grouped_mm(a: Any, b: Any, *_: Any) -> Any:
    """Grouped product of rows [s, k] with matrices [g, k, n]: [s, n]. Upstream's rule refuses dtypes that the CPU supports."""
    return a.new_empty(a.shape[0], b.shape[-1])


@cache
def host_mode(device: str) -> HostMode:
    """The single mode for host code in this process, so that tensors kept since import or an earlier point stay usable."""
    return HostMode(device)


def of_shape(like: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """A contiguous tensor with unknown values of this shape, otherwise as `like`, which its mode has made.

    As `torch.empty` in the mode, which takes 1.2 ms for each new shape (its cache has an entry for each); this takes 0.05.
    """
    if not isinstance(like, FakeTensor):
        return torch.empty(list(shape), dtype=like.dtype, device=like.device)
    with no_dispatch():
        meta = torch.empty(list(shape), dtype=like.dtype, device="meta")
    return FakeTensor(like.fake_mode, meta, like.device)


class OnTheDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base class has an untyped hook
    """Active while a recipe is imported: CUDA tensors are fake, all others are real."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = pytree.tree_leaves((args, kwargs))
        # `aten.to.device` has its device among the arguments: in inference mode, `.to(device)` is not taken apart
        on_the_device = any(isinstance(value, torch.device) and value.type == "cuda" for value in given)
        if not on_the_device and not any(isinstance(value, FakeTensor) for value in given):
            return func(*args, **kwargs)
        with host_mode("cuda"):
            return func(*args, **kwargs)


@contextlib.contextmanager
def importing(device: str) -> Iterator[None]:
    """For the import of a recipe."""
    mode: Any = OnTheDevice  # torch's base class is untyped
    with mode() if device == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Inside, launches of Triton kernels do nothing: kernels are traced separately."""
    try:
        from triton.runtime.autotuner import Autotuner
        from triton.runtime.jit import JITFunction
    except ImportError:  # a CPU build without Triton
        yield
        return
    before = JITFunction.run, Autotuner.run
    JITFunction.run = Autotuner.run = lambda self, *args, **kwargs: None
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = before
