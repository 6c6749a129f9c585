"""The arguments of a call of a compiled function: its tensors and integers, and a digest of everything but their sizes.

The builder tells call signatures apart by it, and the serving process finds the signature that a missed call would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from aot_cache.artifact import key
from aot_cache.upstream.codec import python_code
from aot_cache.upstream.codec.real_tensors import is_parameter

if TYPE_CHECKING:  # tracing kernels does without torch's compiler
    from aot_cache.upstream.hooks.dynamo_frames import Frame


_DEEP = 8


@dataclass(frozen=True)
class Leaf:
    """One tensor or integer argument of a call; `path` is the expression that leads to it."""

    path: str
    value: Any
    fixed: bool
    """A parameter or buffer: its sizes belong to the model."""

    @property
    def sizes(self) -> tuple[int, ...]:
        if isinstance(self.value, torch.Tensor):
            return tuple(int(s) for s in self.value.shape)
        return (int(self.value),)


def leaves(frame: Frame) -> tuple[list[Leaf], str]:
    """(the tensors and integers of a call, the structure around them as text)."""
    found: list[Leaf] = []
    text: list[str] = []
    seen: set[int] = set()
    for name, value in sorted(frame.f_locals.items()):
        _walk(value, f"L[{name!r}]", found, text, seen, 0, False)
    return found, "\n".join(text)


def _walk(
    value: object, path: str, found: list[Leaf], text: list[str], seen: set[int], depth: int, fixed: bool
) -> None:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, torch.Tensor):
        parameter = is_parameter(value)
        shape = tuple(value.shape) if fixed or parameter else value.dim()  # models of other sizes differ in structure
        text.append(f"{path} {value.dtype} {value.device.type} {shape} {value.requires_grad} {parameter}")
        found.append(Leaf(path, value, fixed or parameter))
    elif value is None or kind in (bool, int, float, str, bytes):
        if kind is int and not fixed:
            found.append(Leaf(path, value, False))
        # Plain attributes of a module often differ between layers and are seldom read: where they are, Dynamo guards on
        # them, and the graph is traced again there.
        text.append(f"{path} {name}" if fixed or kind is int else f"{path} {value!r}")
    else:
        text.append(f"{path} {name}")
        if depth < _DEEP and id(value) not in seen:
            seen.add(id(value))
            for step, inner, owned in _inside(value):
                _walk(inner, path + step, found, text, seen, depth + 1, fixed or owned)


def _inside(value: object) -> Iterator[tuple[str, object, bool]]:
    """(expression, item, whether its sizes belong to the model)."""
    if isinstance(value, (list, tuple)):
        yield from ((f"[{n}]", item, False) for n, item in enumerate(value))
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item, False) for key, item in value.items() if _is_literal(key))
    elif isinstance(value, torch.nn.Module):
        for group in ("_parameters", "_buffers", "_modules"):
            owned = group != "_modules"  # a submodule's weights belong to the model, its state between calls does not
            yield from ((f".{group}[{name!r}]", item, owned) for name, item in getattr(value, group).items())
        yield from ((f".{name}", item, False) for name, item in vars(value).items() if isinstance(item, torch.Tensor))
    elif type(value).__module__ not in ("builtins", "functools", "torch") and not isinstance(value, type):
        yield from ((f".{name}", item, False) for name, item in python_code.attributes(value).items())


def _is_literal(key: object) -> bool:
    """Whether `repr(key)` evaluates to `key`: paths are evaluated."""
    if type(key) is tuple:
        return all(map(_is_literal, key))
    return key is None or type(key) in (bool, int, str, bytes)


def structure_of(frame: Frame, mode: str) -> tuple[str, list[Leaf]]:
    """(digest of everything about a call but its sizes, its leaves)."""
    found, text = leaves(frame)
    return key.digest([frame.module, python_code.digest(frame.code), frame.wrapping, mode, text])[:16], found
