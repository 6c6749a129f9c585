"""The versions of torch and triton that the private names in this package were seen to hold for."""

from __future__ import annotations

import sys
from importlib import metadata

TRITON_SEEN = ("3.6", "3.7", "3.8", "3.9")
"""Minor releases whose `runtime/jit.py`, `runtime/autotuner.py`, `compiler/compiler.py` and `backends/nvidia/driver.py`
were read and whose contract tests passed."""

TORCH_SEEN = ("2.11", "2.13", "2.15")
"""Minor releases whose wrapper tensors, dispatch modes and `torch.cuda` Python layer were seen to hold."""

LAUNCHER_PER_SIGNATURE = ("3.6",)
"""Triton minors that build one C launcher a signature; later ones have one generic launcher in `cuda_utils`."""

UNLOADS_ON_DELETE = ("3.8",)
"""Triton minors whose `CompiledKernel.__del__` unloads its module; 3.9 does so only for what it loaded itself."""


def minor(version: str) -> str:
    """`"3.7.1+git"` → `"3.7"`."""
    return ".".join(version.split("+")[0].split(".")[:2])


def installed(package: str) -> str:
    """The version of `package`: what is imported, else what is installed; empty when it is neither."""
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is not None:
        return str(version)  # and reading a package's record waits for the disk
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
