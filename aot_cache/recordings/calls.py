"""Records the calls of compiled functions, so that a build can make the same calls without the program."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

from aot_cache.artifact.compiled_function import CompiledFunction
from aot_cache.errors import AotCacheError
from aot_cache.upstream.codec import unwrapping

_MOST = 1024
"""How many calls of one kind are kept, apart from those with a size that is smaller or larger than all before."""


class _Kind:
    """Calls that differ in sizes only."""

    def __init__(self, about: CompiledFunction) -> None:
        self.about = about
        self.rows: dict[tuple[tuple[int, ...], ...], None] = {}
        self._low: list[int] = []
        self._high: list[int] = []

    def add(self, sizes: list[list[int]]) -> bool:
        """Whether it is new."""
        row = tuple(map(tuple, sizes))
        if row in self.rows:
            return False
        flat = [size for one in row for size in one]
        low, high = self._low or flat, self._high or flat
        if len(self.rows) >= _MOST and all(a <= x <= b for a, x, b in zip(low, flat, high)):
            return False
        self._low, self._high = list(map(min, low, flat)), list(map(max, high, flat))
        self.rows[row] = None
        return True


class CallLog:
    """The calls of compiled functions so far. `note` may be called from any thread, and raises nothing."""

    def __init__(self, changed: Callable[[], None]) -> None:
        self.lock = threading.RLock()
        self._changed = changed
        self._kinds: dict[str, _Kind] = {}
        self._busy = threading.local()

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], callback: Any) -> None:
        """A call of `function`, for which Dynamo has `callback`."""
        if getattr(self._busy, "now", False):
            return
        self._busy.now = True
        try:
            about, sizes = _described(function, args, kwargs, callback)
            with self.lock:
                kind = self._kinds.setdefault(about.identity, _Kind(about))
                new = kind.add(sizes)
            if new:
                self._changed()
        except Exception:  # a recording never stops a program; what is not recorded is a miss when it is served
            return
        finally:
            self._busy.now = False

    def functions(self) -> list[CompiledFunction]:
        """What was called, with the sizes of each call."""
        with self.lock:
            return [
                replace(kind.about, calls=[list(map(list, row)) for row in kind.rows]) for kind in self._kinds.values()
            ]

    def forget(self) -> None:
        with self.lock:
            self._kinds.clear()


def _described(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], callback: Any
) -> tuple[CompiledFunction, list[list[int]]]:
    """(the function and the call without sizes, the sizes)"""
    from aot_cache.upstream.codec import call_arguments, dynamo_globals, torch_settings
    from aot_cache.upstream.hooks import dynamo_calls, dynamo_frames

    inner = unwrapping.function_of(function)
    if inner is None:
        return CompiledFunction(function=repr(type(function)), why="what is compiled is no function"), []
    name = f"{inner.__module__}:{inner.__qualname__}"
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, (ModuleType, type)):
        return CompiledFunction(function=name, why=f"it is a method of a {_name(type(owner))}"), []
    found = _by_name(inner, name)
    if isinstance(found, str):
        return CompiledFunction(function=name, why=found), []
    config = dynamo_frames.compile_config_of(callback)
    if config is None:
        return CompiledFunction(function=name, why="it is compiled with another backend than Inductor"), []
    if not dynamo_calls.has_plain_options(callback):
        return CompiledFunction(function=name, why="an option of its torch.compile is no number and no text"), []
    by = (
        {}
        if dynamo_calls.is_compiled(found, function)
        else {**config, "fullgraph": dynamo_frames.is_fullgraph(callback)}
    )
    try:
        code = inner.__code__
        arguments, sizes = call_arguments.written(args, kwargs, code.co_varnames[: code.co_argcount])
    except AotCacheError as error:
        return CompiledFunction(function=name, why=str(error)), []
    about = CompiledFunction(
        function=name,
        arguments=arguments,
        mode=dynamo_globals.mode(),
        autocast=torch_settings.autocast(),
        compiled_by=by,
        settings=torch_settings.changed(),
    )
    return about, sizes


def _by_name(inner: Any, name: str) -> Any:
    """What the function's module has under its name; a text why that is something else."""
    if inner.__module__ == "__main__":
        return "it is in the program's own file, which a build cannot import: move it to a module"
    if "<locals>" in inner.__qualname__:
        return "it is made inside a function"
    found = unwrapping.named(name)
    if unwrapping.function_of(found) is not inner:
        return "its module has something else under its name"
    return found


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
