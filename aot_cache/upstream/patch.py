"""Functions of other people's libraries, replaced by ours and given back: the one way in which this package does it.

Others do the same to the same functions, before and after us (vLLM's JIT monitor, profilers). So a patch that is taken out
puts the original back only where ours is what stands there. Where somebody has wrapped ours since, it stays in the chain and
passes calls on as if it were not there: putting the original back would take out their hook, too.

Upstream: that all we replace are functions of classes and modules, which are asked for by name at each call.
Only what is called when something misses may be patched: a patch costs one more Python call.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Undo = Callable[[], None]
Answer = Callable[..., Any]
"""Called with the original, and with what that is called with."""
_OURS = "_aot_cache_patch"
_lock = threading.RLock()
_patches: list[_Patch] = []
_passed_by: weakref.WeakSet[_Patch] = weakref.WeakSet()
"""Taken out, and in somebody's chain as long as that is: who leaves may drop them without a word."""


class _Patch:
    """One function of somebody else's that is replaced."""

    def __init__(self, owner: Any, name: str, by: Answer) -> None:
        self.owner, self.name, self.module = owner, name, by.__module__.rpartition(".")[2]
        self._own = name in vars(owner)
        self.stood = vars(owner)[name] if self._own else getattr(owner, name)
        kind = type(self.stood) if isinstance(self.stood, (classmethod, staticmethod)) else None
        original = self.stood.__func__ if kind is not None else self.stood
        self.active = True

        @functools.wraps(original)
        def entry(*args: Any, **kwargs: Any) -> Any:
            return by(original, *args, **kwargs) if self.active else original(*args, **kwargs)

        entry.__module__ = by.__module__  # whoever looks at it sees whose it is
        setattr(entry, _OURS, self)
        self._stands = entry if kind is None else kind(entry)
        setattr(owner, name, self._stands)

    def is_entry(self, function: Any) -> bool:
        """Whether this is our own function, and not one that somebody made look like it (`functools.wraps`)."""
        return function is self._stands

    def take_out(self) -> None:
        """Put the original back, and with it what it replaced that was passed by."""
        self.active = False
        if self in _patches:
            _patches.remove(self)
        _passed_by.add(self)
        if self.is_entry(vars(self.owner).get(self.name)):
            if self._own:
                setattr(self.owner, self.name, self.stood)
            else:
                delattr(self.owner, self.name)
            _passed_by.discard(self)
            _drop_passed_by(self.owner, self.name)


def _drop_passed_by(owner: Any, name: str) -> None:
    """Take out what had been wrapped by somebody who is gone now."""
    patch = _of(vars(owner).get(name))
    if patch is not None and not patch.active:
        patch.take_out()


def replace(owner: Any, name: str, by: Answer) -> Undo:
    """Let `by(original, *args, **kwargs)` answer in place of the function `name` of a class or module.

    The original of a method, a `classmethod` or `staticmethod` is the plain function under it: its first argument is the
    object or class. Returns a function that takes the patch out.

    Raises:
        AttributeError: there is no such function in this release.
    """
    with _lock:
        _drop_passed_by(owner, name)
        patch = _Patch(owner, name, by)
        _patches.append(patch)

    def undo() -> None:
        with _lock:
            if patch.active:
                patch.take_out()

    return undo


def replace_all(owner: Any, answers: Mapping[str, Answer]) -> Undo:
    """`replace` for several functions of one owner: all of them, or none."""
    with contextlib.ExitStack() as undo:
        for name, by in answers.items():
            undo.callback(replace(owner, name, by))
        return undo.pop_all().close


@contextlib.contextmanager
def inside(owner: Any, name: str, by: Answer) -> Iterator[None]:
    """`replace`, for all threads, until the block ends: for a builder's own process. A server takes `OnThisThread`."""
    undo = replace(owner, name, by)
    try:
        yield
    finally:
        undo()


class OnThisThread:
    """A function that is replaced for a while, and only for the thread that asks: others go on as if it were not.

    Args:
        owner: a class or module.
        name: of the function.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._here = threading.local()
        self._users = 0
        self._undo: Undo = lambda: None

    @contextlib.contextmanager
    def replaced(self, by: Answer) -> Iterator[None]:
        """Inside, `by(original, *args, **kwargs)` answers on this thread."""
        with _lock:
            if not self._users:
                self._undo = replace(self._owner, self._name, self._answer)
            self._users += 1
        stack = self._here.__dict__.setdefault("stack", [])
        stack.append(by)
        try:
            yield
        finally:
            stack.pop()
            with _lock:
                self._users -= 1
                if not self._users:
                    self._undo()

    def _answer(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        stack = self._here.__dict__.get("stack")
        return stack[-1](original, *args, **kwargs) if stack else original(*args, **kwargs)


def installed() -> list[dict[str, str]]:
    """What is replaced now: `owner`, `name`, `by` (the module of `aot_cache.upstream`), and `state`: `in`, `wrapped` by
    somebody since, or `passed by`, which is taken out and still in somebody's chain."""
    with _lock:
        return [
            {"owner": _name(patch.owner), "name": patch.name, "by": patch.module, "state": _state(patch)}
            for patch in [*_patches, *_passed_by]
        ]


def _state(patch: _Patch) -> str:
    if not patch.active:
        return "passed by"
    found = _of(vars(patch.owner).get(patch.name))
    while found is not None and found is not patch:  # ours stand on ours
        found = _of(found.stood)
    return "in" if found is patch else "wrapped"


def _of(function: Any) -> _Patch | None:
    found = getattr(getattr(function, "__func__", function), _OURS, None)
    return found if isinstance(found, _Patch) and found.is_entry(function) else None


def _name(owner: Any) -> str:
    module = getattr(owner, "__module__", None)
    return f"{module}.{owner.__qualname__}" if module else str(owner.__name__)
