"""Which of Triton's files an artifact of Inductor's keeps, and which of them are written when it is loaded.

Upstream puts every file of Triton's cache into an artifact, for each config of each kernel, and writes all of them again before
it loads the graph. A kernel that is launched statically, as almost all are, needs its binary alone, and only that of the config
that is served: a tenth of the files.

Upstream: `torch/_inductor/triton_bundler.py` (`TritonBundle`, `read_and_emit`), `torch/_inductor/runtime/triton_heuristics.py`
(`StaticTritonCompileResult.reload_cubin_path`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch._inductor import triton_bundler
from torch._inductor.runtime.runtime_utils import triton_hash_to_path_key

from aot_cache.upstream.codec import gpu_number

_BINARIES = (".cubin", ".hsaco")


def kept(bundle: Any, source: str) -> Any:
    """`bundle`, a graph's kernels, without the files that nothing reads. `source` is the graph's Python module.

    Nothing is left out where the module has a kernel that is launched in another way: Triton reads all files of that one.
    """
    if bundle is None or gpu_number.kernels(source) > len(bundle.static_autotuners or ()):
        return bundle
    launched = _folders(bundle.static_autotuners)
    return replace(bundle, kernel_artifacts=[_lean(one, launched) for one in bundle.kernel_artifacts])


def _lean(kernel: Any, launched: set[str]) -> Any:
    if kernel.kernel_hash not in launched:
        return kernel
    return replace(kernel, artifacts=[file for file in kernel.artifacts if file.filename.endswith(_BINARIES)])


def write(bundle: Any, compiled: Iterable[Any]) -> Any:
    """Write the binaries that the configs need which are served now. Returns what is left for upstream to write.

    Args:
        bundle: the kernels of a graph that is being loaded.
        compiled: the static kernels of all configs in the artifact, before one was chosen (`CachingAutotuner.compile_results`).
    """
    static, served = {_folder(result) for result in compiled}, _folders(bundle.static_autotuners)
    asked: Any = triton_bundler  # by this name its folder is replaced while a graph is loaded
    left = []
    for kernel in bundle.kernel_artifacts:
        if kernel.kernel_hash not in static:
            left.append(kernel)
        elif kernel.kernel_hash in served:
            folder = Path(asked.triton_cache_dir(kernel.device), kernel.kernel_hash)
            folder.mkdir(parents=True, exist_ok=True)
            for file in _lean(kernel, static).artifacts:
                (folder / file.filename).write_bytes(file.payload)
    return replace(bundle, kernel_artifacts=left)


def _folders(tuners: Iterable[Any] | None) -> set[str]:
    return {_folder(result) for entry in tuners or () for result in entry.kernel.compile_results}


def _folder(result: Any) -> str:
    """Where Triton has the files of a compiled kernel."""
    return str(triton_hash_to_path_key(result.kernel.hash))
