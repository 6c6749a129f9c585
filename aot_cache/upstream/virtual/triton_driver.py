"""A Triton driver for the virtual device.

Upstream: `triton/backends/driver.py` (`GPUDriver`), `triton/runtime/driver.py`
(`driver.set_active`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from aot_cache.errors import TraceError
from aot_cache.upstream.virtual import this_gpu

if TYPE_CHECKING:
    from aot_cache.artifact.target import Target


def gpu_target(target: Target) -> GPUTarget:
    """`target` as Triton's `GPUTarget`."""
    return GPUTarget(target.backend, target.arch, target.warp_size)


class _Utils:
    def __init__(self, target: Target) -> None:
        self._properties = {
            "max_shared_mem": target.shared_memory_per_block_optin,
            "max_num_regs": target.registers_per_block,
            "multiprocessor_count": target.multiprocessors,
            "warpSize": target.warp_size,
            "sm_clock_rate": target.sm_clock_khz,
            "mem_clock_rate": target.memory_clock_khz,
            "mem_bus_width": target.memory_bus_bits,
        }

    def get_device_properties(self, device: int) -> dict[str, int]:
        return dict(self._properties)

    def load_binary(self, *_: Any) -> Any:
        raise TraceError(
            "host code loads a compiled kernel itself, which is impossible while tracing",
            hint="leave that out of the recipe",
        )


class VirtualDriver:
    """Answers host code's questions to Triton's driver. Never launches."""

    def __init__(self, target: Target) -> None:
        self._target = gpu_target(target)
        self._capability = target.capability
        self.utils = _Utils(target)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return this_gpu.number()

    def set_current_device(self, device: int) -> None: ...

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return self._capability

    def get_active_torch_device(self) -> torch.device:
        return this_gpu.device()

    def get_device_interface(self) -> Any:
        return torch.cuda

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_benchmarker(self) -> Any:
        raise TraceError(
            "host code asks Triton for a benchmarker, which is impossible while tracing",
            hint="leave that out of the recipe",
        )


def pretend(target: Target) -> None:
    """Make the virtual driver Triton's active one in this process."""
    driver.set_active(VirtualDriver(target))
