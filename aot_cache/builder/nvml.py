"""NVIDIA's management library of a device that is not there: engines ask it which platform they are on.

They load it by name, through `pynvml` or a copy of their own, often before torch, so that no context is made. A
function that is not answered here is missing, which those bindings report as an error of the library's.

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
    """Stands for the loaded library: its functions write their answers through the pointers that they are given."""

    def __init__(self, target: Target) -> None:
        total = target.memory_bytes
        self._numbers: dict[str, tuple[int, ...]] = {
            "nvmlDeviceGetCount_v2": (1,),
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
        self._fields = {"nvmlDeviceGetMemoryInfo": (total, total, 0)}  # in all, free, used
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
    """Into the last arguments, which point to integers; a handle is wider, and was zero."""
    for where, number in zip(args[-len(numbers) :], numbers):
        ctypes.cast(where, ctypes.POINTER(ctypes.c_int)).contents.value = number
    return _SUCCESS


def _write_text(args: tuple[Any, ...], text: str) -> int:
    """Into a buffer, the last but one argument: the last is its length."""
    args[-2].value = text.encode()
    return _SUCCESS


def _fill(where: Any, fields: tuple[int, ...]) -> int:
    """Into a structure of long integers."""
    ctypes.cast(where, ctypes.POINTER(ctypes.c_ulonglong * len(fields))).contents[:] = list(fields)
    return _SUCCESS


def pretend(target: Target) -> None:
    """Answer for `target` in this process, for good. Another maker's library is not there, as on its machines."""
    if target.backend != "cuda":
        return
    library, plain = Library(target), ctypes.CDLL

    class CDLL(plain):  # type: ignore[misc, valid-type]  # a variable
        def __new__(cls, name: object = None, *_: object, **__: object) -> Any:
            return library if name in NAMES else super().__new__(cls)

    module: Any = ctypes
    module.CDLL = CDLL
    module.cdll = ctypes.LibraryLoader(CDLL)
