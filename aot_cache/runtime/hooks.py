"""Hook torch and Triton, one part at a time and each part once, and take out all hooks together."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

Undo = Callable[[], None]


class Hooks:
    """The parts that are hooked. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._undo: dict[str, list[Undo]] = {}

    def once(self, part: str, hook: Callable[[], Iterable[Undo]]) -> None:
        """Hook a part, unless it is hooked already. `hook` yields an undo function for each of its hooks.

        Raises:
            Exception: whatever `hook` raises; the hooks it had made before are taken out again.
        """
        with self._lock:
            if part in self._undo:
                return
            mine = self._undo[part] = []
        try:  # without the lock: hooking imports modules, and another thread that imports may be waiting for this lock
            for undo in hook():
                mine.append(undo)  # noqa: PERF402  # append one by one: the next hook may raise
        except BaseException:
            with self._lock:
                self._undo.pop(part, None)
            _undo(mine)
            raise

    def take_out(self) -> None:
        """Take all hooks out, last first, because later hooks wrap earlier ones."""
        with self._lock:
            parts = list(self._undo.values())
            self._undo.clear()
        while parts:
            _undo(parts.pop())


def _undo(hooks: list[Undo]) -> None:
    while hooks:
        hooks.pop()()
