"""aot_cache.artifact.target: the table, looking up, and comparing a device with it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from types import SimpleNamespace

import pytest
from limits import HANGS

from aot_cache.artifact.target import TARGETS, Difference, Target, get
from aot_cache.errors import UnknownName
from aot_cache.runtime import host_gpu as native_gpu
from aot_cache.runtime.host_gpu import native

GPUS = [row for row in TARGETS.values() if row.backend != "cpu"]


def _python(code: str, **environment: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _has_gpu() -> bool:
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


# --- the table -------------------------------------------------------------------------------------------------------


def test_the_targets() -> None:
    expected = "cpu a100 l40s rtx4090 h100 h200 b200 rtx5090 mi300x rx9070xt"
    assert list(TARGETS) == expected.split()
    assert all(row.id == id for id, row in TARGETS.items())
    assert len({row.name for row in TARGETS.values()}) == len(TARGETS)


@pytest.mark.parametrize("row", TARGETS.values(), ids=lambda row: row.id)
def test_every_row_says_where_it_comes_from(row: Target) -> None:
    assert row.source and "\n" not in row.source
    assert row.measured or row.backend == "cpu" or "not verified" in row.source


@pytest.mark.parametrize("row", GPUS, ids=lambda row: row.id)
def test_a_gpu_row_is_complete_and_fits_together(row: Target) -> None:
    numbers = {field.name: getattr(row, field.name) for field in fields(row) if type(getattr(row, field.name)) is int}
    assert [name for name, number in numbers.items() if number <= 0] == []
    assert row.shared_memory_per_block <= row.shared_memory_per_block_optin <= row.shared_memory_per_multiprocessor
    assert row.registers_per_block <= row.registers_per_multiprocessor
    assert row.threads_per_block <= row.threads_per_multiprocessor
    assert row.threads_per_multiprocessor % row.warp_size == 0
    assert row.l2_bytes < row.memory_bytes
    if row.backend == "cuda":
        assert row.arch == row.capability[0] * 10 + row.capability[1]
        assert row.warp_size == 32
    else:
        assert str(row.arch).startswith(f"gfx{row.capability[0]}{row.capability[1]}")


# Vendors' data sheets in GB/s, and how many bits a pin moves in one cycle of the clock that the driver reports.
@pytest.mark.parametrize(
    ("id", "gigabytes", "bits_per_cycle"),
    [
        ("a100", 2039, 2),
        ("l40s", 864, 2),
        ("rtx4090", 1008, 2),
        ("h100", 3350, 2),
        ("h200", 4800, 2),
        ("b200", 7700, 2),
        ("rtx5090", 1792, 2),
        ("mi300x", 5300, 4),
        ("rx9070xt", 640, 16),
    ],
)
def test_clock_and_bus_make_the_published_bandwidth(id: str, gigabytes: int, bits_per_cycle: int) -> None:
    row = TARGETS[id]
    computed = row.memory_clock_khz * 1e3 * bits_per_cycle * row.memory_bus_bits / 8 / 1e9
    assert computed == pytest.approx(gigabytes, rel=0.03)


@pytest.mark.parametrize(
    ("id", "gigabytes"),
    [("a100", 80), ("l40s", 48), ("rtx4090", 24), ("h100", 80), ("h200", 141), ("b200", 180), ("rtx5090", 32)]
    + [("mi300x", 192), ("rx9070xt", 16)],
)
def test_memory_is_about_what_is_on_the_box(id: str, gigabytes: int) -> None:
    # Vendors print GB or GiB as they like, and drivers keep some for themselves.
    assert gigabytes * 1e9 * 0.97 < TARGETS[id].memory_bytes < gigabytes * 2**30


@pytest.mark.parametrize(
    ("id", "arch", "multiprocessors", "optin"),
    [
        ("a100", 80, 108, 166912),
        ("l40s", 89, 142, 101376),
        ("rtx4090", 89, 128, 101376),
        ("h100", 90, 132, 232448),
        ("h200", 90, 132, 232448),
        ("b200", 100, 148, 232448),
        ("rtx5090", 120, 170, 101376),
        ("mi300x", "gfx942", 304, 65536),
        ("rx9070xt", "gfx1201", 32, 65536),
    ],
)
def test_what_code_depends_on_most(id: str, arch: int | str, multiprocessors: int, optin: int) -> None:
    row = TARGETS[id]
    assert (row.arch, row.multiprocessors, row.shared_memory_per_block_optin) == (arch, multiprocessors, optin)


def test_wavefronts_of_cdna_are_64_and_of_rdna_32() -> None:
    assert (TARGETS["mi300x"].warp_size, TARGETS["rx9070xt"].warp_size) == (64, 32)


def test_the_cpu_has_an_arch_and_no_numbers() -> None:
    row = TARGETS["cpu"]
    assert (row.backend, row.arch, row.capability) == ("cpu", platform.machine(), (0, 0))
    assert {getattr(row, field.name) for field in fields(row) if type(getattr(row, field.name)) is int} == {0}


@pytest.mark.parametrize("row", TARGETS.values(), ids=lambda row: row.id)
def test_properties_survive_json(row: Target) -> None:
    properties = row.properties()
    assert json.loads(json.dumps(properties)) == properties
    assert list(properties) == [field.name for field in fields(Target)]
    assert Target(**{**properties, "capability": tuple(properties["capability"])}) == row


def test_targets_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        TARGETS["h200"].multiprocessors = 1  # type: ignore[misc]


# --- looking up ------------------------------------------------------------------------------------------------------


def test_get() -> None:
    assert get("h200") is TARGETS["h200"]


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("h20", "h200"), ("H200", "h200"), ("rtx-4090", "rtx4090"), ("mi300", "mi300x"), ("NVIDIA L40S", "l40s")],
)
def test_an_unknown_target_is_answered_with_the_closest_and_the_list(wrong: str, meant: str) -> None:
    with pytest.raises(UnknownName) as caught:
        get(wrong)
    assert f"did you mean {meant!r}?" in str(caught.value)
    assert all(id in str(caught.value) for id in TARGETS)
    assert "\n" not in str(caught.value)


def test_what_is_close_to_nothing_gets_the_list_only() -> None:
    with pytest.raises(UnknownName, match="known: cpu, a100") as caught:
        get("?????")
    assert "did you mean" not in str(caught.value)


# --- the device of this machine --------------------------------------------------------------------------------------


def test_importing_loads_neither_torch_nor_triton() -> None:
    modules = "aot_cache.artifact.target, aot_cache.recipes.dimensions"
    code = f"import sys, {modules}; print([m for m in ('torch', 'triton') if m in sys.modules])"
    assert _python(code) == "[]"


NATIVE = """
import aot_cache.errors, aot_cache.runtime.host_gpu
try:
    print(aot_cache.runtime.host_gpu.native())
