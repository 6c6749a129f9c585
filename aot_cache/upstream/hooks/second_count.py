"""A second count of what a hit must not cause, from upstream's own counters and callbacks, and from audit events of Python.

It shares no hook with the modules that fill the ledger (`dynamo_frames`, `inductor_events`, `triton_events`). If the two
contradict each other, one of them misses events.

Upstream: `torch/_dynamo/callback.py` (`callback_handler`), `torch/_dynamo/utils.py` (`counters`), `triton/knobs.py`
(`runtime.jit_post_compile_hook`, `runtime.kernel_load_end_hook`).
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

GRAPHS, KERNELS, COMPILERS = "graphs", "kernels", "compilers"
FAMILIES: Mapping[str, tuple[str, ...]] = {
    GRAPHS: ("frame", "graph_compile"),
    KERNELS: ("compile", "disk_hit", "tuning", "benchmark", "module_load"),
    COMPILERS: ("gcc",),
}
"""What is counted here → the corresponding kinds of the ledger."""

_ALSO: Mapping[str, tuple[str, ...]] = {KERNELS: ("late_install", "late_compile"), COMPILERS: ("other_compile",)}
"""Ledger kinds that may explain an event of upstream, but need not cause one: modules may be loaded already, and compilers may be
libraries."""

_PROGRAMS = frozenset({"gcc", "g++", "cc", "c++", "clang", "clang++", "hipcc", "nvcc", "ptxas", "ld", "lld", "ninja"})
_STARTS = frozenset({"subprocess.Popen", "os.posix_spawn", "os.exec"})
_INDUCTOR = ("fxgraph_cache_miss", "fxgraph_cache_bypass", "async_compile_cache_miss")


class SecondCount:
    """Counts from now on, in the whole process. Cannot be undone: Python has no way to remove an audit hook."""

    def __init__(self, kernels: bool) -> None:
        import torch._dynamo.callback
        from torch._dynamo.utils import counters

        self._counters: Any = counters
        self._seen: Counter[str] = Counter()
        self._programs = _PROGRAMS | {os.path.basename(os.environ[n]) for n in ("CC", "CXX") if os.environ.get(n)}
        handler: Any = torch._dynamo.callback.callback_handler
        handler.register_start_callback(self._compiling)
        sys.addaudithook(self._audit)
        if kernels:
            self._listen_to_triton()

    def total(self) -> dict[str, int]:
        """The events so far, by the keys of `FAMILIES`."""
        inductor, aot = self._counters["inductor"], self._counters["aot_autograd"]
        compiled = sum(inductor[name] for name in _INDUCTOR) + aot["total"]
        measured = sum(count for name, count in inductor.items() if name.startswith("benchmarking."))
        return {
            GRAPHS: self._seen[GRAPHS] + compiled,
            KERNELS: self._seen[KERNELS] + measured,
            COMPILERS: self._seen[COMPILERS],
        }

    def _compiling(self, about: Any) -> None:
        if about.callback_trigger.name != "CUDAGRAPH_RECORDING":  # that compiles nothing
            self._seen[GRAPHS] += 1

    def _audit(self, event: str, args: Any) -> None:
        if event in _STARTS and args and os.path.basename(os.fsdecode(args[0])) in self._programs:
            self._seen[COMPILERS] += 1

    def _listen_to_triton(self) -> None:
        from triton import knobs

        before: Any = knobs.runtime.jit_post_compile_hook

        def compiled(*args: Any, **kwargs: Any) -> Any:
            self._seen[KERNELS] += 1
            return before(*args, **kwargs) if before is not None else None

        def loaded(*_: Any, **__: Any) -> None:
            self._seen[KERNELS] += 1

        knobs.runtime.jit_post_compile_hook = compiled
        knobs.runtime.kernel_load_end_hook.add(loaded)


def contradictions(ledger: Mapping[str, int], second: Mapping[str, int], missed: bool) -> list[str]:
    """Sentences about families of events of which one count has some and the other none.

    Args:
        ledger: events of the ledger, by kind.
        second: events by `FAMILIES`.
        missed: whether the ledger has a miss. Then upstream's events for it are no contradiction.
    """
    out = []
    for family, kinds in FAMILIES.items():
        ours = sum(ledger.get(kind, 0) for kind in kinds)
        theirs = second.get(family, 0)
        explained = missed or any(ledger.get(kind, 0) for kind in _ALSO.get(family, ()))
        if theirs and not ours and not explained:
            out.append(f"upstream counts {theirs} events of {family}, and the ledger none")
        elif ours and not theirs:
            out.append(f"the ledger counts {ours} events of {family}, and upstream none")
    return out
