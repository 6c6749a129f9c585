"""Get notified when another compiler that serving engines use builds a kernel: FlashInfer, TileLang, CuTe DSL. Misses only.

They are counted, and nothing more: no bundle has their kernels, and no policy prevents them. DeepGEMM compiles inside its C++
library, where nobody can see it.

Upstream: FlashInfer's `flashinfer/jit/core.py` (`run_ninja`, taken from `cpp_ext.py` by name), TileLang's
`tilelang/jit/kernel.py` (`JITKernel._compile_and_create_adapter`), CUTLASS's `cutlass/base_dsl/dsl.py`
(`BaseDSL.compile_and_cache`, on a miss of its cache). `tools/check_vllm --compilers` looks for them in the wheels that vLLM
asks for.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import PurePath
from typing import Any

from aot_cache.upstream import after_import, patch

Note = Callable[[str, str], None]


@dataclass(frozen=True)
class Compiler:
    """A compiler, and the function that it runs once per kernel.

    Args:
        name: what it is called.
        module, owner, function: the function; `owner` is a class of the module, or empty.
        named: number of the argument that names the kernel, `self` not counted.
    """

    name: str
    module: str
    owner: str
    function: str
    named: int


COMPILERS = (
    Compiler("FlashInfer", "flashinfer.jit.core", "", "run_ninja", 0),
    Compiler("TileLang", "tilelang.jit.kernel", "JITKernel", "_compile_and_create_adapter", 0),
    Compiler("CuTe DSL", "cutlass.base_dsl.dsl", "BaseDSL", "compile_and_cache", 2),
)


def listen(note: Note) -> Callable[[], None]:
    """Call `note("other_compile", name)` for each kernel that one of `COMPILERS` builds, once it is imported.

    A compiler of a release that has no such function is not counted. Returns a function that stops it.
    """
    return after_import.hook_each_after_import((one.module, partial(_hook, one, note)) for one in COMPILERS)


def _hook(compiler: Compiler, note: Note) -> Callable[[], None]:
    module = sys.modules[compiler.module]
    owner = getattr(module, compiler.owner, None) if compiler.owner else module
    if owner is None or compiler.function not in vars(owner):
        return lambda: None
    skipped = 1 if compiler.owner else 0

    def noted(original: Any, *args: Any, **kwargs: Any) -> Any:
        found = [*args[skipped:], *kwargs.values()]  # these functions' first arguments are given in order
        note("other_compile", f"{compiler.name}: {_name(found, compiler.named)}")
        return original(*args, **kwargs)

    return patch.replace(owner, compiler.function, noted)


def _name(args: Sequence[Any], number: int) -> str:
    """A kernel's name: the last part of a build folder, a function's name, or a text."""
    if number >= len(args):
        return "?"
    found = args[number]
    if isinstance(found, PurePath):
        return found.name
    attributes: Any = getattr(found, "attrs", None)  # TileLang's functions have their name here
    named = attributes.get("global_symbol") if hasattr(attributes, "get") else None
    return str(named or getattr(found, "__name__", found))[:200]
