"""Dynamo's stances. Under `fail_on_recompile` Dynamo's callback raises; the hook here looks for a graph before it does.

Only setting a stance is hooked permanently, because the stance is read at every call of a compiled function.
Upstream: `torch/_dynamo/eval_frame.py` (`_set_stance`, `_callback_from_stance`), `torch/_dynamo/decorators.py`
(`set_stance`), `torch/csrc/dynamo/eval_frame.c` (`set_fullgraph_compiled_frame_count`, new in 2.12).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch._dynamo import decorators, eval_frame

from aot_cache.upstream import patch

Ask = Callable[[Any, Any], Any]


def ask_where_recompiling_fails(kind: type, ask: Ask) -> Callable[[], None]:
    """Call `ask(callback, frame)` before Dynamo raises in place of a callback of this `kind`. If it returns None, Dynamo raises.

    Returns a function that takes the hook out.
    """
    failing: list[Callable[[], None]] = []

    def callback_from_stance(original: Any, callback: Any) -> Any:
        raises = original(callback)
        if not isinstance(callback, kind):
            return raises

        def ask_first(frame: Any, *args: Any, **kwargs: Any) -> Any:
            answer = ask(callback, frame)
            return raises(frame, *args, **kwargs) if answer is None else answer

        ask_first._torchdynamo_orig_backend = callback  # type: ignore[attr-defined]  # upstream's callback has it, too
        return ask_first

    def _set_stance(original: Any, stance: Any) -> Any:
        prior = original(stance)
        fails = stance.stance == "fail_on_recompile"
        if fails and not failing:  # only then, as each call of a compiled function asks for its callback
            failing.append(patch.replace(eval_frame, "_callback_from_stance", callback_from_stance))
        while failing and not fails:
            failing.pop()()
        return prior

    take_out = patch.replace(decorators, "_set_stance", _set_stance)

    def undo() -> None:
        take_out()
        while failing:
            failing.pop()()

    return undo


def count_as_compiled() -> None:
    """Tell torch >= 2.12 that a frame was compiled: under `fullgraph=True` it raises for a call without any compiled frame."""
    eval_frame: Any = importlib.import_module("torch._C._dynamo.eval_frame")
    set_count = getattr(eval_frame, "set_fullgraph_compiled_frame_count", None)
    if set_count is not None:
        before = set_count(-1)
        set_count(before if before < 0 else before + 1)
