"""Where releases of Triton differ in what the modules here rely on. With what each was tested is in `aot_cache.tested`."""

from __future__ import annotations

LAUNCHER_PER_SIGNATURE = ("3.6",)
"""Triton minors that build one C launcher a signature; later ones have one generic launcher in `cuda_utils`."""

UNLOADS_ON_DELETE = ("3.8",)
"""Triton minors whose `CompiledKernel.__del__` unloads its module; 3.9 does so only for what it loaded itself."""
