"""Compile one specialization for a target, without a GPU.

Upstream: `triton/compiler/compiler.py` (`compile`, `CompiledKernel`). Seen to hold: see `versions.TRITON_SEEN`.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import triton
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from aot_cache.upstream.triton_driver import gpu_target

if TYPE_CHECKING:
    from aot_cache.target import Target

Json = Any

# Fields of Triton's metadata that say where and by what process a kernel was compiled, not what it is.
_PLACE = ("hash", "target", "extern_libs", "triton_version", "ir_override")


@dataclass(frozen=True)
class Compiled:
    """One kernel binary (cubin or hsaco) and what its launch needs to know."""

    binary: bytes
    metadata: dict[str, Json]


def compile_specialization(
    function: JITFunction, specialization: list[Any], kwargs: dict[str, Any], target: Target
) -> Compiled:
    """Compile `function` for `target`. Raises whatever Triton's compiler raises."""
    place = gpu_target(target)
    options, signature, constexprs, attrs = _pack(function, specialization, kwargs, place)
    _ = function.device_caches[0]  # gluon and plain kernels bind their own kind of source here
    source = function.ASTSource(function, signature, constexprs, attrs)
    kernel = triton.compile(source, target=place, options=options.__dict__)
    path = next(Path(p) for name, p in kernel.metadata_group.items() if name.endswith(".json"))
    metadata = json.loads(path.read_text())
    return Compiled(bytes(kernel.kernel), _portable(metadata))


def _pack(function: JITFunction, specialization: list[Any], kwargs: dict[str, Any], place: Any) -> tuple[Any, ...]:
    from aot_cache.upstream import triton_jit

    return triton_jit.pack(function, specialization, kwargs, place)


def _portable(metadata: dict[str, Json]) -> dict[str, Json]:
    return {k: v for k, v in metadata.items() if k not in _PLACE and not k.isupper() and not k.startswith("TRITON_")}


def is_pruned_like_triton(error: BaseException) -> bool:
    """Whether Triton's autotuner would count this error as "this config does not work here" and go on."""
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources

    kinds: list[type[BaseException]] = [CompileTimeAssertionFailure, OutOfResources]
    try:
        from triton.runtime.errors import PTXASError

        kinds.append(PTXASError)
    except ImportError:  # pragma: no cover
        pass
    return isinstance(error, tuple(kinds))


def toolkit(target: Target) -> str:
    """The assembler's version line for `target`; empty for backends that assemble in-process."""
    if target.backend != "cuda":
        return ""
    from triton.backends.nvidia.compiler import get_ptxas

    text = subprocess.check_output([get_ptxas(int(target.arch)).path, "--version"], text=True)
    return next((line.strip() for line in text.splitlines() if line.startswith("Build")), text.strip())


def code_environment() -> dict[str, str]:
    """Environment variables that change generated code, as Triton lists them; line info is a key part of its own."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    found = dict(get_cache_invalidating_env_vars())
    found.pop("TRITON_DISABLE_LINE_INFO", None)
    return {k: str(v) for k, v in found.items()}


def backend_of(target: Target) -> Any:
    return make_backend(gpu_target(target))
