"""The shared libraries that Inductor compiles for the CPU: keep them when a graph is compiled, hand them out when it is loaded.

An artifact holds C++ source, which upstream compiles again wherever its own cache folder does not have it, with a key that
holds paths. Here a library is found by the source it was made from. Whoever loads checks that the processor is the same
kind (`torch_release.cpu_isa`).

Upstream: `torch/_inductor/codecache.py` (`CppCodeCache.load_async`, `_load_library`,
`_precompile_header`), `torch/_inductor/cpu_vec_isa.py` (`valid_vec_isa_list`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._inductor import codecache, cpu_vec_isa
from torch._inductor.codecache import CppCodeCache

from aot_cache.upstream import patch

_CACHE_DIR = "TORCHINDUCTOR_CACHE_DIR"
Lookup = Callable[[str], bytes | None]


def _source_digest(cls: Any, main: str, device: str, flags: Any, optimized: str | None) -> str:
    return hashlib.sha256(repr((cls.__name__, main, device, tuple(flags), optimized)).encode()).hexdigest()


@contextlib.contextmanager
def _instead(load: Callable[..., Any]) -> Iterator[None]:
    """`load(original, cls, source digest, *args, **kwargs)` in place of `CppCodeCache.load_async`."""

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
    """Collect the libraries that are compiled inside, by the digest of their source."""
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
    """Headers that are compiled ahead are found by the command line, and made without a graph's own flags: with ours, which
    name a build's folder, each build would make its own, in 15 s and 75 MB that nobody ever removes."""

    def precompile_header(original: Any, header: str, hashable_cmd_line: str, **command: Any) -> str:
        return str(original(header, hashable_cmd_line.replace(" ".join(_alike()), ""), **command))

    with patch.inside(codecache, "_precompile_header", precompile_header):
        yield


def find_vector_instructions() -> None:
    """Which of them the compiler and the processor have, once in a process: upstream compiles a file for each, into its cache
    folder, and looks there first. A build's own folder is empty, and so that is asked where torch keeps such files by itself."""
    folder = os.environ.pop(_CACHE_DIR, None)
    try:
        cpu_vec_isa.valid_vec_isa_list()
    finally:
        if folder is not None:
            os.environ[_CACHE_DIR] = folder


def _alike() -> list[str]:
    """Flags with which a compiler calls files (`__FILE__` in a check's message) the same wherever they are."""
    return [f"-ffile-prefix-map={place}={name}" for place, name in _folders().items()]


def _path(library: Any) -> Path:
    """Where a library is, which may have been loaded long before: a module or a `ctypes.CDLL`."""
    return Path(getattr(library, "__file__", None) or library._name)


def _without_places(path: Path) -> bytes:
    """A library without what tells where it was compiled: debug sections, and the id that is made of them."""
    objcopy = shutil.which("objcopy")  # of binutils, which g++ cannot do without
    if objcopy is None:
        return _without_folders(path.read_bytes())
    with tempfile.TemporaryDirectory(prefix="aot-cache-") as folder:
        bare = Path(folder, path.name)
        wanted = ["--strip-all", "--remove-section=.note.gnu.build-id", str(path), str(bare)]
        done = subprocess.run([objcopy, *wanted], capture_output=True, check=False)
        return _without_folders((bare if done.returncode == 0 else path).read_bytes())


def _without_folders(library: bytes) -> bytes:
    """What precompiled headers still name, which upstream compiles without a graph's flags; texts keep their length."""
    for place, name in _folders().items():
        library = library.replace(place.encode(), name.rjust(len(place), "/").encode())
    return library


def _folders() -> dict[str, str]:
    """Folders of the builder → what they are called in a library."""
    found = {str(Path(torch.__file__).parent): "torch", os.environ.get(_CACHE_DIR, ""): "inductor"}
    return {place: name for place, name in found.items() if len(place) > len(name)}


@contextlib.contextmanager
def serving(lookup: Lookup) -> Iterator[None]:
    """Libraries that `lookup` knows by the digest of their source are loaded from there; the others are compiled."""

    def load(original: Any, cls: Any, digest: str, *args: Any, **rest: Any) -> Any:
        data = lookup(digest)
        return original(cls, *args, **rest) if data is None else lambda: _load(cls, digest, data)

    with _instead(load):
        yield


def _load(cls: Any, digest: str, data: bytes) -> Any:
    with tempfile.TemporaryDirectory(prefix="aot-cache-") as folder:  # private: the linker keeps what it has mapped
        path = Path(folder, f"{digest[:32]}.so")
        path.write_bytes(data)
        return cls._load_library(str(path), digest[:32])
