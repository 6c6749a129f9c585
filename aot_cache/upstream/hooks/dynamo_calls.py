"""Be told of each call of a compiled function. For recordings: it costs some microseconds for each call.

Upstream: `torch/_dynamo/eval_frame.py` (`_callback_from_stance`, which is called at each call of a compiled function, by a
function with the variables `fn`, `args` and `kwargs`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from aot_cache.upstream import after_import, patch

Note = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]
_NEAR = 6


def note_calls(note: Note) -> Callable[[], None]:
    """Call `note(function, args, kwargs, callback)` before each call of a compiled function, once Dynamo is imported.

    Imports nothing. Returns a function that takes the hook out.
    """

    def callback_from_stance(original: Any, callback: Any) -> Any:
        if callback not in (None, False):
            caller = sys._getframe(1)
            for _ in range(_NEAR):  # other hooks may stand between
                if "fn" in caller.f_locals and "args" in caller.f_locals:
                    found = caller.f_locals
                    note(found["fn"], found["args"], found.get("kwargs", {}), callback)
                    break
                if caller.f_back is None:
                    break
                caller = caller.f_back
        return original(callback)

    def hook() -> Callable[[], None]:
        return patch.replace(sys.modules["torch._dynamo.eval_frame"], "_callback_from_stance", callback_from_stance)

    return after_import.hook_after_import("torch._dynamo.eval_frame", hook)


def is_compiled(function: Any, as_what: Any = None) -> bool:
    """Whether `function` is a compiled one, of the function `as_what` if that is given."""
    inner = getattr(function, "_torchdynamo_orig_callable", None)
    return inner is not None and as_what in (None, inner)


def has_plain_options(callback: Any) -> bool:
    """Whether all options of a call's `torch.compile` can be written down: none is a function, say."""
    from torch._dynamo.eval_frame import innermost_backend

    inner: Any = innermost_backend(callback)
    return all(isinstance(value, (bool, int, str)) for value in inner.config.values())
