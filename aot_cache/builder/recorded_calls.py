"""What compiled functions are given at every point, as the kernel trace saw it: graphs need not run host code again for it.

The kernel trace runs all host code at all points anyway, with compiled functions as plain Python. What it notes of each
call are the sizes of the tensors and integers among its arguments, by name. Where that agrees with what a survey on
Dynamo's own frames says (`Recorded.trusts`), guards are checked at these sizes, and only a call that fails them is made.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aot_cache.builder.call_kinds import Kind
from aot_cache.upstream.codec import unwrapping
from aot_cache.upstream.codec.real_tensors import is_parameter

Call = tuple[str, dict[str, list[int]]]
"""`module:qualname` of a compiled function, and sizes of its arguments by their expression (`L['x']`)."""


def call_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """A call, as it is noted; without sizes where the function under it is not known."""
    inner = unwrapping.function_of(function)
    if inner is None:
        return "", {}
    code = inner.__code__
    given = {**dict(zip(code.co_varnames[: code.co_argcount], args)), **kwargs}
    sizes = {f"L[{name!r}]": _sizes(value) for name, value in given.items()}
    return f"{inner.__module__}:{inner.__qualname__}", {
        path: found for path, found in sizes.items() if found is not None
    }


def _sizes(value: object) -> list[int] | None:
    if isinstance(value, torch.Tensor) and not is_parameter(value):
        return [int(size) for size in value.shape]
    return [value] if type(value) is int else None


def written(calls: Mapping[str, Sequence[Sequence[Call]]]) -> str:
    """Calls as text, for another process."""
    return json.dumps(calls)


class Recorded:
    """The calls at every point.

    Args:
        calls: case's name → for each of its points the calls in order; a case that was not traced is not there.
    """

    def __init__(self, calls: Mapping[str, Sequence[Sequence[Call]]]) -> None:
        self._calls = calls

    @classmethod
    def read(cls, path: Path) -> Recorded:
        """What `written` has put into a file; nothing where there is none."""
        return cls(json.loads(path.read_text()) if path.exists() else {})

    def at(self, kind: Kind, case: str, point: int) -> list[dict[str, list[int]]]:
        """The sizes of each call of this kind at a point."""
        return [sizes for name, sizes in self._points(case)[point] if _is(kind, name, sizes)]

    def trusts(self, kind: Kind, case: str, seen: Collection[int], mine: Collection[int]) -> bool:
        """Whether what is noted says the same of the points that were `seen`: which of them are the kind's own."""
        found = {at for at in seen if self.knows(case, at) and self.at(kind, case, at)}
        return self.knows(case, 0) and found == set(mine) & set(seen) and _named(kind)

    def strangers(self, kinds: Sequence[Kind], case: str) -> set[int]:
        """Points at which one of the kinds' functions is called as none of them."""
        names = {_name(kind) for kind in kinds}
        return {
            at
            for at, calls in enumerate(self._points(case))
            if any(name in names and not any(_is(kind, name, sizes) for kind in kinds) for name, sizes in calls)
        }

    def knows(self, case: str, point: int) -> bool:
        """Whether the calls at a point were noted: those that were missed elsewhere come later."""
        return point < len(self._points(case))

    def _points(self, case: str) -> Sequence[Sequence[Call]]:
        return self._calls.get(case, ())


def _is(kind: Kind, name: str, sizes: Mapping[str, Sequence[int]]) -> bool:
    return name == _name(kind) and kind.takes(
        kind.structure, {path: found for path, found in sizes.items() if path in kind.paths}
    )


def _name(kind: Kind) -> str:
    return f"{kind.module}:{kind.function}"


def _named(kind: Kind) -> bool:
    """Whether everything that changes is an argument itself, not something inside one."""
    return all(path.startswith("L['") and path.endswith("']") and path.count("[") == 1 for path in kind.dynamic())


def resized(template: Mapping[str, Any], sizes: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """Arguments as in `template`, of other sizes; None where a tensor is not simply dense.

    Within the tensors' mode in which the template's were made.
    """
    given = dict(template)
    for path, wanted in sizes.items():
        name = path[3:-2]
        value = given.get(name)
        if isinstance(value, torch.Tensor) and list(value.shape) != list(wanted):
            if not value.is_contiguous() or value.storage_offset() or value.requires_grad:
                return None
            with torch.inference_mode(value.is_inference()):
                given[name] = torch.empty(list(wanted), dtype=value.dtype, device=value.device)
        elif type(value) is int:
            given[name] = wanted[0]
    return given
