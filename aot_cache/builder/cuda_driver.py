"""A stand-in for the driver's library, against which C++ extensions are linked: without it, they cannot be imported.

An empty library with that name is enough: functions are resolved when they are first called, and nothing calls the driver here.
A toolkit's `stubs` folder has one, too, but images for serving have no toolkit.

Source: the dynamic loader, which takes a library that is loaded under a name for that name; `ctypes`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

from aot_cache.files import scratch

NAME = "libcuda.so.1"


def ensure() -> bool:
    """Load an empty library with the driver's name if there is no driver. Returns whether the name can be resolved now."""
    try:
        ctypes.CDLL(NAME)
        return True
    except OSError:
        pass
    with scratch.folder() as folder:
        source, library = Path(folder, "stub.c"), Path(folder, NAME)
        source.write_text("int aot_cache_has_no_driver;\n")
        command = [
            os.environ.get("CC", "cc"),
            "-shared",
            "-fPIC",
            f"-Wl,-soname,{NAME}",
            str(source),
            "-o",
            str(library),
        ]
        try:
            subprocess.run(command, capture_output=True, check=True)
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        except (OSError, subprocess.CalledProcessError):
            return False  # without a compiler, an import that needs the library will report it
    sys.setdlopenflags(os.RTLD_LAZY)  # Python's default resolves all functions at once
    return True
