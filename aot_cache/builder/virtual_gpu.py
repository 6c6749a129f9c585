"""A process that believes it has a GPU.

Everything here is process-wide and for good, so it runs only in the builder's worker processes, before any library that
decides at import is imported. Checked on an H200: 38 points of fla's gated delta rule, 1303 (kernel, key) pairs, the same
set at every point on the device and here, and the same `IS_*` flags of fla (artifacts/measurements).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from aot_cache.builder import cuda_driver, nvml
from aot_cache.errors import TargetError

if TYPE_CHECKING:
    from aot_cache.artifact.target import Target


compiled_calls: list[Any] = []
"""Each call of a `torch.compile`d function (`recorded_calls.call_of`): it ran as plain Python, and `builder.graphs` traces it."""


def become(target: Target) -> None:
    """Turn this process into one with `target` as its only GPU.

    Raises:
        TargetError: for the `cpu` target: Triton has no backend for it.
    """
    if target.backend == "cpu":
        raise TargetError("a GPU target for Triton kernels", "cpu", "name a GPU target (see `aot-cache targets`)")
    from aot_cache.upstream.virtual import (
        dynamo_off,
        torch_cuda,
        torch_guard,
        torch_modules,
        torch_shortcuts,
        triton_driver,
    )

    def note(function: Any, args: Any, kwargs: Any) -> None:
        from aot_cache.builder import recorded_calls

        compiled_calls.append(recorded_calls.call_of(function, args, kwargs))

    libraries(target)
    dynamo_off.run_as_python(note)
    with contextlib.suppress(TargetError):  # without a compiler what needs a guard (`~x`) fails by name, all else runs
        torch_guard.ensure()
    torch_shortcuts.install()
    torch_cuda.pretend(target)
    torch_modules.for_virtual_tensors()
    triton_driver.pretend(target)


def libraries(target: Target) -> None:
    """Answer what is asked beside torch and Triton: engines ask NVML, and extensions need a library of the driver's name."""
    import torch

    built: Any = torch.backends.cuda.is_built
    nvml.pretend(target)
    if target.backend == "cuda" and built():  # extensions for CUDA need a torch for CUDA, too
        cuda_driver.ensure()


@contextlib.contextmanager
def tensors() -> Iterator[None]:
    """Tensors made on `cuda` inside are virtual."""
    from aot_cache.upstream.virtual.torch_tensor import VirtualMode

    mode: Any = VirtualMode  # torch's base class is untyped
    with mode():
        yield
