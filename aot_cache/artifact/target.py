"""The table of targets: the GPU models that artifacts can be built for, with the properties that compiled code depends on.

A build has no GPU to query, so the properties come from this table. They are exactly what torch and triton report on the
device: names verbatim, sizes in bytes, clocks in kHz. `runtime.host_gpu` compares this machine's device with the table.
"""

from __future__ import annotations

import difflib
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from aot_cache.errors import UnknownName


@dataclass(frozen=True)
class Target:
    """One GPU model, or the CPU, for which every number is 0 because none applies.

    Attributes:
        id: the name that users give, such as "h200".
        backend: "cuda", "hip" or "cpu".
        arch: compute capability as an int (90), LLVM's gfx name without features ("gfx942"), or the CPU's machine name.
        warp_size: threads of a warp or wavefront.
        name: the device's name as torch reports it.
        capability: (major, minor) as torch reports them.
        multiprocessors: SMs, CUs, or for RDNA work-group processors, which is what HIP counts there.
        shared_memory_per_block: bytes that a block may use without opting in.
        shared_memory_per_block_optin: bytes that a block may opt in to; the limit that triton compiles against.
        shared_memory_per_multiprocessor: bytes.
        registers_per_multiprocessor: 32-bit registers.
        registers_per_block: 32-bit registers.
        threads_per_multiprocessor: maximum of resident threads.
        threads_per_block: maximum of threads in one block.
        l2_bytes: bytes of L2 as torch reports them.
        memory_bytes: bytes of device memory as torch reports them; varies by megabytes with driver and ECC.
        sm_clock_khz: the highest clock.
        memory_clock_khz: the memory's clock, half or less of its data rate.
        memory_bus_bits: width of the memory bus.
        source: where the numbers come from and what was not verified, in one line.
        measured: whether the numbers were read from a device.
    """

    id: str
    backend: str
    arch: int | str
    warp_size: int
    name: str
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory_per_block: int
    shared_memory_per_block_optin: int
    shared_memory_per_multiprocessor: int
    registers_per_multiprocessor: int
    registers_per_block: int
    threads_per_multiprocessor: int
    threads_per_block: int
    l2_bytes: int
    memory_bytes: int
    sm_clock_khz: int
    memory_clock_khz: int
    memory_bus_bits: int
    source: str
    measured: bool = False

    def properties(self) -> dict[str, Any]:
        """All fields by name, as JSON values."""
        return {**asdict(self), "capability": list(self.capability)}


@dataclass(frozen=True)
class Difference:
    """A field whose value in the table differs from the device's."""

    field: str
    table: object
    device: object


# (shared memory of an SM in bytes, bytes of it that one block may opt in to, threads of an SM), from the CUDA programming
# guide's "Technical Specifications per Compute Capability". The other values that we need are the same for all of these:
# warps of 32, blocks of 1024, 64 Ki registers for an SM and for a block, 48 KiB without opting in.
_CAPABILITIES = {
    (8, 0): (164 * 1024, 163 * 1024, 2048),
    (8, 9): (100 * 1024, 99 * 1024, 1536),
    (9, 0): (228 * 1024, 227 * 1024, 2048),
    (10, 0): (228 * 1024, 227 * 1024, 2048),
    (12, 0): (100 * 1024, 99 * 1024, 1536),
}


def _nvidia(
    id: str,
    name: str,
    capability: tuple[int, int],
    *,
    multiprocessors: int,
    l2_bytes: int,
    memory_bytes: int,
    clocks_mhz: tuple[int, int],
    memory_bus_bits: int,
    source: str,
    measured: bool = False,
) -> Target:
    """A row of the table for an NVIDIA GPU; `clocks_mhz` is (SM, memory)."""
    shared, optin, threads = _CAPABILITIES[capability]
    return Target(
        id=id,
        backend="cuda",
        arch=capability[0] * 10 + capability[1],
        warp_size=32,
        name=name,
        capability=capability,
        multiprocessors=multiprocessors,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=optin,
        shared_memory_per_multiprocessor=shared,
        registers_per_multiprocessor=64 * 1024,
        registers_per_block=64 * 1024,
        threads_per_multiprocessor=threads,
        threads_per_block=1024,
        l2_bytes=l2_bytes,
        memory_bytes=memory_bytes,
        sm_clock_khz=clocks_mhz[0] * 1000,
        memory_clock_khz=clocks_mhz[1] * 1000,
        memory_bus_bits=memory_bus_bits,
        source=source
        if measured
        else f"limits per SM and block: CUDA programming guide, compute capability "
        f"{capability[0]}.{capability[1]}; {source}",
        measured=measured,
    )


