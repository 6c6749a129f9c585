"""The shared libraries that Inductor compiles for the CPU: kept when a graph is compiled, provided when it is loaded.

An artifact contains C++ source. Upstream compiles it again unless its cache folder has it, under a key that contains paths.
Here a library is found by the digest of its source. The caller must check that the processor has the same instructions
(`torch_release.cpu_isa`).

Upstream: `torch/_inductor/codecache.py` (`CppCodeCache.load_async`, `_load_library`,
`_precompile_header`), `torch/_inductor/cpu_vec_isa.py` (`valid_vec_isa_list`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor.codecache import CppCodeCache

from aot_cache.files import scratch
from aot_cache.store import library
from aot_cache.upstream import patch

_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
Lookup = Callable[[str], bytes | None]


def _source_digest(cls: Any, main: str, device: str, flags: Any, optimized: str | None) -> str:
    return hashlib.sha256(repr((cls.__name__, main, device, tuple(flags), optimized)).encode()).hexdigest()


@contextlib.contextmanager
def _instead(load: Callable[..., Any]) -> Iterator[None]:
    """Call `load(original, cls, source digest, *args, **kwargs)` in place of `CppCodeCache.load_async`."""

    def load_async(
        original: Any,
        cls: Any,
        /,
        main_code: str,
        device_type: str = "cpu",
        submit_fn: Any = None,
        extra_flags: Any = (),
        optimized_code: str | None = None,
        **rest: Any,
    ) -> Any:
        digest = _source_digest(cls, main_code, device_type, extra_flags, optimized_code)
        args = (main_code, device_type, submit_fn, extra_flags, optimized_code)
        return load(original, cls, digest, *args, **rest)

    with _load_async.replaced(load_async):
        yield


_load_async = patch.OnThisThread(CppCodeCache, "load_async")


@contextlib.contextmanager
def keeping() -> Iterator[dict[str, bytes]]:
    """Collect the libraries compiled inside: digest of the source → library."""
    kept: dict[str, bytes] = {}

    def load(original: Any, cls: Any, digest: str, *args: Any, **rest: Any) -> Any:
        main_code, device_type, submit_fn, flags, optimized_code = args
        finish = original(cls, main_code, device_type, submit_fn, (*flags, *_alike()), optimized_code, **rest)

        def finished() -> Any:
            library = finish()
            kept[digest] = _without_places(_path(library))
            return library

        return finished

    with _instead(load), _headers_of_all():
        yield kept


@contextlib.contextmanager
def _headers_of_all() -> Iterator[None]:
    """Share precompiled headers between builds. Upstream finds them by the command line and compiles them without a graph's
    own flags. Our flags contain a build's folder, so each build would make new ones (15 s, 75 MB that are never removed)."""

    def precompile_header(original: Any, header: str, hashable_cmd_line: str, **command: Any) -> str:
        return str(original(header, hashable_cmd_line.replace(" ".join(_alike()), ""), **command))

    with patch.inside(codecache, "_precompile_header", precompile_header):
        yield


def find_vector_instructions() -> None:
    """Find out once which vector instructions compiler and processor have. Upstream compiles a test file for each into its
    cache folder, and looks there first. A build's folder is empty, so torch's default folder is used here."""
    folder = os.environ.pop(_CACHE_DIR, None)
    try:
        cpu_vec_isa.valid_vec_isa_list()
    finally:
        if folder is not None:
            os.environ[_CACHE_DIR] = folder


def _alike() -> list[str]:
    """Compiler flags that make file names (`__FILE__` in a check's message) independent of the folder."""
    return [f"-ffile-prefix-map={place}={name}" for place, name in _folders().items()]


def _path(library: Any) -> Path:
    """The path of a loaded library: a module or a `ctypes.CDLL`."""
    return Path(getattr(library, "__file__", None) or library._name)


def _without_places(path: Path) -> bytes:
    """A library without the parts that depend on where it was compiled: debug sections, and the build id made from them."""
    objcopy = shutil.which("objcopy")  # from binutils, which g++ needs as well
    if objcopy is None:
        return _without_folders(path.read_bytes())
    with scratch.folder() as folder:
        bare = folder / path.name
        wanted = ["--strip-all", "--remove-section=.note.gnu.build-id", str(path), str(bare)]
        done = subprocess.run([objcopy, *wanted], capture_output=True, check=False)
        return _without_folders((bare if done.returncode == 0 else path).read_bytes())


def _without_folders(library: bytes) -> bytes:
    """Replace folders that precompiled headers, compiled without a graph's flags, still contain. Lengths do not change."""
    for place, name in _folders().items():
        library = library.replace(place.encode(), name.rjust(len(place), "/").encode())
    return library


def _folders() -> dict[str, str]:
    """Folders of the builder → their names in a library."""
    found = {str(Path(torch.__file__).parent): "torch", os.environ.get(_CACHE_DIR, ""): "inductor"}
    return {place: name for place, name in found.items() if len(place) > len(name)}


@contextlib.contextmanager
def serving(lookup: Lookup) -> Iterator[None]:
    """Inside, load libraries from `lookup(digest of the source)`; if it returns None, compile them."""

    def load(original: Any, cls: Any, digest: str, *args: Any, **rest: Any) -> Any:
        data = lookup(digest)
        return original(cls, *args, **rest) if data is None else lambda: _load(cls, digest, data)

    with _instead(load):
        yield


_loaded: dict[tuple[str, str], Any] = {}
"""(class, digest of the source) → library. A library is never unmapped, so a bundle that is loaded again uses it again."""


def _load(cls: Any, digest: str, data: bytes) -> Any:
    known = cls.__name__, digest

    def load(path: str) -> Any:
        with scratch.folder() as folder:  # an extension module is only found under a name that ends so
            link = folder / f"{digest[:32]}.so"
            link.symlink_to(path)
            return cls._load_library(str(link), digest[:32])

    if known not in _loaded:
        _loaded[known] = library.loaded(data, digest[:16], load)
    return _loaded[known]
