"""What is hooked into torch and Triton, part by part, once; and taken out again, all of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

Undo = Callable[[], None]


class Hooks:
    """Parts that are hooked in. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._undo: dict[str, list[Undo]] = {}

    def once(self, part: str, hook: Callable[[], Iterable[Undo]]) -> None:
        """Hook a part in unless it is already; `hook` yields what takes each of its hooks out.

        Raises:
            Exception: whatever `hook` raises; what it had hooked in by then is taken out again.
        """
        with self._lock:
            if part in self._undo:
                return
            mine = self._undo[part] = []
        try:  # not under the lock: hooking imports, and another thread's import may be waiting for us
            for undo in hook():
                mine.append(undo)  # noqa: PERF402  # each as it comes: the next one may raise
        except BaseException:
            with self._lock:
                self._undo.pop(part, None)
            _undo(mine)
            raise

    def take_out(self) -> None:
        """Take everything out, last first: hooks stand around each other."""
        with self._lock:
            parts = list(self._undo.values())
            self._undo.clear()
        while parts:
            _undo(parts.pop())


def _undo(hooks: list[Undo]) -> None:
    while hooks:
        hooks.pop()()
