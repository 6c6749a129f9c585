"""The ends of a process that `atexit` does not see, and its forks.

Upstream: CPython: `os._exit` runs no `atexit` functions, and a child of `multiprocessing` that was forked ends by it
(`Lib/multiprocessing/popen_fork.py`, `forkserver.py`), called as an attribute of `os`; `os.register_at_fork`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from aot_cache.upstream import patch


def before_exit(action: Callable[[], None]) -> patch.Undo:
    """Call `action()` before each `os._exit` of this process and of its forked children. What it raises is dropped.

    Returns a function that takes the hook out.
    """

    def _exit(original: Any, status: int) -> None:
        try:
            action()
        finally:
            original(status)  # does not return: an exception ends here, too

    return patch.replace(os, "_exit", _exit)
