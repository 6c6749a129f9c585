"""Code objects as bytes that another process with the same Python minor can run.

Upstream: CPython's `marshal` (`Python/marshal.c`), in version 2, whose output does not depend on reference counts or
interning, so that equal code gives equal bytes; `torch/_dynamo/codegen.py` (devices, dtypes and enums are constants of its
bytecode).
"""

from __future__ import annotations

import enum
import importlib
import marshal
import types
from collections.abc import Iterator, Mapping
from typing import Any

from aot_cache.upstream.codec import gpu_number, graph_names
from aot_cache.upstream.codec.python_code import identity

_MARSHAL = 2


def dump(code: types.CodeType, names: Mapping[str, str], filename: str) -> bytes:
    """`code` as bytes, with names renamed by `names` and `filename` as its file.

    Raises:
        ValueError: a constant cannot be written as bytes.
    """
    strange = sorted({identity(value) or type(value).__name__ for value in _without_bytes(code)})
    if strange:
        raise ValueError(f"constants of the bytecode have no bytes: {', '.join(strange)}")
    return marshal.dumps(_portable(code, names, filename), _MARSHAL)


def _without_bytes(code: types.CodeType) -> Iterator[object]:
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _without_bytes(value)
        else:
            try:
                marshal.dumps(_encoded(value), _MARSHAL)
            except ValueError:
                yield value


_STANDS_FOR = "aot-cache: stands for"
"""Marks encoded constants that `marshal` does not support: Dynamo's bytecode contains devices and dtypes."""

_OF_TORCH = frozenset(f"torch:{name}" for name in ("device", "dtype", "layout", "memory_format"))


def _encoded(value: Any) -> Any:
    kind = f"{type(value).__module__}:{type(value).__qualname__}"
    if kind in _OF_TORCH:
        return (_STANDS_FOR, kind, str(value))
    if isinstance(value, enum.Enum):
        return (_STANDS_FOR, "enum", type(value).__module__, type(value).__qualname__, value.name)
    if type(value) is tuple:
        return tuple(map(_encoded, value))
    return value


def _decoded(value: Any, number: int) -> Any:
    if type(value) is not tuple or not value:
        return value
    if value[0] != _STANDS_FOR:
        return tuple(_decoded(part, number) for part in value)
    _, kind, *rest = value
    if kind == "enum":
        graph_names.require_modules(rest[:1], "bytecode")  # the function that is called has imported it
        owner: Any = importlib.import_module(rest[0])
        for step in rest[1].split("."):
            owner = getattr(owner, step)
        if not (isinstance(owner, type) and issubclass(owner, enum.Enum)):
            raise ValueError(f"{rest[1]} is no enum")
        return owner[rest[2]]
    torch: Any = importlib.import_module("torch")
    if kind == "torch:device":
        return torch.device(gpu_number.in_text(rest[0], number))
    return getattr(torch, rest[0].removeprefix("torch."))


def _portable(code: types.CodeType, names: Mapping[str, str], filename: str) -> types.CodeType:
    consts = tuple(
        _portable(value, names, filename) if isinstance(value, types.CodeType) else _renamed(value, names)
        for value in code.co_consts
    )
    return code.replace(
        co_filename=filename,
        co_name=names.get(code.co_name, code.co_name),
        co_names=tuple(names.get(name, name) for name in code.co_names),
        co_consts=consts,
    )


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    return names.get(value, value) if isinstance(value, str) else _encoded(value)


def load(data: bytes, number: int = gpu_number.BUILT_FOR) -> types.CodeType:
    """The code object in `data`, for GPU `number` of the process. The caller must have checked the hash of `data`."""
    code = marshal.loads(data)  # noqa: S302  # hashed by the caller
    if not isinstance(code, types.CodeType):
        raise ValueError(f"bytes of a code object, not of a {type(code).__name__}")
    return _restored(code, number)


def _restored(code: types.CodeType, number: int) -> types.CodeType:
    consts = (_restored(v, number) if isinstance(v, types.CodeType) else _decoded(v, number) for v in code.co_consts)
    return code.replace(co_consts=tuple(consts))
