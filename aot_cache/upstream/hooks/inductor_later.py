"""Inductor's compiler is imported when something is compiled, and not by `torch.compile(...)` or a graph's call already.

Upstream asks Inductor for its whole configuration wherever a function is wrapped, only to answer a question that hardly
anybody asks (`compiled.get_compiler_config()`); that imports all of `compile_fx`. And each call of a graph reads a flag of
`torch._inductor.debug`, which imports the compiler's intermediate form. A process whose calls all hit needs neither.

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
    """A mapping that is made at its first use."""

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
    """Wrapping a function does not import Inductor's compiler any more. Returns a function that undoes it."""

    def get_compiler_config(original: Any, self: Any) -> Later:
        return Later(lambda: original(self))

    return patch.replace(torch._TorchCompileInductorWrapper, "get_compiler_config", get_compiler_config)


_DEBUG = "torch._inductor.debug"


class _Debug(types.ModuleType):
    """What a graph's call reads of `torch._inductor.debug`; the import of anything else of it puts it in this one's place."""

    RECORD_GRAPH_EXECUTION = False

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(_DEBUG), name)


def call_without_debug() -> None:
    """Graphs run without `torch._inductor.debug` until somebody imports it, or `give_debug_back`."""
    if _DEBUG not in sys.modules:
        package: Any = importlib.import_module("torch._inductor")
        package.debug = _Debug(_DEBUG)


def give_debug_back() -> None:
    """Put the real `torch._inductor.debug` where `call_without_debug` put another; graphs that are loaded run on."""
    package: Any = sys.modules.get("torch._inductor")
    if isinstance(getattr(package, "debug", None), _Debug):
        importlib.import_module(_DEBUG)  # takes this one's place
