"""aot-cache: an ahead-of-time compile artifact cache and loader for LLM serving.

Importing this package imports neither torch nor Triton, and never touches a GPU.

Declare what a model launches (`Recipe`, `declare`, `Range`, `Values`, `Call`), build it with `aot-cache build`, and in the
serving process `load` the bundle (or `import aot_cache.auto`), call `ready` before the first capture and `seal` after it;
`stats` gives the ledger, `recording` writes down what a program launches. `load` (or `arm`, without a bundle) guards
captures: what misses inside one runs without compiling; `policy` and `fallback` say otherwise for single functions. `capture`
(or `before_capture` and `after_capture` in a loop of your own) keeps the ranks of a job from doing different things.
"""

from __future__ import annotations

import importlib as _importlib
import logging as _logging
import typing as _typing

if _typing.TYPE_CHECKING:
    from aot_cache.errors import AotCacheError
    from aot_cache.recipes.declare import Call, Case, Recipe, declare, device
    from aot_cache.recipes.dimensions import Range, Values
    from aot_cache.runtime import rank_agreement as ranks
    from aot_cache.runtime.capture_loop import Captured, Decision, after_capture, before_capture, capture
    from aot_cache.runtime.coverage import Hit, will_hit
    from aot_cache.runtime.kernels import Report
    from aot_cache.runtime.loader import AotCacheWarning, arm, disarm, explain, load, prime, seal, stats, unload
    from aot_cache.runtime.metrics import prometheus
    from aot_cache.runtime.policy import fallback, policy
    from aot_cache.runtime.record import recording
    from aot_cache.tuning.kernels import ready

__version__ = "0.1.0"

_logging.getLogger(__name__).addHandler(_logging.NullHandler())  # a library is silent unless its program wants its log

__all__ = [
    "AotCacheError",
    "AotCacheWarning",
    "Call",
    "Captured",
    "Case",
    "Decision",
    "Hit",
    "Range",
    "Recipe",
    "Report",
    "Values",
    "__version__",
    "after_capture",
    "arm",
    "before_capture",
    "capture",
    "declare",
    "device",
    "disarm",
    "explain",
    "fallback",
    "load",
    "policy",
    "prime",
    "prometheus",
    "ranks",
    "ready",
    "recording",
    "seal",
    "stats",
    "unload",
    "will_hit",
]

_FROM = {
    "aot_cache.errors": ("AotCacheError",),
    "aot_cache.recipes.declare": ("Call", "Case", "Recipe", "declare", "device"),
    "aot_cache.recipes.dimensions": ("Range", "Values"),
    "aot_cache.runtime.capture_loop": ("Captured", "Decision", "after_capture", "before_capture", "capture"),
    "aot_cache.runtime.coverage": ("Hit", "will_hit"),
    "aot_cache.runtime.kernels": ("Report",),
    "aot_cache.runtime.loader": (
        "AotCacheWarning",
        "arm",
        "disarm",
        "explain",
        "load",
        "prime",
        "seal",
        "stats",
        "unload",
    ),
    "aot_cache.runtime.metrics": ("prometheus",),
    "aot_cache.runtime.policy": ("fallback", "policy"),
    "aot_cache.runtime.record": ("recording",),
    "aot_cache.tuning.kernels": ("ready",),
}
_MODULE_OF = {name: module for module, names in _FROM.items() for name in names}


def __getattr__(name: str) -> _typing.Any:
    """Import a public name when it is first used: an engine's plug-in must cost nothing in processes that do not serve."""
    if name == "ranks":
        value: _typing.Any = _importlib.import_module("aot_cache.runtime.rank_agreement")
    elif name in _MODULE_OF:
        value = getattr(_importlib.import_module(_MODULE_OF[name]), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
