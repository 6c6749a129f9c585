"""The names in a kernel's source, and what they stand for around it.

Upstream: `triton/compiler/code_generator.py` (which globals a kernel may use), `triton/runtime/jit.py` (`JITCallable`: `fn`,
`src`).
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import lru_cache
from types import BuiltinFunctionType, ModuleType
from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction

try:
    from triton.runtime.jit import JITCallable as JITCallable
except ImportError:  # pragma: no cover - every release that was tested has it, see `aot_cache.tested`
    JITCallable = JITFunction


class _Names(ast.NodeVisitor):
    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_Name(self, node: ast.Name) -> None:
        self.found.add(node.id)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts = [node.attr]
        inner: ast.expr = node.value
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            self.found.add(".".join([inner.id, *reversed(parts)]))
        else:
            self.visit(inner)


@lru_cache(maxsize=4096)  # a factory's kernels have one source
def in_source(source: str) -> list[str]:
    """The dotted names in a function's source, sorted."""
    visitor = _Names()
    visitor.visit(ast.parse(source))
    return sorted(visitor.found)


def name_of(function: Any) -> str:
    """`module:qualified.name` of a kernel or of a function that kernels call."""
    return f"{function.fn.__module__}:{function.fn.__qualname__}"


def look_up(function: Any, dotted: str) -> Any:
    """What a name in the source of `function` stands for; None where it is not known yet, or is the kernel's own."""
    first, *rest = dotted.split(".")
    python = function.fn
    cells = dict(zip(python.__code__.co_freevars, python.__closure__ or ()))
    if first in cells:
        try:
            value = cells[first].cell_contents
        except ValueError:
            return None
    else:
        value = python.__globals__.get(first)
    for part in rest:
        if value is None:
            return None
        value = getattr(value, part, None)
    return value


def meaning(value: Any) -> str | None:
    """What a global name stands for, in words that are the same in every process; None when it cannot change code."""
    if isinstance(value, JITCallable):
        return f"jit {name_of(value)}"
    if isinstance(value, (tl.constexpr, tl.dtype, bool, int, float, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        inner = [meaning(v) for v in value]
        return None if any(m is None for m in inner) else f"[{', '.join(str(m) for m in inner)}]"
    if isinstance(value, ModuleType) or value is None:
        return None
    module = getattr(value, "__module__", "") or ""
    if module.startswith("triton."):
        # Which of Triton's builtins a name means can depend on the machine (fla: `exp` is a fast one or libdevice's).
        return f"triton {module.removeprefix('triton.')}.{getattr(value, '__qualname__', '?')}"
    return None


def hidden(function: Any) -> tuple[tuple[str, int], ...]:
    """(name, id) of what a factory has put around a kernel, or around what it calls, that has no meaning in words.

    Kernels of one name that differ in nothing else cannot be told apart.
    """
    found: list[tuple[str, int]] = []
    pending, seen = [function], set()
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        for dotted in in_source(current.src):
            value = look_up(current, dotted)
            if isinstance(value, JITCallable):
                pending.append(value)
            elif dotted.partition(".")[0] in current.fn.__code__.co_freevars and any(map(_is_hidden, _parts(value))):
                found.append((f"{dotted} in {name_of(current)}", id(value)))
    return tuple(found)


def _parts(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _parts(item)
        # Functions in it have a name, and no source of theirs is looked at.
        yield from (_SOMETHING for item in value if isinstance(item, JITCallable))
    else:
        yield value


_SOMETHING = object()


def _is_hidden(value: Any) -> bool:
    if value is None or meaning(value) is not None or isinstance(value, (ModuleType, BuiltinFunctionType)):
        return False
    found: Any = sys.modules.get(getattr(value, "__module__", None) or "")
    for part in (getattr(value, "__qualname__", None) or "?").split("."):
        found = getattr(found, part, None)
    return found is not value  # a class or function that its module has by name is the same for all
