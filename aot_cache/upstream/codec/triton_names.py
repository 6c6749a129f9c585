"""The names in a kernel's source, and the values that they refer to.

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
except ImportError:  # pragma: no cover - every tested release has it, see `aot_cache.tested`
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


@lru_cache(maxsize=4096)  # kernels of a factory share one source
def in_source(source: str) -> list[str]:
    """The dotted names in a function's source, sorted."""
    visitor = _Names()
    visitor.visit(ast.parse(source))
    return sorted(visitor.found)


def name_of(function: Any) -> str:
    """`module:qualified.name` of a kernel or of a function that kernels call."""
    return f"{function.fn.__module__}:{function.fn.__qualname__}"


def look_up(function: Any, dotted: str) -> Any:
    """The value of a name in the source of `function`; None if it is not defined yet, or is a local name of the kernel."""
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
    """A value that a kernel uses, as text that is the same in every process; None if it cannot change the code."""
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
        # Which of Triton's builtins a name refers to can depend on the machine (fla: a fast `exp`, or libdevice's).
        return f"triton {module.removeprefix('triton.')}.{getattr(value, '__qualname__', '?')}"
    return None


def hidden(function: Any) -> tuple[tuple[str, int], ...]:
    """(name, id) of closure variables of a kernel, and of the functions it calls, that have no `meaning`.

    Kernels with one name that differ only in these cannot be told apart.
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
        # A jit function in a container has a meaning, but its source is not compared: treat it as hidden.
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
    return found is not value  # a class or function that can be found by its name is the same for all kernels
