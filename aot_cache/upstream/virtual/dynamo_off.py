"""Compiled functions as plain Python, and notice that they were called: for runs that look at something else.

Upstream: `torch/_dynamo/eval_frame.py` (`_callback_from_stance`, asked at each call of a compiled function; what
`torch.compiler.set_stance("force_eager")` answers is None).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from aot_cache.upstream import after_import

Note = Callable[[Any, tuple[Any, ...], dict[str, Any]], None]


def run_as_python(note: Note) -> None:
    """From now on nothing is compiled in this process, and `note(function, args, kwargs)` is called where a compiled
    function is; the function is None where upstream keeps it elsewhere than it did.

    Imports nothing: a process that compiles nothing does not pay for Dynamo.
    """

    def patch() -> None:
        module: Any = sys.modules["torch._dynamo.eval_frame"]

        def _callback_from_stance(callback: Any) -> None:
            if callback not in (None, False):
                caller = sys._getframe(1).f_locals
                note(caller.get("fn"), caller.get("args", ()), caller.get("kwargs", {}))
                from aot_cache.upstream.hooks import dynamo_stance  # it imports Dynamo, which is here by now

                dynamo_stance.count_as_compiled()

        module._callback_from_stance = _callback_from_stance

    after_import.after_import("torch._dynamo.eval_frame", patch)
