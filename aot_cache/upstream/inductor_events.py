"""Be told when Inductor loads a kernel, measures one, or runs a C++ compiler. Misses only.

Upstream: `torch/_inductor/runtime/static_triton_launcher.py`, `runtime/triton_heuristics.py`, `cpp_builder.py`.
Seen to hold: see `versions.TORCH_SEEN`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from aot_cache.upstream import after_import

Note = Callable[[str, str], None]
_HOOKS = (
    ("torch._inductor.runtime.static_triton_launcher", "StaticallyLaunchedTritonKernel", "load_kernel", "module_load"),
    ("torch._inductor.runtime.triton_heuristics", "CachingAutotuner", "bench", "benchmark"),
    ("torch._inductor.cpp_builder", "CppBuilder", "build", "gcc"),
)


def listen(note: Note) -> None:
    """Call `note(kind, name)` for each `module_load`, `benchmark` and `gcc` of Inductor's, once it is imported."""
    for module, owner, method, kind in _HOOKS:
        after_import.after_import(module, partial(_wrap, module, owner, method, kind, note))


def _wrap(module: str, owner: str, method: str, kind: str, note: Note) -> None:
    place: Any = getattr(sys.modules[module], owner)
    original = getattr(place, method)

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        note(kind, _name(self))
        return original(self, *args, **kwargs)

    setattr(place, method, noted)


def _name(thing: Any) -> str:
    function = getattr(thing, "fn", None)
    return str(getattr(thing, "name", None) or getattr(function, "__name__", "") or type(thing).__name__)
