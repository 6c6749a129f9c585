"""What is hooked into torch and Triton, part by part, once; and taken out again, all of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

Undo = Callable[[], None]


class Hooks:
    """Parts that are hooked in. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._undo: dict[str, list[Undo]] = {}

    def once(self, part: str, hook: Callable[[], Iterable[Undo]]) -> bool:
        """Hook a part in unless it is already; `hook` yields what takes each of its hooks out. True when it was new.

        Raises:
            Exception: whatever `hook` raises; what it had hooked in by then is taken out again.
        """
        with self._lock:
            if part in self._undo:
                return False
            self._undo[part] = []  # before: hooking may import what calls this again
            try:
                self._undo[part].extend(hook())
            except BaseException:
                _undo(self._undo.pop(part))
                raise
            return True

    def take_out(self) -> None:
        """Take everything out, last first: hooks stand around each other."""
        with self._lock:
            while self._undo:
                _undo(self._undo.popitem()[1])


def _undo(hooks: list[Undo]) -> None:
    while hooks:
        hooks.pop()()
