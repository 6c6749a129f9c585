"""Import Inductor's compiler only when something is compiled, and not already in `torch.compile(...)` or a graph's call.

Upstream gets Inductor's whole configuration each time a function is wrapped, only for the rarely used
`compiled.get_compiler_config()`; that imports all of `compile_fx`. And each call of a graph reads a flag of
`torch._inductor.debug`, which imports the compiler's intermediate representation. A process that only hits needs neither.

Upstream: `torch/__init__.py` (`_TorchCompileInductorWrapper.get_compiler_config`), `torch/_inductor/output_code.py`
(`CompiledFxGraph.__call__`), `torch/_inductor/debug.py`.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from aot_cache.upstream import patch


class Later(Mapping[str, Any]):
    """A mapping that is created at its first use."""

    def __init__(self, make: Callable[[], Mapping[str, Any]]) -> None:
        self._make = make

    @cached_property
    def _made(self) -> Mapping[str, Any]:
        return self._make()

    def __getitem__(self, name: str) -> Any:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def import_when_compiling() -> Callable[[], None]:
    """Keep `torch.compile(...)` from importing Inductor's compiler. Returns a function that undoes this."""

    def get_compiler_config(original: Any, self: Any) -> Later:
        return Later(lambda: original(self))

    return patch.replace(torch._TorchCompileInductorWrapper, "get_compiler_config", get_compiler_config)


_DEBUG = "torch._inductor.debug"


class _Debug(types.ModuleType):
    """Stands for `torch._inductor.debug`, with the one flag that a graph's call reads. Any other access imports the real one."""

    RECORD_GRAPH_EXECUTION = False

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(_DEBUG), name)


def call_without_debug() -> None:
    """Let graphs run without `torch._inductor.debug` until that is imported, or `give_debug_back` is called."""
    if _DEBUG not in sys.modules:
        package: Any = importlib.import_module("torch._inductor")
        package.debug = _Debug(_DEBUG)


def give_debug_back() -> None:
    """Undo `call_without_debug`: import the real `torch._inductor.debug`. Loaded graphs keep working."""
    package: Any = sys.modules.get("torch._inductor")
    if isinstance(getattr(package, "debug", None), _Debug):
        importlib.import_module(_DEBUG)  # replaces the stand-in
