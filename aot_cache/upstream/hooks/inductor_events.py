"""Get notified when Inductor loads a kernel, benchmarks one, or runs a C++ compiler. Misses only.

Upstream: `torch/_inductor/runtime/static_triton_launcher.py`, `runtime/triton_heuristics.py`, `cpp_builder.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from aot_cache.upstream import after_import, patch

Note = Callable[[str, str], None]
_HOOKS = (
    ("torch._inductor.runtime.static_triton_launcher", "StaticallyLaunchedTritonKernel", "load_kernel", "module_load"),
    ("torch._inductor.runtime.triton_heuristics", "CachingAutotuner", "bench", "benchmark"),
    ("torch._inductor.cpp_builder", "CppBuilder", "build", "gcc"),
)


def listen(note: Note) -> Callable[[], None]:
    """Call `note(kind, name)` for each `module_load`, `benchmark` and `gcc` event of Inductor, once it is imported.

    Returns a function that stops it.
    """
    return after_import.hook_each_after_import((hook[0], partial(_wrap, *hook, note)) for hook in _HOOKS)


def _wrap(module: str, owner: str, method: str, kind: str, note: Note) -> Callable[[], None]:
    def noted(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        note(kind, name_of(self))
        return original(self, *args, **kwargs)

    return patch.replace(getattr(sys.modules[module], owner), method, noted)


def name_of(thing: Any) -> str:
    """A readable name for one of Inductor's kernels or compilers."""
    function = getattr(thing, "fn", None)
    return str(getattr(thing, "name", None) or getattr(function, "__name__", "") or type(thing).__name__)
