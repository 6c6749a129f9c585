"""Shared libraries that are loaded from memory: a temporary folder may be mounted so that nothing in it can be executed."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from aot_cache.errors import Incompatible, one_line
from aot_cache.files import scratch

T = TypeVar("T")
_EXECUTABLE = 0x10
"""MFD_EXEC: Linux 6.3 or later may make memory files otherwise not executable (vm.memfd_noexec). Older ones do not know it."""


def loaded(data: bytes | memoryview, what: str, load: Callable[[str], T]) -> T:
    """What `load(path)` gives for a file with `data`: one in memory, or where that cannot be, in the temporary folder.

    The file in memory stays open: the loader would take a reused number for this library.

    Raises:
        Incompatible: neither can be loaded.
    """
    errors: list[Exception] = []
    handle = -1
    try:
        handle = _memory_file(what)
        _write(handle, data)
        return load(f"/proc/self/fd/{handle}")
    except (OSError, ImportError) as error:
        errors.append(error)
        if handle >= 0:
            os.close(handle)
    try:
        with scratch.folder() as folder:  # may be removed: the mapping stays
            path = folder / f"{what}.so"
            path.write_bytes(data)
            return load(str(path))
    except (OSError, ImportError) as error:
        errors.append(error)
    said = "; in the temporary folder: ".join(one_line(error) for error in errors)
    hint = "set TMPDIR to a folder on a file system that is mounted without noexec"
    raise Incompatible(f"cannot load the library {what}: from memory: {said}", hint=hint) from errors[-1]


def _memory_file(name: str) -> int:
    with suppress(OSError):
        return os.memfd_create(f"aot_cache_{name}", _EXECUTABLE)
    return os.memfd_create(f"aot_cache_{name}", 0)


def _write(handle: int, data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]
