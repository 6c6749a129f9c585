"""The driver's library, by which extensions in C++ are linked: without one, libraries cannot even be imported.

An empty library of that name is enough to load them: functions are looked up when they are first called, and nothing
calls one of the driver's here. A toolkit's `stubs` folder has one, too, but images to serve from have no toolkit.

Source: the dynamic loader, which takes a library that is loaded under a name for that name; `ctypes`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from pathlib import Path

NAME = "libcuda.so.1"


def ensure() -> bool:
    """Give this process a library of the driver's name if there is none; whether there is one now."""
    try:
        ctypes.CDLL(NAME)
        return True
    except OSError:
        pass
    with tempfile.TemporaryDirectory(prefix="aot-cache-") as folder:
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
            return False  # without a compiler an import that needs it says so itself
    sys.setdlopenflags(os.RTLD_LAZY)  # Python's own default looks up all functions at once
    return True
