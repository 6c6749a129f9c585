"""The C modules that Triton builds with gcc at run time: built ahead of time, and served from memory.

Triton 3.6 builds one launcher for each kernel signature at the kernel's first load; 3.7 and later have one generic
launcher in `cuda_utils`, which every version builds when its driver starts. Triton identifies both by their C source, so a
prebuilt module is found by the hash of the source that the host's own Triton asks for.

Upstream: `triton/backends/nvidia/driver.py`, `driver.c`, `triton/runtime/build.py`.

NVIDIA only: AMD's launcher contains the path of the build machine's HIP runtime.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import triton

from aot_cache.errors import TargetError, one_line
from aot_cache.files import scratch
from aot_cache.store import library
from aot_cache.tested import minor
from aot_cache.upstream import patch
from aot_cache.upstream.versions import LAUNCHER_PER_SIGNATURE

_LOG = logging.getLogger("aot_cache")
LAUNCHER = "__triton_launcher"
UTILS = "cuda_utils"


@dataclass(frozen=True)
class Python:
    """An interpreter for which C modules are built: its ABI tag and the folder of its headers."""

    suffix: str
    include: str


def this_python() -> Python:
    return Python(str(sysconfig.get_config_var("EXT_SUFFIX")), sysconfig.get_paths()["include"])


def other_python(executable: str) -> Python:
    """Ask another interpreter for its ABI tag and headers.

    Raises:
        TargetError: it cannot be run, or has no headers.
    """
    code = "import sysconfig,json;print(json.dumps([sysconfig.get_config_var('EXT_SUFFIX'),sysconfig.get_paths()['include']]))"
    try:
        output = subprocess.run([executable, "-c", code], capture_output=True, text=True, check=True).stdout
        suffix, include = json.loads(output)
    except (OSError, subprocess.CalledProcessError, ValueError) as error:
        raise TargetError(f"cannot run Python interpreter {executable}: {one_line(error)}") from error
    if not (Path(include) / "Python.h").exists():
        raise TargetError(f"no Python.h for {executable} in {include}", hint="install its -dev package")
    return Python(suffix, include)


def source_key(source: str) -> str:
    return hashlib.sha256(source.encode()).hexdigest()


def utils_source() -> str:
    """The C source of the module that Triton's driver builds when it starts."""
    from triton.backends.nvidia import driver

    return (Path(driver.dirname) / "driver.c").read_text()


def launcher_source(types: Sequence[Any], tensordesc_meta: Any) -> str | None:
    """The C source of a kernel's launcher, by the types of its arguments; None if this Triton has a generic launcher."""
    if minor(triton.__version__) not in LAUNCHER_PER_SIGNATURE:
        return None
    from triton.backends.nvidia import driver

    names_and_types = {str(n): t for n, t in enumerate(types)}  # the source does not depend on the names
    return str(driver.make_launcher({}, names_and_types, tensordesc_meta))


def build(source: str, name: str, python: Python) -> bytes:
    """Compile one C module for `python`. Needs no libcuda: the module is linked against a stub of that name.

    Raises:
        TargetError: there is no C compiler, or it fails.
    """
    from triton.backends.nvidia import driver

    with scratch.folder() as folder:
        _stub_libcuda(folder, source)
        Path(folder, "main.c").write_text(source)
        command = ["-O3", "-shared", "-fPIC", "-Wno-psabi", "main.c", "-o", "main.so", "-L."]
        command += ["-Wl,--no-as-needed", "-l:libcuda.so.1", f"-I{python.include}"]
        command += [f"-I{path}" for path in driver.include_dirs]
        _cc(command, folder, f"{name} for {python.suffix}")
        return Path(folder, "main.so").read_bytes()


def _stub_libcuda(folder: Path, source: str) -> None:
    names = sorted(set(re.findall(r"\bcu[A-Z]\w+(?=\s*\()", source)))
    Path(folder, "stub.c").write_text("".join(f"int {name}(void) {{ return 999; }}\n" for name in names))
    _cc(["-shared", "-fPIC", "stub.c", "-Wl,-soname,libcuda.so.1", "-o", "libcuda.so.1"], folder, "a stub of libcuda")


