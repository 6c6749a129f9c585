"""Tensors without memory that Dynamo can trace, and custom operators that run their own Python on them.

torch's `FakeTensorMode` gives a custom operator's *shape rule*. Host code that is asked what it compiles must run the
operator itself: what it calls inside may be compiled, too (a compiled function in an opaque custom op). Tensors of our
own (`torch_tensor.VirtualTensor`) are faster, and Dynamo does not trace them.

Upstream: `torch/_subclasses/fake_tensor.py`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch._higher_order_ops import utils as hop_utils
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

BUILTIN = frozenset({"aten", "prim", "prims", "_c10d_functional", "profiler", "inductor", "higher_order"})
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)
"""What torch raises where host code reads the values of a tensor that has none."""

_base: Any = FakeTensorMode
_KNOWN: Any = hop_utils.registered_hop_fake_fns


class HostMode(_base):  # type: ignore[misc]  # torch's class is untyped
    """A `FakeTensorMode` for host code: operators outside of torch run what they would run on the device."""

    def __init__(self, device: str) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self._key = "CUDA" if device == "cuda" else "CPU"

    supports_higher_order_operators = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, HigherOrderOperator) and func not in _KNOWN:
            # To torch 2.12 the rule of, for one, a Triton kernel in a graph is for the class itself, not for ours.
            return func.python_key_table[FakeTensorMode](self, *args, **(kwargs or {}))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "namespace", "aten") not in BUILTIN:
            implementation = self._implementation(func)
            if implementation is not None:
                with self:
                    return implementation(*args, **kwargs)
        return super().dispatch(func, types, args, kwargs)

    def _implementation(self, func: Any) -> Any:
        keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, self._key))
        for key in (self._key, "CompositeExplicitAutograd", "CompositeImplicitAutograd"):
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
                return lambda *args, **kwargs: func.redispatch(keys, *args, **kwargs)
        return None


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


def is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter) or bool(getattr(tensor, "_is_param", False))
