"""The GPU of this machine as a target with the device's own numbers, and how the table of targets differs from them."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from aot_cache.artifact.target import TARGETS, Difference, Target
from aot_cache.errors import TargetError


def gpu_here(devices: Path = Path("/dev"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this host may have a GPU. Only looks for device files: on a host without a GPU, asking torch takes seconds."""

    def hidden(*names: str) -> bool:
        return any(environment.get(name, "0").strip() in ("", "-1") for name in names)

    if any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists():  # dxg: the device of WSL under Windows
        return not hidden("CUDA_VISIBLE_DEVICES")
    return (devices / "kfd").exists() and not hidden(
        "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
    )


def native() -> tuple[Target, list[Difference]]:
    """Device 0 of this machine as a target with its own numbers, and the facts in which the table differs.

    The id is that of the table's row with the same name, else that of the closest row with the same arch. Without such a row
    the id is made from the device's name, and there are no differences. This initialises the GPU in this process.

    Raises:
        TargetError: there is no GPU, torch or triton is missing, or they cannot use the GPU.
    """
    device = _device()
    row = _row_for(device)
    if row is None:
        return device, []
    return replace(device, id=row.id), _differences(row, device)


def _device() -> Target:
    """Device 0 as torch and triton see it, with an id made from its name."""
    hint = "name a target of the table, or run this where torch and triton can use a GPU"
    try:
        # Imported here: importing this module must neither take two seconds nor touch the GPU.
        import torch
        import triton

        from aot_cache.upstream.codec.triton_kernel import device_limits
    except ImportError as error:
        raise TargetError(f"this machine's GPU cannot be used: {error}", hint=hint) from error
    if not torch.cuda.is_available():
        raise TargetError(f"this machine's GPU cannot be used: torch {torch.__version__} finds none", hint=hint)
    try:
        properties = torch.cuda.get_device_properties(0)
        limits = device_limits(0)
        source = f"read from the device with torch {torch.__version__} and triton {triton.__version__}"
        return _from_device(properties, limits, "hip" if torch.version.hip else "cuda", source)
    except (RuntimeError, AttributeError, KeyError) as error:
        raise TargetError(
            f"this machine's GPU cannot be used: its properties cannot be read: {error}", hint=hint
        ) from error


def _from_device(properties: Any, limits: Mapping[str, Any], backend: str, source: str) -> Target:
    """A target from torch's device properties and those of triton's driver."""
    major, minor = int(properties.major), int(properties.minor)
    name = str(properties.name)
    return Target(
        id=re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"),
        backend=backend,
        arch=str(properties.gcnArchName).split(":")[0] if backend == "hip" else major * 10 + minor,
        warp_size=int(properties.warp_size),
        name=name,
        capability=(major, minor),
        multiprocessors=int(properties.multi_processor_count),
        shared_memory_per_block=int(properties.shared_memory_per_block),
        # torch has this number for CUDA only; triton's is the limit in force on CUDA and ROCm.
        shared_memory_per_block_optin=int(limits["max_shared_mem"]),
        shared_memory_per_multiprocessor=int(properties.shared_memory_per_multiprocessor),
        registers_per_multiprocessor=int(properties.regs_per_multiprocessor),
        registers_per_block=int(limits["max_num_regs"]),
        threads_per_multiprocessor=int(properties.max_threads_per_multi_processor),
        # Older torch does not have it; Inductor then assumes 1024, too.
        threads_per_block=int(getattr(properties, "max_threads_per_block", 1024)),
        l2_bytes=int(properties.L2_cache_size),
        memory_bytes=int(properties.total_memory),
        sm_clock_khz=int(limits["sm_clock_rate"]),
        memory_clock_khz=int(limits["mem_clock_rate"]),
        memory_bus_bits=int(limits["mem_bus_width"]),
        source=source,
        measured=True,
    )


def _row_for(device: Target) -> Target | None:
    """The table's row with the device's name, else the closest one with its arch (multiprocessors, then memory)."""

    def distance(row: Target) -> tuple[bool, int, int]:
        cores, memory = row.multiprocessors - device.multiprocessors, row.memory_bytes - device.memory_bytes
        return row.name != device.name, abs(cores), abs(memory)

    same = [row for row in list(TARGETS.values()) if row.backend == device.backend and row.arch == device.arch]
    return min(same, key=distance, default=None)


def _differences(row: Target, device: Target) -> list[Difference]:
    """The facts in which `row` and `device` differ, in field order."""
    facts = (field.name for field in fields(Target) if field.name not in ("id", "source", "measured"))
    pairs = ((fact, getattr(row, fact), getattr(device, fact)) for fact in facts)
    return [Difference(fact, table, found) for fact, table, found in pairs if table != found]