except aot_cache.errors.TargetError as error:
    print(f'TargetError: {error}')
"""


def test_no_gpu_is_a_target_error() -> None:
    answer = _python(NATIVE, CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert answer.startswith("TargetError: this machine's GPU cannot be used: torch ") and "finds none" in answer
    assert "\n" not in answer


def test_no_torch_is_a_target_error() -> None:
    # None in sys.modules is Python's own way to say that a module is not there.
    answer = _python("import sys; sys.modules['torch'] = None" + NATIVE)
    assert answer.startswith("TargetError: this machine's GPU cannot be used: ") and "torch" in answer


@pytest.mark.skipif(not _has_gpu(), reason="needs a GPU")
def test_native_reads_the_device() -> None:
    import torch

    found, differences = native()
    properties = torch.cuda.get_device_properties(0)
    assert found.measured
    assert (found.name, found.multiprocessors) == (properties.name, properties.multi_processor_count)
    assert all(difference.device == getattr(found, difference.field) for difference in differences)


def _device(row: Target, **changes: object) -> Target:
    """A device that reports the table's row but for the changes."""
    return replace(row, **{"id": "device", "source": "device", "measured": True, **changes})  # type: ignore[arg-type]


def test_native_has_the_rows_id_and_the_devices_values(monkeypatch: pytest.MonkeyPatch) -> None:
    # The GPU is what most machines with these tests lack; everything after reading it is the real thing.
    device = _device(TARGETS["h200"], l2_bytes=52428800, memory_bytes=150_000_000_000)
    monkeypatch.setattr(native_gpu, "_device", lambda: device)
    found, differences = native()
    assert found == replace(device, id="h200")
    assert differences == [
        Difference("l2_bytes", TARGETS["h200"].l2_bytes, 52428800),
        Difference("memory_bytes", TARGETS["h200"].memory_bytes, 150_000_000_000),
    ]