def _cc(arguments: list[str], folder: Path, what: str) -> None:
    compiler = os.environ.get("CC", "gcc")
    try:
        subprocess.run([compiler, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    except OSError as error:
        raise TargetError(
            f"cannot run C compiler {compiler} to build {what}: {error.strerror}", hint="install gcc or set CC"
        ) from error
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or "").strip().splitlines()
        why = lines[0] if lines else f"exit code {error.returncode}"
        raise TargetError(f"{compiler} cannot build {what}: {why}") from error


# --- serving ----------------------------------------------------------------------------------------------------------

Lookup = Callable[[str], "bytes | None"]

_lookups: list[Lookup] = []
_replaced: list[Callable[[], None]] = []
"""Undo functions of the patches in Triton."""
_lock = threading.Lock()
_types: dict[str, tuple[Any, ...]] = {}
"""Source of a launcher → the types of the arguments that it is for."""


def serve(lookup: Lookup) -> Callable[[], None]:
    """Serve Triton's C modules from `lookup(source key)`. If it returns None, Triton builds the module as before.

    Modules are loaded from memory, so neither a writable folder nor an executable /tmp is needed. Returns a function that takes
    `lookup` out; the last one also removes the patches.
    """
    with _lock:
        _lookups.append(lookup)
        if not _replaced:
            _replace_entrances()

    def undo() -> None:
        with _lock:
            if lookup in _lookups:
                _lookups.remove(lookup)
            while _replaced and not _lookups:
                _replaced.pop()()

    return undo


def _replace_entrances() -> None:
    import triton.runtime.build as build_module

    nvidia: Any = importlib.import_module("triton.backends.nvidia.driver")

    for name, text_of in _ENTRANCES.items():
        if hasattr(build_module, name):
            served = _serving(text_of)
            _replaced.append(patch.replace(build_module, name, served))
            if hasattr(nvidia, name):  # imported there by name
                _replaced.append(patch.replace(nvidia, name, served))
    if hasattr(nvidia, "make_launcher"):
        _replaced.append(patch.replace(nvidia, "make_launcher", _remembering()))


# Triton's functions that return a C module → how to get its source from the first argument. 3.8 and later pass a file.
_ENTRANCES: dict[str, Callable[[str], str]] = {
    "compile_module_from_src": lambda text: text,
    "compile_module_from_file": lambda path: Path(path).read_text(),
}


def _serving(text_of: Callable[[str], str]) -> Any:
    known: dict[str, ModuleType] = {}

    def compile_module(original: Any, src: str | None = None, name: str = "", *args: Any, **kwargs: Any) -> ModuleType:
        asked = src if src is not None else kwargs.pop("src_path")
        module = known.get(asked)
        if module is None:
            module = _find(text_of(asked), name)
            if module is None:
                try:
                    built: ModuleType = original(asked, name, *args, **kwargs)
                    return built
                except Exception as error:
                    module = _through_torch(asked, error)
            known[asked] = module
        return module

    return compile_module


def _through_torch(source: str, error: Exception) -> Any:
    """What launches instead, if the C module with this source cannot be built. Raises `error` if nothing can."""
    from aot_cache.upstream.hooks.torch_launcher import TorchLauncher

    types = _types.get(source)
    if types is None:  # not a launcher
        raise error
    try:
        launcher = TorchLauncher(types, error)
    except (KeyError, ImportError):
        raise error from None
    _LOG.warning(
        "no C compiler for Triton's launcher (%s): a kernel that was missed is launched through torch", one_line(error)
    )
    return launcher


def _find(src: str, name: str) -> ModuleType | None:
    key = source_key(src)
    with _lock:
        for find in _lookups:
            binary = find(key)
            if binary is not None:
                return load_module(binary, name, key)
    return None


def _remembering() -> Any:
    """Cache launcher sources by signature. Kernels share few, and generating a source takes longer than loading a kernel."""
    texts: dict[Any, str] = {}

    def make(make_launcher: Any, constants: Any, signature: dict[int, Any], tensordesc_meta: Any) -> str:
        if tensordesc_meta:
            return str(make_launcher(constants, signature, tensordesc_meta))
        key = tuple(signature.items())
        if key not in texts:
            texts[key] = make_launcher(constants, signature, tensordesc_meta)
            _types[texts[key]] = tuple(signature.values())
        return texts[key]

    return make


def load_module(binary: bytes | memoryview, name: str, key: str) -> ModuleType:
    """Load a C extension from memory, under a unique name (CPython caches extensions by name and file).

    Raises:
        Incompatible: it cannot be loaded.
    """
    full_name = f"aot_cache_native_{key[:16]}.{name}"

    def load(path: str) -> ModuleType:
        loader = importlib.machinery.ExtensionFileLoader(full_name, path)
        spec = importlib.util.spec_from_file_location(full_name, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        return module

    return library.loaded(binary, key[:16], load)


def count_compiler_runs(on_run: Callable[[str], None]) -> Callable[[], None]:
    """Call `on_run(name)` whenever Triton runs a C compiler. Returns a function that stops it."""
    import triton.runtime.build as build_module

    def counted(original: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        on_run(name)
        return original(name, *args, **kwargs)

    return patch.replace(build_module, "_build", counted)


def interpreter_tag() -> str:
    """The ABI tag of this process's Python."""
    return str(sysconfig.get_config_var("EXT_SUFFIX")) or sys.implementation.cache_tag or ""
