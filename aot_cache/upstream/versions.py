"""Differences between Triton releases that the modules here depend on. Which releases are tested is in `aot_cache.tested`."""

from __future__ import annotations

LAUNCHER_PER_SIGNATURE = ("3.6",)
"""Triton minors that build one C launcher for each signature; later ones have a generic launcher in `cuda_utils`."""

UNLOADS_ON_DELETE = ("3.8",)
"""Triton minors whose `CompiledKernel.__del__` unloads the module; 3.9 does so only for modules it loaded itself."""
