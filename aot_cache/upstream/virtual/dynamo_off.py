"""Run compiled functions as plain Python, for runs that trace something else (kernels).

Upstream: `torch/_dynamo/eval_frame.py` (`_callback_from_stance`, called at each call of a compiled function; what
`torch.compiler.set_stance("force_eager")` answers is None).
"""

from __future__ import annotations

import sys
from typing import Any

from aot_cache.upstream import after_import


def run_as_python() -> None:
    """Compile nothing in this process from now on. Imports nothing: a process that compiles nothing does not import Dynamo."""

    def patch() -> None:
        module: Any = sys.modules["torch._dynamo.eval_frame"]

        def _callback_from_stance(callback: Any) -> None:
            if callback not in (None, False):
                from aot_cache.upstream.hooks import dynamo_stance  # imports Dynamo, which is imported by now

                dynamo_stance.count_as_compiled()

        module._callback_from_stance = _callback_from_stance

    after_import.after_import("torch._dynamo.eval_frame", patch)
