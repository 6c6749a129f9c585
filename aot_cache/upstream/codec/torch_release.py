"""Which torch is installed, and the vector instructions that it uses here. Only the latter imports torch.

Upstream: `torch/version.py` (written by torch's build), `torch/backends/cpu` (`get_cpu_capability`).
"""

from __future__ import annotations

import platform
import re
import sys
from importlib import util
from pathlib import Path

from aot_cache.tested import installed

_GIT = re.compile(r"^git_version\b[^=]*=\s*['\"]([0-9a-f]+)['\"]", re.M)


def release() -> str:
    """The release without its local version (`+cpu`, `+cu130`); empty if torch is not installed."""
    return installed("torch").partition("+")[0]


def git() -> str:
    """The commit that torch was built from; empty if torch is not installed or does not have it."""
    loaded = sys.modules.get("torch")
    if loaded is not None:
        return str(loaded.version.git_version)
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    try:
        found = _GIT.search(Path(spec.origin).with_name("version.py").read_text())
    except OSError:
        return ""
    return found[1] if found else ""


def cpu_isa() -> str:
    """The vector instructions that Inductor's C++ uses on this machine. Imports torch."""
    import torch

    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
