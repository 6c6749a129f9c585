"""Tensors without memory that Dynamo can trace, and custom operators that run their own Python on them.

torch's `FakeTensorMode` gives a custom operator's *shape rule*. Host code that is asked what it compiles must run the
operator itself: what it calls inside may be compiled, too (a compiled function in an opaque custom op). Tensors of our
own (`torch_tensor.VirtualTensor`) are faster, and Dynamo does not trace them.

Upstream: `torch/_subclasses/fake_tensor.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

_aten: Any = torch.ops.aten
_PINNING = (_aten._pin_memory.default, _aten.pin_memory.default)
_TO = tuple(getattr(_aten.to, name) for name in _aten.to.overloads())
BUILTIN = frozenset({"aten", "prim", "prims", "_c10d_functional", "profiler", "inductor", "higher_order"})
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What torch raises where host code reads the values of a tensor that has none."""

_base: Any = FakeTensorMode
_KNOWN: Any = hop_utils.registered_hop_fake_fns


class HostMode(_base):  # type: ignore[misc]  # torch's class is untyped
    """A `FakeTensorMode` for host code: operators outside of torch run what they would run on the device."""

    def __init__(self, device: str) -> None:
        # Loops in a graph (`while_loop`) want an environment; sizes and values stay what they are, or are refused.
        environment = ShapeEnv(allow_scalar_outputs=False, allow_dynamic_output_shape_ops=False)
        super().__init__(allow_non_fake_inputs=True, shape_env=environment, static_shapes=True)
        self._key = "CUDA" if device == "cuda" else "CPU"

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator) and func not in _KNOWN:
            # To torch 2.12 the rule of, for one, a Triton kernel in a graph is for the class itself, not for ours.
            return func.python_key_table[FakeTensorMode](self, *args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is _aten.record_stream.default:
            return None
        if func is _aten.detach_.default and not isinstance(args[0], FakeTensor):
            return args[0]  # a new one of `torch.tensor(..., device="meta")`, in inference mode
        if func in _PINNING:  # there is no memory that could be pinned
            func, args, kwargs = _aten.clone.default, args[:1], {}
        elif kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func in _TO:  # inference mode hands it over whole, and a constant would be moved for real
            with self:
                return func.decompose(*args, **kwargs)
        if func is _GROUPED_MM and args[0].dtype != torch.bfloat16:
            return _grouped_mm(*args)
        if getattr(func, "namespace", "aten") not in BUILTIN:
            implementation = implementation_of(func, self._key)
            if implementation is not None:
                # One that reads values calls nothing that is compiled, as far as can be seen: its shape rule answers.
                with contextlib.suppress(*NEEDS_VALUES), self:
                    return implementation(*args, **kwargs)
        return super().dispatch(func, types, args, kwargs)


def implementation_of(func: Any, key: str) -> Any:
    """What an operator outside of torch runs on the device of a dispatch key; None when it has only a shape rule.

    One that is written in C++ is its shape rule, where it has one: it reads and writes memory, and launches nothing of Triton's.
    """
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    for name in (key, "CompositeExplicitAutograd", "CompositeImplicitAutograd"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), name):
            if name == key and not _is_python(func, key) and _has_shape_rule(func):
                return None
            return lambda *args, **kwargs: func.redispatch(keys, *args, **kwargs)
    return None


def _is_python(func: Any, key: str) -> bool:
    """Whether Python has registered the implementation for a dispatch key."""
    namespace, _, name = func.name().partition("::")
    return f"{namespace}/{name}/{key}" in torch.library._impls


def _has_shape_rule(func: Any) -> bool:
    """Whether it is known what comes out: a rule says so, or nothing does."""
    return not func._schema.returns or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Meta")


_DEVICES = ("CPU", "XPU", "HPU", "MPS", "PrivateUse1")


def only_for(func: Any, key: str) -> str:
    """The devices that an operator outside of torch is for, where it is for none of a dispatch key; else nothing.

    With a shape rule alone an operator may be anything; with code for another device it would raise on this one.
    """
    if implementation_of(func, key) is not None or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
        return ""
    return ", ".join(name for name in _DEVICES if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), name))


def written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that an operator writes into."""
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args)} | kwargs
    return leaves([given.get(argument.name) for argument in func._schema.arguments if argument.is_write])


def leaves(values: Any) -> list[Any]:
    """What is in lists and tuples, and in those inside."""
    out = []
    for value in values:
        if isinstance(value, (list, tuple)):
            out += leaves(value)
        else:
            out.append(value)
    return out


def run_of_others(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator outside of torch on nothing virtual: with a mode on, which must not ask for it again."""
    implementation = implementation_of(func, "CUDA")
    if implementation is not None:
        return implementation(*args, **kwargs)
    with _disable_current_modes():
        return func(*args, **kwargs)


_GROUPED_MM = _aten._grouped_mm.default


def _grouped_mm(a: Any, b: Any, *_: Any) -> Any:
    """The product of groups of rows [s, k] and matrices [g, k, n]: [s, n]. Upstream's rule refuses what the CPU multiplies."""
    return a.new_empty(a.shape[0], b.shape[-1])


@cache
def host_mode(device: str) -> HostMode:
    """This process's one mode for host code: what a recipe keeps from its import on, or from point to point, stays usable."""
    return HostMode(device)


class OnTheDevice(TorchDispatchMode):  # type: ignore[no-untyped-call]  # its base class has an untyped hook
    """While a recipe is imported: tensors on CUDA are fake, and all others are what they are."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        fake = any(isinstance(value, FakeTensor) for value in pytree.tree_leaves((args, kwargs)))
        if not fake and (device is None or torch.device(device).type != "cuda"):
            return func(*args, **kwargs)
        with host_mode("cuda"):
            return func(*args, **kwargs)


@contextlib.contextmanager
def importing(device: str) -> Iterator[None]:
    """A recipe is imported inside."""
    mode: Any = OnTheDevice  # torch's base class is untyped
    with mode() if device == "cuda" else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def without_launches() -> Iterator[None]:
    """Triton kernels that host code launches inside do nothing: they are the kernel trace's business."""
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
