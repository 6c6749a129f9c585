"""Code objects and other values as text: digests of functions, names for what `is` compares, text for what `==` compares.

Nothing here depends on where a function is defined: no path and no line number.

Upstream: CPython's code objects; `torch/_dynamo/eval_frame.py` (`OptimizedModule`).
"""

from __future__ import annotations

import collections
import enum
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Mapping
from functools import cache
from typing import Any


@cache
def digest(code: types.CodeType) -> str:
    """Digest of `code`, 32 hex digits: instructions, constants, names, nested functions. Valid for one Python minor."""
    parts: list[object] = [
        code.co_code,
        code.co_names,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags,
        code.co_name,
        getattr(code, "co_exceptiontable", b""),
        [_constant(value) for value in code.co_consts],
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def _constant(value: object) -> object:
    if isinstance(value, types.CodeType):
        return digest(value)
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    if isinstance(value, tuple):
        return tuple(map(_constant, value))
    return repr(value)


def identity(value: object) -> str:
    """A name for an object that guards compare with `is`, the same in every process; empty if the object has no name.

    The name of a Python function contains the digest of its code, so a replaced or changed function has another name.
    """
    if isinstance(value, types.ModuleType):
        return f"module {value.__name__}"
    if isinstance(value, type):
        return f"class {value.__module__}:{value.__qualname__}{_generated(value)}"
    if isinstance(value, types.FunctionType):
        return f"function {value.__module__}:{value.__qualname__} {digest(value.__code__)}"
    if isinstance(value, types.CodeType):
        return f"code {value.co_name} {digest(value)}"
    if isinstance(value, types.MethodType):
        inner = identity(value.__func__)
        return f"method {inner}" if inner else ""
    if isinstance(value, enum.Enum):
        return f"enum {type(value).__module__}:{type(value).__qualname__}.{value.name}"
    if value is None or isinstance(value, (bool, int, float, str, bytes, type(...), type(NotImplemented))):
        return f"value {value!r}"
    return _named(value)


def _generated(owner: type) -> str:
    """Digest of a class's generated methods (dataclasses, named tuples, `torch.fx` and the like); empty if it has none.

    They are in no source file, so no other check sees that they changed (`place`).
    """
    made = [
        (name, digest(method.__code__), _held_by(method))
        for name, method in sorted(vars(owner).items())
        if isinstance(method, types.FunctionType) and method.__code__.co_filename.startswith("<")
    ]
    return f" {hashlib.sha256(repr(made).encode()).hexdigest()[:32]}" if made else ""


def _held_by(function: types.FunctionType) -> str:
    cells = [cell.cell_contents for cell in function.__closure__ or () if _filled(cell)]
    others = [value for value in cells if not isinstance(value, type)]  # a class may contain itself: endless recursion
    return literal([function.__defaults__, sorted((function.__kwdefaults__ or {}).items()), others])


_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...))


_TOP = 4
"""Levels of nested containers that `literal` looks into."""


def literal(value: object, depth: int = _TOP) -> str:
    """What a guard on `value` compares, as text that is the same in every process: constants and containers of them.

    Any other object appears as its name (`identity`) or its type alone, because its contents have guards of their own.
    """
    if isinstance(value, enum.Enum):
        return f"{identity(value)} {literal(value.value, depth - 1)}" if depth else identity(value)
    if type(value) in _ATOMS:
        return repr(value)
    kind = _kind(value)
    if isinstance(value, (list, tuple)) and depth:
        return f"{kind} [{', '.join(literal(item, depth - 1) for item in value)}]"
    if isinstance(value, (set, frozenset)) and depth:
        return f"{kind} {{{', '.join(sorted(literal(item, depth - 1) for item in value))}}}"
    if isinstance(value, dict) and depth == _TOP:
        return f"{kind} of {len(value)}"
    return identity(value) or kind


_MOST = 10_000
"""Number of values after which `exact` gives up: a larger object is no constant."""


def exact(value: object) -> str:
    """Everything that `==` compares of `value`, as text that is the same in every process; empty if there is no such text.

    A container is written as its items, in order; an object of a Python class as its class and all its attributes.
    """
    try:
        return _Exact().text(value)
    except _NotExact:
        return ""


class _NotExact(Exception):
    """A value has no exact text."""


