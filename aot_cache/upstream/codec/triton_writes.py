"""Which of its parameters a Triton kernel may write to, read from its source and that of the functions that it calls.

Values of a tensor without memory are known only until a kernel may have written to it. The answer errs to the safe side: what
cannot be followed counts as written, and a branch that is never taken counts, too.

Upstream: `triton/language/core.py` and `semantic.py` (`store`, `atomic_*` and descriptors are what writes to memory; `load` gives
values, through which no pointer can be followed), `triton/runtime/jit.py` (`JITCallable`: `parse`, `fn`).
"""

from __future__ import annotations

import ast
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aot_cache.upstream.codec import triton_names

Names = frozenset[str]
_NONE: Names = frozenset()
_VALUES = ("load", "atomic_", "gather")
"""How the names of functions begin, or end after `_`, whose results are values out of memory."""


@dataclass(frozen=True)
class Use:
    """What a function does with its parameters: it may write to some, and its result may point into some."""

    written: Names
    returned: Names


_known: weakref.WeakKeyDictionary[Any, Use] = weakref.WeakKeyDictionary()


def written_by(function: Any) -> Names:
    """The names of the parameters through which a kernel may write."""
    return _use(function, ()).written


def _use(function: Any, callers: tuple[Any, ...]) -> Use:
    found = _known.get(function)
    if found is None:
        names = _parameters(function)
        if function in callers:  # Triton refuses recursion
            return Use(frozenset(names), frozenset(names))
        found = _Reader(function, names, (*callers, function)).use()
        _known[function] = found
    return found


def _parameters(function: Any) -> list[str]:
    return list(function.signature.parameters) if hasattr(function, "signature") else list(function.arg_names)


class _Reader:
    """Follows names through one function, without regard to the order of its statements."""

    def __init__(self, function: Any, parameters: Sequence[str], callers: tuple[Any, ...]) -> None:
        self._function, self._callers = function, callers
        self._tree: ast.AST = function.parse()
        self._into: dict[str, Names] = {name: frozenset({name}) for name in parameters}
        """Local name → the parameters into which it may point."""

    def use(self) -> Use:
        while self._follow():
            pass
        written, returned = _NONE, _NONE
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Call):
                written |= self._written(node)
            elif isinstance(node, ast.Return) and node.value is not None:
                returned |= self._points(node.value)
        return Use(written, returned)

    def _follow(self) -> bool:
        """Follow each assignment once more; whether anything was new."""
        before = dict(self._into)
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign):
                for target in node.targets:
                    self._assign(target, node.value)
            elif isinstance(node, (ast.AugAssign, ast.AnnAssign, ast.NamedExpr)) and node.value is not None:
                self._assign(node.target, node.value)
            elif isinstance(node, ast.For):
                self._assign(node.target, node.iter)
            elif isinstance(node, ast.withitem) and node.optional_vars is not None:
                self._assign(node.optional_vars, node.context_expr)
        return before != self._into

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        pairs = _pairs(target, value)
        for one, of in pairs:
            self._assign(one, of)
        into = _NONE if pairs else self._points(value)
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self._into[node.id] = self._into.get(node.id, _NONE) | into

    def _points(self, value: ast.AST) -> Names:
        """The parameters into which an expression may point."""
        if isinstance(value, ast.Name):
            return self._into.get(value.id, _NONE)
        if isinstance(value, ast.Compare):
            return _NONE
        if isinstance(value, ast.Call):
            return self._result(value)
        found = _NONE
        for inner in ast.iter_child_nodes(value):
            found |= self._points(inner)
        return found

    def _result(self, call: ast.Call) -> Names:
        name, callee = self._callee(call)
        if callee is not None:
            use = _use(callee, self._callers)
            return frozenset().union(*(self._points(v) for p, v in self._passed(call, callee) if p in use.returned))
        if any(name.startswith(part) or name.endswith(f"_{part}") for part in _VALUES):
            return _NONE
        return self._of_all(call)

    def _written(self, call: ast.Call) -> Names:
        """The parameters through which a call may write."""
        name, callee = self._callee(call)
        if callee is not None:
            use = _use(callee, self._callers)
            return frozenset().union(*(self._points(v) for p, v in self._passed(call, callee) if p in use.written))
        if self._is_known(call) and not (
            "store" in name or name.startswith("atomic") or "asm" in name or "copy" in name
        ):
            return _NONE
        if (
            name in ("store", *_ATOMICS) and self._is_known(call) and call.args
        ):  # the rest is what is written, and where not
            return self._points(call.args[0]) | self._of_method(call)
        return self._of_all(call)

    def _callee(self, call: ast.Call) -> tuple[str, Any]:
        """(last part of the name of what is called, that if it is a function in Triton's language that we can read)"""
        dotted = _dotted(call.func)
        if not dotted:
            return (call.func.attr if isinstance(call.func, ast.Attribute) else ""), None
        found = None if dotted.partition(".")[0] in self._into else triton_names.look_up(self._function, dotted)
        readable = isinstance(found, triton_names.JITCallable) and not _is_triton(found)
        return dotted.rpartition(".")[2], found if readable else None

    def _is_known(self, call: ast.Call) -> bool:
        """Whether it is a function of Triton's or Python's, or a method of a value."""
        dotted = _dotted(call.func)
        if isinstance(call.func, ast.Attribute) and (not dotted or dotted.partition(".")[0] in self._into):
            return True
        found = triton_names.look_up(self._function, dotted) if dotted else None
        return found is not None and _is_triton(found)

    def _passed(self, call: ast.Call, callee: Any) -> Iterator[tuple[str, ast.expr]]:
        """(parameter, argument) of a call; an argument whose place is not known belongs to each."""
        names = _parameters(callee)
        unclear = any(isinstance(one, ast.Starred) for one in call.args) or any(
            one.arg is None for one in call.keywords
        )
        if unclear:
            yield from ((name, one) for name in names for one in [*call.args, *(k.value for k in call.keywords)])
            return
        yield from zip(names, call.args)
        yield from ((one.arg, one.value) for one in call.keywords if one.arg is not None)

    def _of_method(self, call: ast.Call) -> Names:
        return self._points(call.func.value) if isinstance(call.func, ast.Attribute) else _NONE

    def _of_all(self, call: ast.Call) -> Names:
        found = self._of_method(call)
        for one in [*call.args, *(keyword.value for keyword in call.keywords)]:
            found |= self._points(one)
        return found


_ATOMICS = tuple(f"atomic_{kind}" for kind in "add max min and or xor xchg cas".split())


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    """(target, value) of each part of an assignment of a tuple to a tuple; empty for another one."""
    both = (target, value)
    if not all(isinstance(one, (ast.Tuple, ast.List)) for one in both):
        return []
    left, right = (one.elts for one in both if isinstance(one, (ast.Tuple, ast.List)))
    starred = any(isinstance(one, ast.Starred) for one in [*left, *right])
    return [] if starred or len(left) != len(right) else list(zip(left, right))


def _dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression that is a name; else an empty text."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _is_triton(found: Any) -> bool:
    module = str(getattr(getattr(found, "fn", found), "__module__", ""))
    return module == "builtins" or module.partition(".")[0] == "triton"
