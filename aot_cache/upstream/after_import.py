"""Call a function once a module has been imported, without importing it.

Upstream: CPython's import system (`sys.meta_path`, `importlib.abc.Loader`); that a module of torch or Triton is complete when
its import has ended.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType


def after_import(name: str, action: Callable[[], None]) -> Callable[[], None]:
    """Call `action()` once `name` is imported: now if it already is, else right after its import, whoever does that.

    Returns a function that stops the waiting.

    If `name` is being imported at this moment (by a caller further up the stack), `action` is never called, because there is
    no event for the end of that import. Whoever needs `action` must call it later.
    """
    waiter = _Waiter(name, action)
    module = sys.modules.get(name)
    if module is None:
        sys.meta_path.insert(0, waiter)
    elif not getattr(module.__spec__, "_initializing", False):
        action()

    def cancel() -> None:
        if waiter in sys.meta_path:
            sys.meta_path.remove(waiter)

    return cancel


def hook_after_import(name: str, hook: Callable[[], Callable[[], None]]) -> Callable[[], None]:
    """Call `hook()` once `name` is imported. Returns a function that calls the result of `hook()`, or stops the waiting."""
    undo: list[Callable[[], None]] = []
    cancel = after_import(name, lambda: undo.append(hook()))

    def take_out() -> None:
        cancel()
        while undo:
            undo.pop()()

    return take_out


def hook_each_after_import(hooks: Iterable[tuple[str, Callable[[], Callable[[], None]]]]) -> Callable[[], None]:
    """`hook_after_import` for each (module, hook). Returns a function that takes all of them out."""
    undo = [hook_after_import(name, hook) for name, hook in hooks]

    def take_out() -> None:
        for one in undo:
            one()

    return take_out


def when_torch_comes(action: Callable[[], None]) -> Callable[[], None]:
    """Call `action()` once torch is completely imported."""
    return after_import("torch", action)


def when_triton_comes(action: Callable[[], None]) -> Callable[[], None]:
    """Call `action()` once Triton is completely imported: its modules import each other in cycles."""
    return after_import("triton", action)


def when_dynamo_comes(action: Callable[[], None]) -> Callable[[], None]:
    """Call `action()` once Dynamo is imported. That may be inside an import of Inductor."""
    return after_import("torch._dynamo", action)


class _Waiter(importlib.abc.MetaPathFinder):
    """The first finder until the module is imported. A mere search (`find_spec`) does not count as an import."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name = name
        self.action = action
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name or self._asking:
            return None
        self._asking = True  # let the other finders answer; this one only wraps their result
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                self.action()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