class _Exact:
    def __init__(self) -> None:
        self._around: list[int] = []
        self._left = _MOST

    def text(self, value: object) -> str:
        self._left -= 1
        if self._left < 0 or id(value) in self._around:
            raise _NotExact
        self._around.append(id(value))
        try:
            return self._text(value)
        finally:
            self._around.pop()

    def _text(self, value: Any) -> str:
        if isinstance(value, enum.Enum):
            return f"{identity(value)} {self.text(value.value)}"
        if type(value) in _ATOMS:
            return repr(value)
        kind = _kind(value)
        if isinstance(value, (set, frozenset)):
            return f"{kind} {{{', '.join(sorted(map(self.text, value)))}}}{self._attributes(value)}"
        if isinstance(value, Mapping):
            items = ", ".join(f"{self.text(k)}: {self.text(v)}" for k, v in value.items())
            return f"{kind} {{{items}}}{self._attributes(value)}"
        if isinstance(value, _SEQUENCES):
            return f"{kind} [{', '.join([self.text(item) for item in value])}]{self._attributes(value)}"
        if isinstance(value, (slice, range)):
            return f"{kind} [{self.text(value.start)}, {self.text(value.stop)}, {self.text(value.step)}]"
        return identity(value) or f"{kind}{self._inside(value)}"

    def _inside(self, value: Any) -> str:
        if isinstance(value, functools.partial):
            return " " + self.text([value.func, value.args, value.keywords])
        if type(value).__module__ == "numpy":
            return " " + self._of_numpy(value)
        if type(value) is not object and not _is_pythons(type(value)):
            raise _NotExact
        return self._attributes(value)

    def _of_numpy(self, value: Any) -> str:
        if not hasattr(value, "dtype"):
            raise _NotExact
        return self.text([str(value.dtype), value.tolist()])

    def _attributes(self, value: Any) -> str:
        held = attributes(value)
        return f" ({', '.join(f'{name}={self.text(inner)}' for name, inner in sorted(held.items()))})" if held else ""


_SEQUENCES: tuple[type[Any], ...] = (
    list,
    tuple,
    collections.deque,
    type({}.keys()),
    type({}.values()),
    type({}.items()),
)


def attributes(value: Any) -> dict[str, Any]:
    """An object's attributes, from its dictionary and its slots."""
    slots = (slot for cls in type(value).__mro__ for slot in _slots(vars(cls).get("__slots__", ())))
    held = {name: getattr(value, name) for name in slots if name.isidentifier() and hasattr(value, name)}
    held.pop("__weakref__", None)
    held.pop("__dict__", None)
    return {**held, **getattr(value, "__dict__", {})}


