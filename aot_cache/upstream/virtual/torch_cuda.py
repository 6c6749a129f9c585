"""Answer Python code's questions to `torch.cuda` about the device, from a target.

Only called in a worker process of the builder, before anything else is imported there, because libraries decide at import
time (fla fixes warps and Hopper flags, transformers calls `is_available()`). torch itself must not reach the driver.

Upstream: `torch/cuda/__init__.py` (its answers about a device, `_lazy_init`), `torch/_C` (its streams).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from aot_cache.upstream.virtual import this_gpu, torch_factories, torch_graphs, torch_random, torch_streams

if TYPE_CHECKING:
    from aot_cache.artifact.target import Target

ASSUMED_CUDA = "13.0"
ASSUMED_ROCM = "7.1"
"""`torch.version` of a serving image. Libraries read it, and a CPU build of torch has none."""
_ALLOCATED = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")


def device_properties(target: Target) -> SimpleNamespace:
    """The fields of `torch.cuda.get_device_properties` that code generation and libraries read."""
    return SimpleNamespace(
        name=target.name,
        major=target.capability[0],
        minor=target.capability[1],
        multi_processor_count=target.multiprocessors,
        total_memory=target.memory_bytes,
        warp_size=target.warp_size,
        regs_per_multiprocessor=target.registers_per_multiprocessor,
        max_threads_per_multi_processor=target.threads_per_multiprocessor,
        max_threads_per_block=target.threads_per_block,
        shared_memory_per_block=target.shared_memory_per_block,
        shared_memory_per_block_optin=target.shared_memory_per_block_optin,
        shared_memory_per_multiprocessor=target.shared_memory_per_multiprocessor,
        L2_cache_size=target.l2_bytes,
        gcnArchName=target.arch if target.backend == "hip" else "",
        is_integrated=False,
        is_multi_gpu_board=False,
    )


def pretend(target: Target, tensors: bool = True) -> None:
    """Answer for `target` in this process. Cannot be undone: use a worker process.

    Args:
        target: the GPU to imitate.
        tensors: also replace functions that create or move CUDA tensors, to avoid C++ device guards. Dynamo cannot trace them.
    """
    properties = device_properties(target)
    cuda: Any = torch.cuda
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": this_gpu.always(this_gpu.count()),
        "_device_count_nvml": this_gpu.always(this_gpu.count()),
        "current_device": this_gpu.always(this_gpu.number()),
        "set_device": lambda _device: None,
        "get_device_properties": lambda _device=None: properties,
        "get_device_capability": lambda _device=None: target.capability,
        "get_device_name": lambda _device=None: target.name,
        "get_arch_list": lambda: [f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)],
        "is_bf16_supported": lambda *_, **__: target.backend != "cuda" or target.capability >= (8, 0),
        "mem_get_info": lambda _device=None: (target.memory_bytes, target.memory_bytes),
        "synchronize": lambda _device=None: None,
        "empty_cache": lambda: None,
        "init": lambda: None,
        "_lazy_init": lambda: None,
        "device": torch_streams.Context,
        "device_of": torch_streams.Context,
        "ipc_collect": lambda: None,
        "memory_stats": lambda _device=None: {},
        "reset_peak_memory_stats": lambda _device=None: None,
        "reset_max_memory_allocated": lambda _device=None: None,
        **dict.fromkeys(_ALLOCATED, lambda _device=None: 0),
    }
    for name, answer in answers.items():
        setattr(cuda, name, answer)
    version: Any = torch.version
    version.hip = ASSUMED_ROCM if target.backend == "hip" else None
    if target.backend == "hip":
        version.cuda = None
    elif version.cuda is None:
        version.cuda = ASSUMED_CUDA
    # The device guard of a CUDA build fails without a GPU; use the no-op one that torch has for fake tensors.
    torch._C._ensureCUDADeviceGuardSet()
    c: Any = torch._C
    c._cuda_getDevice = this_gpu.always(this_gpu.number())
    torch_streams.pretend()
    torch_graphs.pretend()
    _be_the_accelerator(target)
    torch_random.pretend()
    if tensors:
        torch_factories.pretend()
        _move_tensors()


def _be_the_accelerator(target: Target) -> None:
    """Answer for `torch.accelerator`, which host code that is independent of the backend uses."""
    answers: dict[str, Any] = {
        "current_accelerator": lambda check_available=False: torch.device("cuda"),
        "is_available": lambda: True,
        "device_count": this_gpu.always(this_gpu.count()),
        "current_device_index": this_gpu.always(this_gpu.number()),
        "current_device_idx": this_gpu.always(this_gpu.number()),
        "set_device_index": lambda _device: None,
        "set_device_idx": lambda _device: None,
        "device_index": torch_streams.Context,
        # Separate functions: Dynamo has a rule for each of torch's functions, and they must not be the same object.
        "current_stream": lambda _device=None: torch_streams.current(),
        "set_stream": lambda stream: torch_streams.set_current(stream),
        "synchronize": lambda _device=None: None,
        "empty_cache": lambda: None,
        "get_device_capability": lambda _device=None: target.capability,
        "get_memory_info": lambda _device=None: (target.memory_bytes, target.memory_bytes),
        "memory_stats": lambda _device=None: {},
        "reset_peak_memory_stats": lambda _device=None: None,
        "reset_accumulated_memory_stats": lambda _device=None: None,
        **dict.fromkeys(_ALLOCATED, lambda _device=None: 0),
    }
    for name, answer in answers.items():
        if hasattr(torch.accelerator, name):  # newer releases have more of them
            setattr(torch.accelerator, name, answer)


def _move_tensors() -> None:
    """Replace moves between devices on CPU builds: they use a device guard in C++, which these builds lack."""
    built: Any = torch.backends.cuda.is_built
    if not built():
        _move_without_a_guard()


def _move_without_a_guard() -> None:
    """Implement `Tensor.to`, `.cuda` and `.cpu` by the operator that they finally call."""
    tensor: Any = torch.Tensor
    plain_to = tensor.to

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, memory_format = _parse_to(*args, **kwargs)
        goes = device is not None and device.type == "cuda"
        if not goes and self.device.type != "cuda":
            return plain_to(self, *args, **kwargs)
        place, kind = device or self.device, dtype or self.dtype
        if place.type == self.device.type and kind == self.dtype and not kwargs.get("copy", False):
            return self
        options: dict[str, Any] = {"device": place, "dtype": kind}
        if memory_format is not None:
            options["memory_format"] = memory_format
        return torch.ops.aten._to_copy.default(self, **options)

    module: Any = torch
    plain_nonzero = module.nonzero

    def nonzero(self: torch.Tensor, **kwargs: Any) -> Any:
        return self.nonzero(**kwargs) if self.device.type == "cuda" else plain_nonzero(self, **kwargs)

    module.nonzero = nonzero
    tensor.to = to
    tensor.cuda = lambda self, device=None, *_, **__: to(self, this_gpu.device())
    tensor.cpu = lambda self, *_, **__: to(self, torch.device("cpu"))


def _parse_to(*args: Any, **kwargs: Any) -> tuple[Any, Any, Any, Any]:
    kwargs = {k: v for k, v in kwargs.items() if k != "copy"}
    if args and isinstance(args[0], torch.Tensor):  # to(other)
        return args[0].device, args[0].dtype, None, None
    args, kwargs = torch_factories.named(args, kwargs)
    parsed: tuple[Any, Any, Any, Any] = torch._C._nn._parse_to(*args, **kwargs)
    return parsed
