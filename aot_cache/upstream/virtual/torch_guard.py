"""A CUDA device guard for a CPU build of torch.

Such a build refuses in C++ to index a CUDA tensor, or to make a Parameter of it, even if the tensor has no memory, because no
device guard is registered. A CUDA build has a no-op guard for this case. So this registers torch's own no-op class: one line
of C++, compiled when needed (1.5 s) with the compiler that Triton needs anyway.
Upstream: `c10/core/impl/DeviceGuardImplInterface.h` (`NoOpDeviceGuardImpl`).
"""

from __future__ import annotations

import ctypes
import os
import subprocess
from pathlib import Path
from typing import Any

import torch

from aot_cache.errors import TargetError
from aot_cache.files import scratch

_SOURCE = """
#include <c10/core/impl/DeviceGuardImplInterface.h>
namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, NoOpDeviceGuardImpl<DeviceType::CUDA>)
}
"""


def ensure() -> None:
    """Give this process a CUDA device guard if its torch has none.

    Raises:
        TargetError: there is no C++ compiler, or it fails.
    """
    built: Any = torch.backends.cuda.is_built
    if built():
        return
    home = Path(torch.__file__).parent
    with scratch.folder() as folder:
        source, library = Path(folder, "guard.cpp"), Path(folder, "guard.so")
        source.write_text(_SOURCE)
        compiler = os.environ.get("CXX", "g++")
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", f"-L{home / 'lib'}", "-lc10"]
        try:
            done = subprocess.run(
                [compiler, str(source), "-o", str(library), *flags], capture_output=True, text=True, check=False
            )
        except OSError as error:
            raise TargetError(
                f"cannot run C++ compiler {compiler}, which a CPU build of torch needs: {error.strerror}",
                hint="install g++, set CXX, or use a CUDA build of torch",
            ) from error
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise TargetError(
                f"{compiler} cannot compile against torch's headers: {last}",
                hint="set CXX, or use a CUDA build of torch",
            )
        ctypes.CDLL(str(library))
