"""Compiles the specializations whose constants are known only now (see `artifact.at_start`), on all cores, outside captures."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from aot_cache.errors import one_line


@dataclass(frozen=True)
class Work:
    """One specialization to compile: Triton's (type, value) pairs, the launch options, and Triton's key for them."""

    name: str
    function: Any
    pairs: Sequence[Any]
    options: dict[str, Any]
    key: str


def compile_all(
    work: Sequence[Work],
    device: int,
    late: Callable[[], AbstractContextManager[None]],
    warn: Callable[[str], None],
) -> int:
    """Compile and load, on the current device, which must be `device`. Returns how many there are now.

    Args:
        late: events inside are counted as late, and not as harmful; entered in each thread.
        warn: called with one line for each that fails: its launch will compile, and raise what Triton raises.
    """
    from aot_cache.upstream.codec import triton_kernel
    from aot_cache.upstream.hooks import triton_miss

    target = triton_kernel.current_target()

    def compile_one(one: Work) -> Any:
        with late():
            return triton_kernel.compile_now(one.function, one.pairs, one.options, one.key, device, target)

    made = 0
    with ThreadPoolExecutor(min(len(work), os.cpu_count() or 1), "aot-cache compile") as threads:
        started = [(one, threads.submit(compile_one, one)) for one in work]  # Triton's compiler runs without the GIL
        for one, future in started:
            try:
                kernel = future.result()
                with late():
                    triton_miss.load_now(kernel)
                made += 1
            except Exception as error:
                warn(f"aot-cache could not compile {one.name} for constants that are known now: {one_line(error)}")
    return made
