"""Makes a process behave as if it had a GPU.

Everything here is process-wide and cannot be undone, so it runs only in the builder's worker processes, before any library that
checks for a GPU at import. Verified against an H200 with 38 points of fla's gated delta rule: 1303 (kernel, key) pairs, the same
set at every point on the device and here, and the same `IS_*` flags of fla (artifacts/measurements).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from aot_cache.builder import cuda_driver, nvml
from aot_cache.errors import TargetError

if TYPE_CHECKING:
    from aot_cache.artifact.target import Target


compiled_calls: list[Any] = []
"""Calls of `torch.compile`d functions (`recorded_calls.call_of`). They ran as plain Python; `builder.graphs` traces them."""
Note = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]


def _note(function: Any, args: Any, kwargs: Any, _callback: Any) -> None:
    from aot_cache.builder import recorded_calls

    compiled_calls.append(recorded_calls.call_of(function, args, kwargs))


def become(target: Target, note: Note = _note) -> None:
    """Turn this process into one with `target` as its only GPU, or one of several (`this_gpu`). Compiled functions run as Python.

    Args:
        note: called before each call of a compiled function, see `dynamo_calls.note_calls`.

    Raises:
        TargetError: the target is `cpu`, for which Triton has no backend.
    """
    if target.backend == "cpu":
        raise TargetError("a GPU target for Triton kernels", "cpu", "name a GPU target (see `aot-cache targets`)")
    from aot_cache.upstream.hooks import dynamo_calls
    from aot_cache.upstream.virtual import (
        dynamo_off,
        torch_cuda,
        torch_guard,
        torch_modules,
        torch_shortcuts,
        triton_driver,
    )

    libraries(target)
    dynamo_off.run_as_python()
    dynamo_calls.note_calls(note)
    with contextlib.suppress(TargetError):  # without a compiler, only ops that need a guard (`~x`) fail
        torch_guard.ensure()
    torch_shortcuts.install()
    torch_cuda.pretend(target)
    torch_modules.for_virtual_tensors()
    triton_driver.pretend(target)


def libraries(target: Target) -> None:
    """Virtualise libraries other than torch and Triton: engines query NVML, and extensions need the driver's library."""
    import torch

    from aot_cache.upstream.virtual import this_gpu

    built: Any = torch.backends.cuda.is_built
    nvml.pretend(target, this_gpu.count())
    if target.backend == "cuda" and built():  # CUDA extensions need a CUDA build of torch
        cuda_driver.ensure()


@contextlib.contextmanager
def tensors() -> Iterator[None]:
    """Make all tensors on `cuda` virtual inside the block."""
    from aot_cache.upstream.virtual.torch_tensor import VirtualMode

    mode: Any = VirtualMode  # torch's base class is untyped
    with mode():
        yield


@contextlib.contextmanager
def assuming(note: Callable[[str, str], None]) -> Iterator[None]:
    """Inside, host code that reads values which nobody knows (sampled tokens) reads ones.

    Args:
        note: called with what is read, and with the place that reads it.
    """
    from aot_cache.upstream.virtual import torch_tensor

    with torch_tensor.assuming(note):
        yield


def kernel_was_launched(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forget the values of tensors that a Triton kernel may have written to."""
    from aot_cache.upstream.codec import triton_writes
    from aot_cache.upstream.virtual.torch_tensor import VirtualTensor

    def known(value: Any) -> list[VirtualTensor]:
        if isinstance(value, (list, tuple)):
            return [tensor for one in value for tensor in known(one)]
        return [value] if isinstance(value, VirtualTensor) and value.known is not None else []

    given = {**dict(zip(function.arg_names, args)), **kwargs}
    found = {name: tensors for name, value in given.items() if (tensors := known(value))}
    for name in found.keys() & triton_writes.written_by(function) if found else ():
        for tensor in found[name]:
            tensor.shared_.lost = True