_ROWS = (
    Target(
        id="cpu",
        backend="cpu",
        arch=platform.machine(),
        warp_size=0,
        name="cpu",
        capability=(0, 0),
        multiprocessors=0,
        shared_memory_per_block=0,
        shared_memory_per_block_optin=0,
        shared_memory_per_multiprocessor=0,
        registers_per_multiprocessor=0,
        registers_per_block=0,
        threads_per_multiprocessor=0,
        threads_per_block=0,
        l2_bytes=0,
        memory_bytes=0,
        sm_clock_khz=0,
        memory_clock_khz=0,
        memory_bus_bits=0,
        source="arch is platform.machine(); the other numbers do not apply",
    ),
    _nvidia(
        "a100",
        "NVIDIA A100-SXM4-80GB",
        (8, 0),
        multiprocessors=108,
        l2_bytes=40 * 2**20,
        memory_bytes=85_100_068_864,
        clocks_mhz=(1410, 1593),
        memory_bus_bits=5120,
        source="the rest: published deviceQuery output, OpenXLA target_config/specs/a100_sxm_80.txtpb and NVIDIA's "
        "A100 80GB datasheet (2039 GB/s); not verified on a device",
    ),
    _nvidia(
        "l40s",
        "NVIDIA L40S",
        (8, 9),
        multiprocessors=142,
        l2_bytes=96 * 2**20,
        memory_bytes=47_576_711_168,
        clocks_mhz=(2520, 9001),
        memory_bus_bits=384,
        source="the rest: published deviceQuery output (ECC on, driver for CUDA 12.4) and NVIDIA's L40S datasheet "
        "(48 GB, 864 GB/s); not verified on a device",
    ),
    _nvidia(
        "rtx4090",
        "NVIDIA GeForce RTX 4090",
        (8, 9),
        multiprocessors=128,
        l2_bytes=72 * 2**20,
        memory_bytes=25_250_627_584,
        clocks_mhz=(2520, 10501),
        memory_bus_bits=384,
        source="the rest: published deviceQuery output (boards with a factory overclock report 2535 MHz and more) and "
        "NVIDIA's Ada whitepaper; not verified on a device",
    ),
    _nvidia(
        "h100",
        "NVIDIA H100 80GB HBM3",
        (9, 0),
        multiprocessors=132,
        l2_bytes=50 * 2**20,
        memory_bytes=85_028_896_768,
        clocks_mhz=(1980, 2619),
        memory_bus_bits=5120,
        source="the rest: published deviceQuery output, OpenXLA target_config/specs/h100_sxm.txtpb and NVIDIA's H100 "
        "SXM datasheet (3.35 TB/s); not verified on a device",
    ),
    _nvidia(
        "h200",
        "NVIDIA H200",
        (9, 0),
        multiprocessors=132,
        l2_bytes=62_914_560,
        memory_bytes=150_109_880_320,
        clocks_mhz=(1980, 3201),
        memory_bus_bits=6016,
        source="all read from a device on 2026-11-21: torch 2.11, triton 3.6, driver 580.159.04",
        measured=True,
    ),
    _nvidia(
        "b200",
        "NVIDIA B200",
        (10, 0),
        multiprocessors=148,
        l2_bytes=132_644_864,
        memory_bytes=191_514_411_008,
        clocks_mhz=(1965, 3996),
        memory_bus_bits=7680,
        source="the rest: OpenXLA target_config/specs/b200.txtpb (the bus from its 7672 GB/s) and a published print of "
        "torch's properties (148 SMs, L2 126 MB); not verified on a device",
    ),
    _nvidia(
        "rtx5090",
        "NVIDIA GeForce RTX 5090",
        (12, 0),
        multiprocessors=170,
        l2_bytes=96 * 2**20,
        memory_bytes=33_668_857_856,
        clocks_mhz=(2407, 14001),
        memory_bus_bits=512,
        source="the rest: published deviceQuery output and NVIDIA's RTX Blackwell whitepaper (1792 GB/s); not verified "
        "on a device",
    ),
    Target(
        id="mi300x",
        backend="hip",
        arch="gfx942",
        warp_size=64,
        name="AMD Instinct MI300X",
        capability=(9, 4),
        multiprocessors=304,
        shared_memory_per_block=64 * 1024,
        shared_memory_per_block_optin=64 * 1024,
        shared_memory_per_multiprocessor=64 * 1024,
        registers_per_multiprocessor=128 * 1024,
        registers_per_block=128 * 1024,
        threads_per_multiprocessor=2048,
        threads_per_block=1024,
        l2_bytes=4 * 2**20,
        memory_bytes=196_592 * 2**20,
        sm_clock_khz=2_100_000,
        memory_clock_khz=1_300_000,
        memory_bus_bits=8192,
        source="ROCm's GPU specifications, rocminfo and published prints of torch's properties (L2 is one XCD's of 8; "
        "torch with ROCm 6 had 65536 registers; HIP multiplies an SM's shared memory by the CUs); memory clock and bus "
        "from AMD's datasheet (5.3 TB/s); not verified on a device",
    ),
    Target(
        id="rx9070xt",
        backend="hip",
        arch="gfx1201",
        warp_size=32,
        name="AMD Radeon RX 9070 XT",
        capability=(12, 0),
        multiprocessors=32,
        shared_memory_per_block=64 * 1024,
        shared_memory_per_block_optin=64 * 1024,
        shared_memory_per_multiprocessor=128 * 1024,
        registers_per_multiprocessor=192 * 1024,
        registers_per_block=192 * 1024,
        threads_per_multiprocessor=2048,
        threads_per_block=1024,
        l2_bytes=8 * 2**20,
        memory_bytes=16_304 * 2**20,
        sm_clock_khz=2_570_000,
        memory_clock_khz=1_258_000,
        memory_bus_bits=256,
        source="ROCm's GPU specifications, rocminfo and a published print of torch's properties; 64 CUs, but torch "
        "counts the 32 work-group processors, so per-multiprocessor numbers are of two CUs, as HIP's source computes "
        "them; memory clock and bus from AMD's 640 GB/s; not verified on a device",
    ),
)

TARGETS: Mapping[str, Target] = {row.id: row for row in _ROWS}


def get(id: str) -> Target:
    """The target with this id.

    Raises:
        UnknownName: there is none; the message suggests the closest id and lists all.
    """
    if id in TARGETS:
        return TARGETS[id]
    # Users also try the device's name, or another letter case.
    names = {text.lower(): row.id for row in _ROWS for text in (row.name, row.id)}
    close = difflib.get_close_matches(id.lower(), names, n=1, cutoff=0.5)
    raise UnknownName(
        f"unknown target {id!r}; known: {', '.join(TARGETS)}",
        hint=f"did you mean {names[close[0]]!r}?" if close else "name one of these",
    )
