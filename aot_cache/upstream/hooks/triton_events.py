"""Get notified when Triton compiles, reads its disk cache, tunes, loads a module or runs a C compiler. Misses only.

Upstream: `triton/knobs.py` (`compilation.listener`, `runtime.kernel_load_end_hook`), `triton/runtime/autotuner.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton import knobs
from triton.runtime.autotuner import Autotuner

from aot_cache.upstream import patch
from aot_cache.upstream.codec.triton_kernel import OURS
from aot_cache.upstream.hooks import triton_launcher

Note = Callable[[str, str], None]


def listen(note: Note) -> Callable[[], None]:
    """Call `note(kind, name)` for each event: `compile`, `disk_hit`, `tuning`, `benchmark`, `module_load`, `gcc`.

    An existing listener (vLLM's JIT monitor) is still called. Returns a function that stops it.
    """
    previous = knobs.compilation.listener

    def compiled(*, src: Any, cache_hit: bool, **rest: Any) -> None:
        note("disk_hit" if cache_hit else "compile", getattr(src, "name", "?"))
        if previous is not None:
            previous(src=src, cache_hit=cache_hit, **rest)

    def loaded(module: Any, function: Any, name: str, group: Any, digest: str) -> None:
        note("module_load", name)

    def bench(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, "_aot_cache_tuning", None) is not self.nargs:
            self._aot_cache_tuning = self.nargs  # each run has new nargs: this is the first candidate of a new tuning
            note("tuning", self.base_fn.__name__)
        note("benchmark", self.base_fn.__name__)
        return original(self, *args, **kwargs)

    setattr(loaded, OURS, True)
    knobs.compilation.listener = compiled
    knobs.runtime.kernel_load_end_hook.add(loaded)
    stop_benching = patch.replace(Autotuner, "_bench", bench)
    stop_counting = triton_launcher.count_compiler_runs(lambda name: note("gcc", name))

    def undo() -> None:
        if knobs.compilation.listener is compiled:
            knobs.compilation.listener = previous
        knobs.runtime.kernel_load_end_hook.remove(loaded)
        stop_benching()
        stop_counting()

    return undo
