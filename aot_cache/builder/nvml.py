"""A virtual NVML, NVIDIA's management library: engines query it to detect their platform.

They load it by name, through `pynvml` or a copy of it, often before torch, to avoid creating a CUDA context. A function that is
not implemented here is missing, which those bindings report as an NVML error.

Source: `ctypes` (`CDLL`, whose subclass stands in), NVML's functions as `pynvml` calls them.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aot_cache.artifact.target import Target

NAMES = ("libnvidia-ml.so.1", "libnvidia-ml.so")
ASSUMED_DRIVER = "580.65.06"
UUID = "GPU-00000000-0000-0000-0000-000000000000"
_SUCCESS = 0
_ERRORS = {_SUCCESS: b"Success"}


class Library:
    """Stands in for the loaded library. Its functions write their results through the given pointers."""

    def __init__(self, target: Target, gpus: int) -> None:
        total = target.memory_bytes
        self._numbers: dict[str, tuple[int, ...]] = {
            "nvmlDeviceGetCount_v2": (gpus,),
            "nvmlDeviceGetHandleByIndex_v2": (1,),
            "nvmlDeviceGetHandleByUUID": (1,),
            "nvmlDeviceGetIndex": (0,),
            "nvmlDeviceGetCudaComputeCapability": target.capability,
            "nvmlSystemGetCudaDriverVersion": (13000,),
            "nvmlSystemGetCudaDriverVersion_v2": (13000,),
        }
        self._texts = {
            "nvmlDeviceGetName": target.name,
            "nvmlDeviceGetUUID": UUID,
            "nvmlSystemGetDriverVersion": ASSUMED_DRIVER,
        }
        self._fields = {"nvmlDeviceGetMemoryInfo": (total, total, 0)}  # total, free, used
        self._nothing = ("nvmlInit_v2", "nvmlInitWithFlags", "nvmlShutdown")

    def __getattr__(self, name: str) -> object:
        if name in self._nothing:
            return lambda *_: _SUCCESS
        if name == "nvmlErrorString":
            return lambda code: _ERRORS.get(code, b"Unknown Error")
        if name in self._numbers:
            return lambda *args: _write(args, self._numbers[name])
        if name in self._texts:
            return lambda *args: _write_text(args, self._texts[name])
        if name in self._fields:
            return lambda _device, where: _fill(where, self._fields[name])
        raise AttributeError(f"the virtual device answers no {name}")

    __getitem__ = __getattr__


def _write(args: tuple[Any, ...], numbers: tuple[int, ...]) -> int:
    """Write to the last arguments, which point to integers. A handle is wider, but was initialised to zero."""
    for where, number in zip(args[-len(numbers) :], numbers):
        ctypes.cast(where, ctypes.POINTER(ctypes.c_int)).contents.value = number
    return _SUCCESS


def _write_text(args: tuple[Any, ...], text: str) -> int:
    """Write to a buffer, the last argument but one; the last is its length."""
    args[-2].value = text.encode()
    return _SUCCESS


def _fill(where: Any, fields: tuple[int, ...]) -> int:
    """Write to a structure of unsigned 64-bit integers."""
    ctypes.cast(where, ctypes.POINTER(ctypes.c_ulonglong * len(fields))).contents[:] = list(fields)
    return _SUCCESS


def pretend(target: Target, gpus: int = 1) -> None:
    """Report `gpus` GPUs in this process, permanently. For a GPU that is not NVIDIA's nothing is done: it has no NVML."""
    if target.backend != "cuda":
        return
    library, plain = Library(target, gpus), ctypes.CDLL

    class CDLL(plain):  # type: ignore[misc, valid-type]  # a variable
        def __new__(cls, name: object = None, *_: object, **__: object) -> Any:
            return library if name in NAMES else super().__new__(cls)

    module: Any = ctypes
    module.CDLL = CDLL
    module.cdll = ctypes.LibraryLoader(CDLL)
