"""What compiled functions are called with over a case's points: which sizes change, and which calls are alike.

A *kind* of call is one that one graph may serve: the same code under the same wrapping, arguments of the same structure,
and sizes that are equal or change with a declared `Range`. A size that is 1 at some points makes a kind of its own there,
because Dynamo has no dynamic dimension that may be 1. `Values` are static: each makes its own kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from aot_cache.upstream import python_code
from aot_cache.upstream.dynamo_frames import Frame
from aot_cache.upstream.torch_fake import is_parameter

Json = Any
_DEEP = 8
_SPECIAL = (0, 1)
"""Sizes for which Dynamo always makes a graph of its own."""


@dataclass(frozen=True)
class Leaf:
    """One tensor or integer that a call is given, by the expression that leads to it."""

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
    """(the tensors and integers that a call is given, the structure around them as text)."""
    found: list[Leaf] = []
    text: list[str] = []
    seen: set[int] = set()
    for name, value in sorted(frame.f_locals.items()):
        _walk(value, f"L[{name!r}]", found, text, seen, 0, False)
    return found, "\n".join(text)


def _walk(value: Any, path: str, found: list[Leaf], text: list[str], seen: set[int], depth: int, fixed: bool) -> None:
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, torch.Tensor):
        parameter = is_parameter(value)
        shape = tuple(value.shape) if fixed or parameter else value.dim()  # another model is another structure
        text.append(f"{path} {value.dtype} {value.device.type} {shape} {value.requires_grad} {parameter}")
        found.append(Leaf(path, value, fixed or parameter))
    elif value is None or kind in (bool, int, float, str, bytes):
        if kind is int and not fixed:
            found.append(Leaf(path, value, False))
        # What a module has as plain values often differs from layer to layer and is seldom asked: Dynamo guards on it
        # where it is, and the graph is traced again there.
        text.append(f"{path} {name}" if fixed or kind is int else f"{path} {value!r}")
    else:
        text.append(f"{path} {name}")
        if depth < _DEEP and id(value) not in seen:
            seen.add(id(value))
            for step, inner, owned in _inside(value):
                _walk(inner, path + step, found, text, seen, depth + 1, fixed or owned)


def _inside(value: Any) -> Iterator[tuple[str, Any, bool]]:
    """(expression, item, whether its sizes belong to the model)."""
    if isinstance(value, (list, tuple)):
        yield from ((f"[{n}]", item, False) for n, item in enumerate(value))
    elif isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item, False) for key, item in value.items() if _is_literal(key))
    elif isinstance(value, torch.nn.Module):
        for group in ("_parameters", "_buffers", "_modules"):
            owned = group != "_modules"  # a part's weights are, what it keeps from call to call is not
            yield from ((f".{group}[{name!r}]", item, owned) for name, item in getattr(value, group).items())
        yield from ((f".{name}", item, False) for name, item in vars(value).items() if isinstance(item, torch.Tensor))
    elif type(value).__module__ not in ("builtins", "functools", "torch") and not isinstance(value, type):
        yield from ((f".{name}", item, False) for name, item in _attributes(value).items())


def _attributes(value: Any) -> dict[str, Any]:
    slots = (slot for cls in type(value).__mro__ for slot in _names(vars(cls).get("__slots__", ())))
    held = {name: getattr(value, name) for name in slots if name.isidentifier() and hasattr(value, name)}
    return {**held, **getattr(value, "__dict__", {})}


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_literal(key: Any) -> bool:
    """Whether `repr(key)` is read back as `key`: paths are evaluated."""
    if type(key) is tuple:
        return all(map(_is_literal, key))
    return key is None or type(key) in (bool, int, str, bytes)


_Pattern = tuple[tuple[tuple[int, int], ...], ...]


@dataclass
class _Series:
    """The n-th call of one structure at every point of a case: how its sizes go."""

    paths: list[str]
    integer: list[bool]
    fixed: list[bool]
    first: list[tuple[int, ...]]
    varies: list[set[int]]
    low: list[list[int | None]]
    high: list[list[int | None]]
    points: dict[_Pattern, list[int]] = field(default_factory=dict)
    """For each pattern of special sizes, as (dimension, size) of each leaf, the points where it is so."""

    def add(self, found: list[Leaf], point: int) -> None:
        pattern = []
        for n, leaf in enumerate(found):
            sizes, special = leaf.sizes, []
            for d, size in enumerate(sizes):
                if size != self.first[n][d]:
                    self.varies[n].add(d)
                if size in _SPECIAL:
                    special.append((d, size))
                else:
                    low, high = self.low[n][d], self.high[n][d]
                    self.low[n][d] = size if low is None else min(low, size)
                    self.high[n][d] = size if high is None else max(high, size)
            pattern.append(tuple(special))
        self.points.setdefault(tuple(pattern), []).append(point)


@dataclass
class Kind:
    """One kind of call (see the module's text).

    Args:
        function, module, line: what is called.
        structure: digest of code, wrapping and the arguments' structure.
        sizes: for each leaf and dimension a size, or [low, high] where it changes with the point.
        points: case number → points at which such a call is made.
    """

    function: str
    module: str
    line: int
    structure: str
    paths: list[str]
    integer: list[bool]
    sizes: list[list[Any]]
    wrapping: dict[str, Json] | None
    points: dict[int, list[int]] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return _digest([self.structure, self.paths, self.sizes])

    def fits(self, structure: str, found: list[Leaf]) -> bool:
        """Whether a call is of this kind."""
        return structure == self.structure and all(
            _fits(size, wanted) for leaf, sizes in zip(found, self.sizes) for size, wanted in zip(leaf.sizes, sizes)
        )

    def dynamic(self) -> dict[str, list[list[int]]]:
        """Path → [dimension, low, high] of what changes; dimension -1 is an integer argument itself."""
        return {
            path: [[-1 if integer else d, *size] for d, size in enumerate(sizes) if isinstance(size, list)]
            for path, integer, sizes in zip(self.paths, self.integer, self.sizes)
            if any(isinstance(size, list) for size in sizes)
        }


def _fits(size: int, wanted: Any) -> bool:
    return bool(wanted[0] <= size <= wanted[1] if isinstance(wanted, list) else size == wanted)


class Survey:
    """Collects the calls of all points of one case with one choice of `Values`, then tells their kinds."""

    def __init__(self) -> None:
        self._series: dict[tuple[str, int], _Series] = {}
        self._frames: dict[str, tuple[str, str, int, Any]] = {}
        self._count: dict[str, int] = {}

    def next_point(self) -> None:
        self._count.clear()

    def add(self, frame: Frame, mode: str, point: int) -> None:
        structure, found = structure_of(frame, mode)
        number = self._count.get(structure, 0)
        self._count[structure] = number + 1
        name = getattr(frame.code, "co_qualname", frame.code.co_name)
        self._frames[structure] = (name, frame.module, frame.code.co_firstlineno, frame.wrapping)
        series = self._series.get((structure, number))
        if series is None:
            series = self._series[structure, number] = _Series(
                [leaf.path for leaf in found],
                [not isinstance(leaf.value, torch.Tensor) for leaf in found],
                [leaf.fixed for leaf in found],
                [leaf.sizes for leaf in found],
                [set() for _ in found],
                [[None] * len(leaf.sizes) for leaf in found],
                [[None] * len(leaf.sizes) for leaf in found],
            )
        series.add(found, point)

    def kinds(self, case: int) -> dict[str, Kind]:
        """Every kind of call that was seen, by id."""
        out: dict[str, Kind] = {}
        for (structure, _), series in self._series.items():
            for pattern, points in series.points.items():
                name, module, line, wrapping = self._frames[structure]
                kind = Kind(
                    name, module, line, structure, series.paths, series.integer, _sizes(series, pattern), wrapping
                )
                same = out.setdefault(kind.id, kind)
                same.points[case] = sorted({*same.points.get(case, ()), *points})
        return out


def _sizes(series: _Series, pattern: _Pattern) -> list[list[Any]]:
    out = []
    for n, first in enumerate(series.first):
        sizes: list[Any] = []
        for d, size in enumerate(first):
            if d not in series.varies[n] or series.fixed[n]:
                sizes.append(size)
            elif d in dict(pattern[n]):
                sizes.append(dict(pattern[n])[d])
            elif series.low[n][d] == series.high[n][d]:
                sizes.append(series.low[n][d])
            else:
                sizes.append([series.low[n][d], series.high[n][d]])
        out.append(sizes)
    return out


def structure_of(frame: Frame, mode: str) -> tuple[str, list[Leaf]]:
    """(digest of everything about a call but its sizes, its leaves)."""
    found, text = leaves(frame)
    return _digest([frame.module, python_code.digest(frame.code), frame.wrapping, mode, text]), found


def _digest(value: Json) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]
