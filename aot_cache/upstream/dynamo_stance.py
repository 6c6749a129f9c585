"""The stance `fail_on_recompile`: Dynamo has another callback under it, which raises; whoever has code is asked before that.

Only setting a stance is hooked, because the stance is read at every call of a compiled function.
Upstream: `torch/_dynamo/eval_frame.py` (`_set_stance`, `_callback_from_stance`), `torch/_dynamo/decorators.py`
(`set_stance`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch._dynamo import decorators, eval_frame

Ask = Callable[[Any, Any], Any]


def ask_where_recompiling_fails(kind: type, ask: Ask) -> Callable[[], None]:
    """Ask `ask(callback, frame)`, whose answer may be None, where a callback of this `kind` is replaced by one that raises.

    Returns a function that takes the hook out.
    """
    stances: Any = eval_frame
    users: Any = decorators
    choose, set_stance = stances._callback_from_stance, users._set_stance

    def asking(callback: Any) -> Any:
        raises = choose(callback)
        if not isinstance(callback, kind):
            return raises

        def ask_first(frame: Any, *args: Any, **kwargs: Any) -> Any:
            answer = ask(callback, frame)
            return raises(frame, *args, **kwargs) if answer is None else answer

        ask_first._torchdynamo_orig_backend = callback  # type: ignore[attr-defined]  # upstream's has it, too
        return ask_first

    @functools.wraps(set_stance)
    def _set_stance(stance: Any) -> Any:
        prior = set_stance(stance)
        stances._callback_from_stance = asking if stance.stance == "fail_on_recompile" else choose
        return prior

    users._set_stance = _set_stance

    def undo() -> None:
        users._set_stance, stances._callback_from_stance = set_stance, choose

    return undo
