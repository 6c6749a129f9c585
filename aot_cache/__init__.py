"""aot-cache: an ahead-of-time compile artifact cache and loader for LLM serving.

Importing this package imports neither torch nor Triton, and never touches a GPU.

Declare what a model launches (`Recipe`, `declare`, `Range`, `Values`, `Call`), build it with `aot-cache build`, and in the
serving process `load` the bundle (or `import aot_cache.auto`), call `ready` before the first capture and `seal` after it;
`stats` gives the ledger, `recording` writes down what a program launches. `load` (or `arm`, without a bundle) guards
captures: what misses inside one runs without compiling; `policy` and `fallback` say otherwise for single functions. `capture`
(or `before_capture` and `after_capture` in a loop of your own) keeps the ranks of a job from doing different things.
"""

from __future__ import annotations

import logging as _logging

from aot_cache.errors import AotCacheError
from aot_cache.recipes.declare import Call, Case, Recipe, declare, device
from aot_cache.recipes.dimensions import Range, Values
from aot_cache.runtime import rank_agreement as ranks
from aot_cache.runtime.capture_loop import Captured, Decision, after_capture, before_capture, capture
from aot_cache.runtime.coverage import Hit, will_hit
from aot_cache.runtime.kernels import Report
from aot_cache.runtime.loader import AotCacheWarning, arm, disarm, explain, load, prime, seal, stats
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
    "will_hit",
]