def _slots(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_pythons(kind: type) -> bool:
    """Whether objects of this class hold only Python attributes, and no fields of a C type."""
    slots = sum(len(_slots(vars(base).get("__slots__", ()))) for base in kind.__mro__)
    return (
        kind.__basicsize__ <= object.__basicsize__ + (2 + slots) * tuple.__itemsize__
    )  # 2: dictionary and weak references


def _kind(value: object) -> str:
    """The class of a value, as a serving process has it."""
    kind = type(value)
    if kind.__module__ == "torch._subclasses.fake_tensor" and hasattr(value, "_is_param"):
        return "torch.nn.parameter:Parameter"
    if kind.__module__ == "torch._subclasses.fake_tensor":
        return "torch:Tensor"
    return f"{kind.__module__}:{kind.__qualname__}"


_NAMED_BY_TEXT = frozenset(
    f"torch:{name}" for name in ("dtype", "device", "layout", "memory_format", "Size", "iinfo", "finfo")
)


def _named(value: object) -> str:
    """Name of a builtin, operator, dtype or the like, which a module holds under its own name; empty if there is none."""
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    if kind in _NAMED_BY_TEXT or type(value).__module__ == "torch._ops":
        return f"{kind} {value}"  # dtypes, layouts, operators: their text is their name
    if isinstance(value, _MADE_BY_CALLS):
        return ""
    if isinstance(value, types.GenericAlias):
        return f"{kind} {value!r}"
    if type(value).__module__.startswith("triton.runtime."):
        return _kernel(value)
    qualified = _qualified(value)
    if qualified is not None:
        return f"{kind} {qualified}" if qualified else ""
    for owner in ("typing", "operator", "itertools"):
        known = sys.modules.get(owner)
        if known is not None and any(value is item for item in vars(known).values()):
            return f"{kind} {owner}:{value!r}"
    return ""


def _kernel(value: Any) -> str:
    """Name of a Triton kernel: a digest of its source, of everything it calls and of its configs. Graphs hold its binary."""
    from aot_cache.upstream.codec import triton_jit  # a kernel exists, so Triton is imported

    function = triton_jit.unwrap(value)
    if function is None:
        return ""
    configs = [str(config) for layer in triton_jit.wrappers(value) for config in getattr(layer, "configs", None) or ()]
    parts = [triton_jit.name_of(function), triton_jit.closure_digest(triton_jit.closure(function)), *configs]
    return f"kernel {hashlib.sha256(repr(parts).encode()).hexdigest()[:32]} {parts[0]}"


def _qualified(value: Any) -> str | None:
    """`module:qualname` of a callable, with the names of what it is bound to or wraps; empty if one of these has no name."""
    owner, wraps = getattr(value, "__self__", None), getattr(value, "__wrapped__", None)
    name, module = getattr(value, "__qualname__", ""), getattr(value, "__module__", None) or "builtins"
    if not (isinstance(name, str) and name and isinstance(module, str)):
        return None
    if _of_pybind(owner):
        name = str(value.__name__)  # the qualified name depends on how pybind11 was compiled
    # The object that a method is bound to, or the function that a functools cache wraps, is part of the name.
    constant = isinstance(owner, (tuple, frozenset))  # `keyword.iskeyword` is a method of one
    bound = [] if _stands_alone(owner) else [exact(owner) if constant else identity(owner)]
    parts = [*bound, *([identity(wraps)] if wraps is not None else [])]
    return " ".join([f"{module}:{name}", *parts]) if all(parts) else ""


_MADE_BY_CALLS = (types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType)


def _stands_alone(owner: object) -> bool:
    """Whether a callable bound to `owner` is identified by its own name: a function of a module or class.

    pybind11 binds module functions to a capsule, or to a record type of its own.
    """
    return owner is None or isinstance(owner, (types.ModuleType, type)) or _of_pybind(owner)


def _of_pybind(owner: object) -> bool:
    kind = type(owner)
    return kind.__name__ == "PyCapsule" or kind.__module__.startswith("pybind11")


def place(code: types.CodeType, module: str) -> tuple[str, types.CodeType] | None:
    """(qualified name, code) of the outermost function of `module` that is or contains `code`; None if there is none."""
    owner = sys.modules.get(module)
    return _places(owner).get(code) if owner is not None else None


def digests(module: str) -> dict[str, set[str]]:
    """Qualified name → digests of the functions with that name in `module`, as imported here."""
    return {name: set(map(digest, found)) for name, found in codes(module).items()}


def codes(module: str) -> dict[str, list[types.CodeType]]:
    """Qualified name → the code of the functions with that name in `module`, as imported here."""
    owner = sys.modules.get(module)
    found: dict[str, list[types.CodeType]] = {}
    for name, code in _places(owner).values() if owner is not None else ():
        found.setdefault(name, []).append(code)
    return found


class Functions:
    """The functions of modules, at one moment: what they hold is looked at once at most."""

    def __init__(self) -> None:
        self._digests: dict[str, dict[str, set[str]]] = {}

    def has(self, module: str, qualname: str, wanted: str) -> bool:
        """Whether `module`, as imported here, has a function with this qualified name whose code has this digest.

        Most are where their name says, and cost no walk through all of the module.
        """
        if _where_it_says(sys.modules.get(module), qualname, wanted):
            return True
        if module not in self._digests:
            self._digests[module] = digests(module)
        return wanted in self._digests[module].get(qualname, ())


def _where_it_says(module: types.ModuleType | None, qualname: str, wanted: str) -> bool:
    """Whether the name, followed from the module through its classes, leads to such a function, or to a wrapper of it."""
    value: Any = module
    path = qualname.split(".")
    for name in path[: _DEPTH + 1]:
        if isinstance(value, type) and module is not None and value.__module__ != module.__name__:
            return False
        value = vars(value).get(name) if isinstance(value, (types.ModuleType, type)) else None
    for _ in range(_DEPTH - len(path)):
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        elif isinstance(value, types.FunctionType):
            if (
                value.__globals__ is vars(module)
                and value.__qualname__ == qualname
                and digest(value.__code__) == wanted
            ):
                return True
            value = inspect.getattr_static(value, "__wrapped__", None)
        else:
            return False
    return False


def _places(module: types.ModuleType) -> dict[types.CodeType, tuple[str, types.CodeType]]:
    """Every code object reachable from `module`'s functions and classes → (name, code) of its outermost function."""
    found: dict[types.CodeType, tuple[str, types.CodeType]] = {}
    seen: set[int] = set()

    def nested(code: types.CodeType, name: str, outermost: types.CodeType) -> None:
        if code not in found:
            found[code] = (name, outermost)
            for value in code.co_consts:
                if isinstance(value, types.CodeType):
                    nested(value, name, outermost)

    def visit(value: Any, depth: int) -> None:
        if id(value) in seen or depth > _DEPTH:
            return
        seen.add(id(value))
        if isinstance(value, types.FunctionType):
            if value.__globals__ is vars(module):  # a decorator's wrapper copies the name of what it wraps
                nested(value.__code__, value.__qualname__, value.__code__)
            for cell in value.__closure__ or ():
                visit(cell.cell_contents if _filled(cell) else None, depth + 1)
        elif isinstance(value, (staticmethod, classmethod, types.MethodType)):
            visit(value.__func__, depth + 1)
        elif isinstance(value, property):
            for other in (value.fget, value.fset):
                visit(other, depth + 1)
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for other in list(vars(value).values()):
                visit(other, depth + 1)
        elif isinstance(value, (functools.partial, functools.cached_property)):
            visit(value.func, depth + 1)
        elif isinstance(value, (dict, list, tuple)):
            held = _held_in(value)
            for other in held if len(held) <= _MANY else ():
                visit(other, depth + 1)
        if callable(value) and not isinstance(value, type):
            visit(inspect.getattr_static(value, "__wrapped__", None), depth + 1)

    for value in list(vars(module).values()):
        visit(value, 0)
    return found


def _held_in(value: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> list[Any]:
    """What a container really holds: methods of a subclass may do anything (transformers' lazy mappings import each model)."""
    if isinstance(value, dict):
        return list(dict.values(value))
    return list(list.__iter__(value) if isinstance(value, list) else tuple.__iter__(value))


_DEPTH = 5
_MANY = 1000
"""Containers with more items are not searched for functions: they are vocabularies or tables."""


def _filled(cell: types.CellType) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