@pytest.mark.parametrize("row", GPUS, ids=lambda row: row.id)
def test_each_row_is_found_by_its_name(monkeypatch: pytest.MonkeyPatch, row: Target) -> None:
    monkeypatch.setattr(native_gpu, "_device", lambda: _device(row))
    found, differences = native()
    assert (found.id, differences) == (row.id, [])


@pytest.mark.parametrize(
    ("like", "changes", "id"),
    [
        ("mi300x", {"name": "AMD Instinct MI300X VF"}, "mi300x"),
        ("rtx4090", {"name": "NVIDIA GeForce RTX 4080", "multiprocessors": 76}, "rtx4090"),
        ("h200", {"name": "NVIDIA H200 NVL"}, "h200"),
        ("h100", {"name": "NVIDIA H100 PCIe", "multiprocessors": 114}, "h100"),
    ],
)
def test_an_unlisted_name_takes_the_likest_row_of_its_arch(
    monkeypatch: pytest.MonkeyPatch, like: str, changes: dict[str, object], id: str
) -> None:
    monkeypatch.setattr(native_gpu, "_device", lambda: _device(TARGETS[like], **changes))
    found, differences = native()
    assert found.id == id
    assert {difference.field: difference.device for difference in differences} == changes


def test_an_unlisted_arch_is_its_own_target(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _device(TARGETS["rtx4090"], id="nvidia-geforce-rtx-3090", arch=86, capability=(8, 6))
    monkeypatch.setattr(native_gpu, "_device", lambda: device)
    assert native() == (device, [])


def _reported(row: Target, **more: object) -> tuple[SimpleNamespace, dict[str, int]]:
    """What torch's properties and triton's driver say on the device of `row`, under their own names."""
    properties = SimpleNamespace(
        name=row.name,
        major=row.capability[0],
        minor=row.capability[1],
        multi_processor_count=row.multiprocessors,
        warp_size=row.warp_size,
        shared_memory_per_block=row.shared_memory_per_block,
        shared_memory_per_multiprocessor=row.shared_memory_per_multiprocessor,
        regs_per_multiprocessor=row.registers_per_multiprocessor,
        max_threads_per_multi_processor=row.threads_per_multiprocessor,
        L2_cache_size=row.l2_bytes,
        total_memory=row.memory_bytes,
        **more,
    )
    limits = {
        "max_shared_mem": row.shared_memory_per_block_optin,
        "max_num_regs": row.registers_per_block,
        "multiprocessor_count": row.multiprocessors,
        "warpSize": row.warp_size,
        "sm_clock_rate": row.sm_clock_khz,
        "mem_clock_rate": row.memory_clock_khz,
        "mem_bus_width": row.memory_bus_bits,
    }
    return properties, limits


def test_reading_an_nvidia_device() -> None:
    properties, limits = _reported(TARGETS["h200"], max_threads_per_block=1024, gcnArchName="NVIDIA H200")
    found = native_gpu._from_device(properties, limits, "cuda", "test")
    assert found == replace(TARGETS["h200"], id="nvidia-h200", source="test", measured=True)


def test_reading_an_amd_device_leaves_out_the_features_of_its_arch() -> None:
    properties, limits = _reported(TARGETS["mi300x"], gcnArchName="gfx942:sramecc+:xnack-")
    found = native_gpu._from_device(properties, limits, "hip", "test")
    assert found == replace(TARGETS["mi300x"], id="amd-instinct-mi300x", source="test", measured=True)
