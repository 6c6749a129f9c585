"""Finds every tensor and plain value in an object (arguments, results, a model's state), each with a readable path."""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

from aot_cache.upstream.codec import real_tensors

_PLAIN = (str, bytes, bool, int, float, complex, type(None))
_DEEPEST = 24
_MODULE_DICTS = ("_parameters", "_buffers", "_modules")


@dataclass(frozen=True)
class Leaf:
    """A tensor or a plain value; for any other object, the name of its type.

    Args:
        path: such as `args[0].caches[1]`.
    """

    path: str
    value: Any


def leaves(value: object, path: str) -> Iterator[Leaf]:
    """The leaves in `value`. An object's attributes are listed once; a leaf in several containers is listed in each."""
    yield from _walk(value, path, set(), ())


def tensors(value: object, path: str) -> Iterator[tuple[str, object]]:
    """(path, tensor) of all tensors in `value`."""
    import torch

    for leaf in leaves(value, path):
        if isinstance(leaf.value, torch.Tensor):
            yield leaf.path, leaf.value


def _walk(value: object, path: str, seen: set[int], above: tuple[int, ...]) -> Iterator[Leaf]:
    import torch

    if isinstance(value, _PLAIN):
        yield Leaf(path, value)
        return
    if isinstance(value, torch.Tensor):
        inner = real_tensors.inner_tensors(value)
        if not inner:
            yield Leaf(path, value)
        parts: list[tuple[str, object]] = [(f"{path}.{name}", part) for name, part in inner.items()]
    else:
        if id(value) in seen or id(value) in above or len(above) > _DEEPEST:
            return
        if not isinstance(value, (Mapping, list, tuple, Set)):
            seen.add(id(value))
        parts = list(_parts(value, path))
        if not parts:
            yield Leaf(path, type(value).__qualname__)
    for name, part in parts:
        yield from _walk(part, name, seen, (*above, id(value)))


def _parts(value: object, path: str) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        yield from ((f"{path}[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", None)
        yield from ((f"{path}.{names[n]}" if names else f"{path}[{n}]", part) for n, part in enumerate(value))
    elif isinstance(value, Set):
        yield from ((f"{path}{{{n}}}", part) for n, part in enumerate(sorted(value, key=repr)))
    elif isinstance(value, (type, types.ModuleType, types.CodeType)):
        return
    elif isinstance(value, types.MethodType):
        yield path, value.__self__
    elif isinstance(value, types.FunctionType):
        yield from ((f"{path}.{name}", part) for name, part in _closure(value))
    else:
        yield from _attributes(value, path)


def _closure(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not set yet
            continue


def _attributes(value: object, path: str) -> Iterator[tuple[str, object]]:
    import functools

    import torch

    if isinstance(value, functools.partial):
        yield from ((f"{path}.{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    if type(value).__module__.split(".")[0] in ("torch", "triton") and not isinstance(value, torch.nn.Module):
        return  # a dtype, a device, a stream, a compiled function
    for name, part in getattr(value, "__dict__", {}).items():
        if name in _MODULE_DICTS and isinstance(part, dict):
            yield from ((f"{path}.{inner}", found) for inner, found in part.items())
        elif not name.endswith("_hooks"):
            yield f"{path}.{name}", part
