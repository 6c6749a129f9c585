"""What engines and extensions ask beside torch and Triton: NVML, the driver's library, operators that are written in C++."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from aot_cache.artifact import target as targets
from aot_cache.builder import cuda_driver, nvml, virtual_gpu
from aot_cache.errors import TraceError

H200 = targets.get("h200")


class _Memory(ctypes.Structure):
    _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]


@pytest.mark.parametrize("load", [ctypes.CDLL, ctypes.cdll.LoadLibrary], ids=["CDLL", "LoadLibrary"])
def test_nvml_has_one_gpu_which_is_the_target(load: Any) -> None:
    """As pynvml calls it, and the copies of it that engines have."""
    library = load("libnvidia-ml.so.1")
    count, major, minor, device = ctypes.c_uint(), ctypes.c_int(), ctypes.c_int(), ctypes.c_void_p()
    name, memory = ctypes.create_string_buffer(96), _Memory()
    assert library.nvmlInitWithFlags(0) == library.nvmlDeviceGetCount_v2(ctypes.byref(count)) == 0
    assert library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(0), ctypes.byref(device)) == 0
    library.nvmlDeviceGetCudaComputeCapability(device, ctypes.byref(major), ctypes.byref(minor))
    library.nvmlDeviceGetName(device, name, ctypes.c_uint(96))
    library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
    assert (count.value, major.value, minor.value) == (1, *H200.capability)
    assert (name.value.decode(), memory.total) == (H200.name, H200.memory_bytes)
    assert library.nvmlShutdown() == 0


def test_what_nvml_is_not_asked_is_missing_by_name() -> None:
    with pytest.raises(AttributeError, match="nvmlDeviceGetFanSpeed"):
        _ = ctypes.CDLL("libnvidia-ml.so.1").nvmlDeviceGetFanSpeed


def test_other_libraries_are_loaded_as_ever() -> None:
    assert ctypes.CDLL(None).getpid() > 0 and isinstance(ctypes.CDLL(None), ctypes.CDLL)
    with pytest.raises(OSError, match="no_such_library"):
        ctypes.CDLL("no_such_library.so")


def test_another_makers_gpu_has_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    before = ctypes.CDLL
    nvml.pretend(targets.get("mi300x"))
    assert ctypes.CDLL is before


def test_an_extension_that_is_linked_by_the_driver_is_loaded(tmp_path: Path) -> None:
    """As engines' extensions are: they call the driver, later, and need its library when they are imported."""
    assert cuda_driver.ensure()
    (tmp_path / "driver.c").write_text("int cuSomething(void) { return 0; }\n")
    (tmp_path / "extension.c").write_text(
        "int cuSomething(void); int now(void) { return 7; } int later(void) { return cuSomething(); }\n"
    )
    driver, extension = tmp_path / cuda_driver.NAME, tmp_path / "extension.so"
    shared = ["cc", "-shared", "-fPIC", "-Wl,--no-as-needed"]
    subprocess.run([*shared, f"-Wl,-soname,{driver.name}", tmp_path / "driver.c", "-o", driver], check=True)
    subprocess.run(
        [*shared, tmp_path / "extension.c", f"-L{tmp_path}", f"-l:{driver.name}", "-o", extension], check=True
    )
    assert ctypes.CDLL(str(extension), mode=1).now() == 7  # 1: RTLD_LAZY, as Python's imports have it now


def _operator(name: str, schema: str, **implementations: Any) -> Any:
    """An operator of a library; an implementation for `KEY_cpp` is one for KEY as if C++ had registered it."""
    library = torch.library.Library(f"of_libraries_{name}", "DEF")
    library.define(f"run{schema}")
    for key, function in implementations.items():
        library.impl("run", function, key.removesuffix("_cpp"))
        if key.endswith("_cpp"):
            torch.library._impls.discard(f"{library.ns}/run/{key.removesuffix('_cpp')}")
    _kept.append(library)
    return getattr(torch.ops, library.ns).run


_kept: list[Any] = []


def _never(*_: Any) -> Any:
    raise AssertionError("it reads memory that is not there")


@pytest.mark.contract("torch_fake", "torch_tensor")
def test_an_operator_in_c_is_its_shape_rule() -> None:
    run = _operator("shape", "(Tensor x) -> Tensor", CUDA_cpp=_never, Meta=lambda x: x.new_empty(len(x), 3))
    with virtual_gpu.tensors():
        assert run(torch.empty(4, device="cuda")).shape == (4, 3)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_operator_in_c_that_only_writes_makes_values_unknown(mode: Any) -> None:
    run = _operator(f"writes_{mode.__name__}", "(Tensor x, Tensor(a!) out) -> ()", CUDA_cpp=_never)
    with virtual_gpu.tensors(), mode():
        x, out = torch.tensor([1, 2], device="cuda"), torch.tensor([3, 4], device="cuda")
        assert run(x, out) is None and x.tolist() == [1, 2]
        with pytest.raises(TraceError):
            out.tolist()


def test_an_operator_in_python_runs() -> None:
    called = []
    run = _operator("python", "(Tensor x) -> Tensor", CUDA=lambda x: called.append(1) or x + 1, Meta=torch.empty_like)
    with virtual_gpu.tensors():
        run(torch.empty(4, device="cuda"))
    assert called == [1]


@pytest.mark.contract("torch_fake", "torch_tensor")
def test_an_operator_for_another_device_is_named() -> None:
    """Its library found no GPU and registered another device's code: nothing would be launched, without a word."""
    run = _operator("elsewhere", "(Tensor x) -> Tensor", CPU=_never, Meta=torch.empty_like)
    with virtual_gpu.tensors(), pytest.raises(TraceError, match=r"of_libraries_elsewhere.*no CUDA kernel, only CPU"):
        run(torch.empty(4, device="cuda"))


def test_an_operator_with_a_shape_rule_alone_is_that() -> None:
    run = _operator("rule", "(Tensor x) -> Tensor", Meta=torch.empty_like)
    with virtual_gpu.tensors():
        assert run(torch.empty(4, device="cuda")).shape == (4,)
