"""Benchmark an autotuner's candidates with Triton's own benchmark, without compiling any.

Upstream: `triton/runtime/autotuner.py` (`Autotuner.run`, `_bench`).
"""

from __future__ import annotations

import contextlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from aot_cache.upstream import patch
from aot_cache.upstream.codec import triton_jit, triton_kernel
from aot_cache.upstream.hooks import triton_launches

Json = Any
Allowed = Callable[[str, int, list[Json], dict[str, Json]], bool]
Measured = Callable[[str, int, list[Json], dict[str, Json], list[float]], None]


@contextlib.contextmanager
def benchmarking(allowed: Allowed, measured: Measured) -> Iterator[None]:
    """Inside, a tuner without a choice benchmarks only the candidates for which `allowed` returns true.

    Both callbacks get (the kernel's `triton_jit.identity`, the tuner's ordinal, key, config as encoded launch arguments).
    `measured` also gets the times in milliseconds: median, 20th and 80th percentile.
    """
    ordinals: weakref.WeakKeyDictionary[Autotuner, int] = weakref.WeakKeyDictionary()

    def bench(original: Any, self: Autotuner, *args: Any, config: Any, **meta: Any) -> list[float]:
        function = triton_jit.unwrap(self)
        assert function is not None
        name = triton_jit.identity(function, triton_jit.closure(function))
        if self not in ordinals:
            ordinals[self] = triton_launches.tuner_ordinal(self)
        ordinal = ordinals[self]
        key = [triton_jit.encode(k) for k in triton_jit.tuning_key(self, args, meta)]
        encoded = triton_jit.encoded_config(config)
        if not allowed(name, ordinal, key, encoded):
            return [float("inf")] * 3
        times = [float(t) for t in original(self, *args, config=config, **meta)]
        measured(name, ordinal, key, encoded, times)
        return times

    with patch.inside(Autotuner, "_bench", bench):
        yield


def forget(function: JITFunction, ordinal: int, key: Sequence[Json]) -> None:
    """Make a tuner of `function` choose again for `key`, in this process only, without its disk cache."""
    for tuner in triton_launches.tuners_of(function, ordinal):
        tuner.cache_results = False
        triton_kernel.forget(tuner, tuple(triton_jit.decode(k) for k in key))


def identity(kernel: str, ordinal: int, key: Sequence[Json]) -> str:
    """A tuning's name, unique within a process."""
    return json.dumps([kernel, ordinal, key])
