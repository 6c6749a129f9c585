"""In place of a GPU: notes what is loaded onto it, and what is launched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.driver import driver

from aot_cache.upstream.hooks import cuda_libraries, torch_capture


class Device:
    """What a driver's `load_binary` and launcher are asked for."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, bytes, int]] = []
        self.launched: list[str] = []
        self.arguments: list[tuple[Any, ...]] = []
        """Of each launch: the grid and the kernel's arguments."""

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        assert isinstance(binary, bytes) and binary.startswith(b"\x7fELF") and device == 0
        self.loaded.append((name, binary, shared))
        return f"module of {name}", 1, 0, 0, 1024

    def unload_module(self, module: Any) -> None: ...

    def launcher(self, source: Any, metadata: Any) -> Callable[..., None]:
        assert all(isinstance(name, str) for name in source.signature)

        def launch(*args: Any) -> None:
            self.launched.append(metadata.name)
            self.arguments.append((args[:3], *args[9:]))

        return launch


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """A device that only takes notes, in place of the virtual one's, which has none."""
    found = Device()
    monkeypatch.setattr(driver.active.utils, "load_binary", found.load_binary)
    # Not undone: a kernel of Triton 3.8 unloads itself whenever it goes, which may be after the test that loaded it.
    driver.active.utils.unload_module = found.unload_module
    monkeypatch.setattr(driver.active, "launcher_cls", found.launcher, raising=False)
    return found


@contextlib.contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, folder: Path, kernels: Sequence[Any]) -> Iterator[None]:
    """As in a server that has started CUDA and captures nothing, with Triton's disk cache in `folder`: no kernel is in memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
    monkeypatch.setattr(torch_capture, "cuda_is_up", lambda: True)
    monkeypatch.setattr(cuda_libraries, "prime", lambda: None)
    monkeypatch.setattr(cuda_libraries, "meanwhile", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for kernel in kernels:
        kernel.device_caches.clear()
    yield
    for kernel in kernels:
        kernel.device_caches.clear()
