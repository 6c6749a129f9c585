"""Inductor kernels with several configs: all are compiled, one is served, and upstream itself measures them when tuning.

Upstream measures at a kernel's first call, and keeps the fastest config (`CachingAutotuner.run`). That must not happen inside
a capture, so a kernel is loaded with one config (the chosen one or the first), except for tuning.

Upstream: `torch/_inductor/triton_bundler.py` (`TritonBundler`), `torch/_inductor/runtime/triton_heuristics.py`
(`CachingAutotuner`).
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.triton_bundler import TritonBundler

from aot_cache.upstream import patch
from aot_cache.upstream.codec import gpu_number
from aot_cache.upstream.hooks import inductor_binaries

Json = Any
_CACHES = ("autotune_local_cache", "autotune_remote_cache", "bundled_autotune_remote_cache")
_TIMES = 5


@dataclass(frozen=True)
class Kernel:
    """One kernel of a loaded graph that has several configs.

    Args:
        key: the kernel's key in the artifact, a digest of its source.
        configs: the configs as text, in the order of compilation.
    """

    key: str
    configs: list[str]
    _tuner: Any

    def measured(self) -> int | None:
        """The number of the config that upstream found fastest; None if the kernel did not run, or no config fits the GPU."""
        launchers = self._tuner.launchers
        return self.configs.index(str(launchers[0].config)) if len(launchers) == 1 else None


@contextlib.contextmanager
def collecting() -> Iterator[dict[str, Json]]:
    """Collect the kernels with several configs that are compiled inside: key → name and configs as text."""
    found: dict[str, Json] = {}

    def put_static_autotuner(original: Any, cls: Any, key: str, kernel: Any) -> Any:
        if len(kernel.compile_results) > 1:
            name = kernel.inductor_meta.get("kernel_name") or kernel.fn.__name__
            found[key] = {"kernel": name, "configs": _configs(kernel)}
        return original(cls, key, kernel)

    with patch.inside(TritonBundler, "put_static_autotuner", put_static_autotuner):
        yield found


@contextlib.contextmanager
def choosing(choices: Mapping[str, int] | None, gpu: int = gpu_number.BUILT_FOR) -> Iterator[list[Kernel]]:
    """Load graphs inside with one config of each kernel: the one that `choices` (key → number) has, else the first.

    If `choices` is None, all configs are kept, and measured at the first run. Yields the kernels that have several configs.

    Args:
        gpu: the number of the GPU onto which kernels are loaded.
    """
    kernels: list[Kernel] = []

    def read_and_emit(original: Any, bundle: Any) -> Any:
        compiled = [result for entry in bundle.static_autotuners or () for result in entry.kernel.compile_results]
        for entry in bundle.static_autotuners or ():
            tuner = entry.kernel
            if gpu != gpu_number.BUILT_FOR:
                _move(tuner, gpu)
            # Upstream compiles one more config at load time if a reduction kernel uses the GPU poorly.
            tuner.inductor_meta = {**tuner.inductor_meta, "dynamic_scale_rblock": False}
            if len(tuner.compile_results) > 1:
                kernels.append(Kernel(entry.cache_key, _configs(tuner), tuner))
                # Upstream would store the fastest config in a file beside the source, in the builder's folder.
                tuner.inductor_meta = {**tuner.inductor_meta, **dict.fromkeys(_CACHES, False)}
                tuner.save_cache_hook = None
                if choices is not None:
                    tuner.compile_results = [tuner.compile_results[choices.get(entry.cache_key, 0)]]
        return original(inductor_binaries.write(bundle, compiled))

    with _read_and_emit.replaced(read_and_emit):
        yield kernels


def _move(tuner: Any, gpu: int) -> None:
    """A kernel of Inductor's is loaded onto the GPU with this number, and no other."""
    tuner.device_props = tuner.device_props._replace(index=gpu)
    tuner.triton_meta = {**tuner.triton_meta, "device": gpu}
    for result in tuner.compile_results:
        result.compile_meta = {**result.compile_meta, "device": gpu}


_read_and_emit = patch.OnThisThread(TritonBundler, "read_and_emit")


@contextlib.contextmanager
def measuring() -> Iterator[None]:
    """Inside, measure each config several times and use the median: single times often differ by a factor of two."""

    def bench(original: Any, self: Any, *args: Any, **kwargs: Any) -> float:
        return float(statistics.median(original(self, *args, **kwargs) for _ in range(_TIMES)))

    with patch.inside(CachingAutotuner, "bench", bench):
        yield


def _configs(tuner: Any) -> list[str]:
    return [str(result.config) for result in tuner.compile_results]
