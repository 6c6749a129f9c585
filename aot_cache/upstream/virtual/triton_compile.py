"""Compile one specialization for a target, without a GPU.

Upstream: `triton/compiler/compiler.py` (`compile`, `CompiledKernel`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from aot_cache.upstream.codec import triton_jit
from aot_cache.upstream.virtual.triton_driver import gpu_target

if TYPE_CHECKING:
    from aot_cache.artifact.target import Target

Json = Any

# Fields of Triton's metadata that describe the compiling process or machine, not the kernel.
_PLACE = ("hash", "target", "extern_libs", "triton_version", "ir_override")


@dataclass(frozen=True)
class Compiled:
    """One kernel binary (cubin or hsaco), and the metadata that its launch needs."""

    binary: bytes
    metadata: dict[str, Json]
    ir: str = ""
    """sha256 of the input of code generation: the optimized Triton IR and the options. Empty if unknown."""


class Known(Exception):
    """Not an error: this IR was compiled before, and `value` is what the caller has stored for it."""

    def __init__(self, value: Any) -> None:
        super().__init__("known")
        self.value = value


def compile_specialization(
    function: JITFunction,
    specialization: list[Any],
    kwargs: dict[str, Any],
    target: Target,
    known: Callable[[str], Any] | None = None,
) -> Compiled:
    """Compile `function` for `target`.

    Args:
        known: called with the digest of the IR (see `Compiled.ir`). If it does not return None, compilation ends there.

    Raises:
        Known: with the result of `known`, if that is not None.
        Exception: whatever Triton's compiler raises.
    """
    place = gpu_target(target)
    with _asking(known, place) as ir:
        kernel = triton_jit.compile_for(function, specialization, kwargs, place, device=0)
    path = next(Path(p) for name, p in kernel.metadata_group.items() if name.endswith(".json"))
    metadata = json.loads(path.read_text())
    return Compiled(bytes(kernel.kernel), _portable(metadata), ir[0])


@contextlib.contextmanager
def _asking(known: Callable[[str], Any] | None, place: Any) -> Iterator[list[str]]:
    """Call `known` once the Triton IR exists: the later stages (LLVM, the assembler) take four fifths of the time.

    Many specializations have equal IR: they differ in a divisible stride that no address uses, or in a head count that only the
    host reads. The later stages depend on nothing but the IR's text (upstream compiles `.ttir` files, `IRSource`), except for
    source positions, which assertions contain. So callers compare only within one kernel's source.
    """
    ir = [""]
    if known is None:
        yield ir
        return
    backend = type(make_backend(place))
    add_stages = backend.add_stages

    def adding(self: Any, stages: dict[str, Any], options: Any, *rest: Any) -> None:
        add_stages(self, stages, options, *rest)
        if "ttir" not in stages:
            return  # gluon: its first stages have other names
        optimize = stages["ttir"]

        def asking(module: Any, metadata: dict[str, Any]) -> Any:
            module = optimize(module, metadata)
            text = json.dumps([str(module), options.__dict__], sort_keys=True, default=vars)
            ir[0] = hashlib.sha256(text.encode()).hexdigest()
            value = known(ir[0])
            if value is not None:
                raise Known(value)
            return module

        stages["ttir"] = asking

    backend.add_stages = adding
    try:
        yield ir
    finally:
        backend.add_stages = add_stages


def _portable(metadata: dict[str, Json]) -> dict[str, Json]:
    return {k: v for k, v in metadata.items() if k not in _PLACE and not k.isupper() and not k.startswith("TRITON_")}


def is_pruned_like_triton(error: BaseException) -> bool:
    """Whether Triton's autotuner would take this error as "this config does not work here" and continue."""
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
    """The environment variables that change generated code, by Triton's list. Line info is excluded: it has its own key part."""
    from triton._C.libtriton import get_cache_invalidating_env_vars

    found = dict(get_cache_invalidating_env_vars())
    found.pop("TRITON_DISABLE_LINE_INFO", None)
    return {k: str(v) for k, v in found.items()}


def backend_of(target: Target) -> Any:
    return make_backend(gpu_target(target))
