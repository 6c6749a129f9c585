"""Replace functions of other libraries and restore them. This package does it in no other way.

Other libraries patch the same functions, before and after us (vLLM's JIT monitor, profilers). So taking a patch out restores
the original only if our function is still installed. If somebody has wrapped it since, it stays in their chain and only passes
calls on, because restoring the original would remove their hook as well.

Upstream: that all we replace are functions of classes and modules, which callers look up by name at each call.
Only functions that are called on a miss may be patched: a patch costs one more Python call.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from aot_cache.upstream.after_import import after_import

Undo = Callable[[], None]
Answer = Callable[..., Any]
"""Called with the original function, followed by the arguments of the call."""
_OURS = "_aot_cache_patch"
_lock = threading.RLock()
_patches: list[_Patch] = []
_passed_by: weakref.WeakSet[_Patch] = weakref.WeakSet()
"""Patches that are taken out, but still in somebody's chain. Weak references: that chain may disappear without notice."""


class _Patch:
    """One replaced function."""

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

        entry.__module__ = by.__module__  # so that inspecting it shows whose it is
        setattr(entry, _OURS, self)
        self._stands = entry if kind is None else kind(entry)
        setattr(owner, name, self._stands)

    def is_entry(self, function: Any) -> bool:
        """Whether this is our own function, and not a wrapper that copied its attributes (`functools.wraps`)."""
        return function is self._stands

    def take_out(self) -> None:
        """Restore what was there before, and drop patches below it that were only passing calls on."""
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
    """Take out an inactive patch that is at the top again, because the hook that wrapped it is gone."""
    patch = _of(vars(owner).get(name))
    if patch is not None and not patch.active:
        patch.take_out()


def replace(owner: Any, name: str, by: Answer) -> Undo:
    """Replace the function `name` of a class or module by `by(original, *args, **kwargs)`.

    For a method, `classmethod` or `staticmethod`, `original` is the plain function under it, which takes the object or class
    (if any) as its first argument. Returns a function that takes the patch out.

    Raises:
        AttributeError: this release has no such function.
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


def replace_in(modules: Iterable[str], name: str, by: Answer) -> None:
    """`replace` in each of the modules that has a function of that name, once it is imported: whoever imported the function by
    its name calls its own."""

    def hook(module: str) -> None:
        if name in vars(sys.modules[module]):
            replace(sys.modules[module], name, by)

    for module in modules:
        after_import(module, lambda module=module: hook(module))  # type: ignore[misc]


@contextlib.contextmanager
def inside(owner: Any, name: str, by: Answer) -> Iterator[None]:
    """`replace`, for all threads, until the block ends. Only for a builder's own process; in a server use `OnThisThread`."""
    undo = replace(owner, name, by)
    try:
        yield
    finally:
        undo()


class OnThisThread:
    """Replaces a function for a while, only on the thread that asks for it. Other threads call the original.

    Args:
        owner: the class or module that has the function.
        name: the function's name.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self._owner, self._name = owner, name
        self._here = threading.local()
        self._users = 0
        self._undo: Undo = lambda: None

    @contextlib.contextmanager
    def replaced(self, by: Answer) -> Iterator[None]:
        """Inside, calls on this thread go to `by(original, *args, **kwargs)`."""
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
    """The functions replaced now: `owner`, `name`, `by` (the module of `aot_cache.upstream`), and `state`: `in`, `wrapped`
    (somebody has wrapped it since), or `passed by` (taken out, but still in somebody's chain)."""
    with _lock:
        return [
            {"owner": _name(patch.owner), "name": patch.name, "by": patch.module, "state": _state(patch)}
            for patch in [*_patches, *_passed_by]
        ]


def _state(patch: _Patch) -> str:
    if not patch.active:
        return "passed by"
    found = _of(vars(patch.owner).get(patch.name))
    while found is not None and found is not patch:  # our patches may be stacked
        found = _of(found.stood)
    return "in" if found is patch else "wrapped"


def _of(function: Any) -> _Patch | None:
    found = getattr(getattr(function, "__func__", function), _OURS, None)
    return found if isinstance(found, _Patch) and found.is_entry(function) else None


def _name(owner: Any) -> str:
    module = getattr(owner, "__module__", None)
    return f"{module}.{owner.__qualname__}" if module else str(owner.__name__)
