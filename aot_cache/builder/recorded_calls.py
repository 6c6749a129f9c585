"""The calls of compiled functions at every point, as the kernel trace saw them, so that graphs need not run host code again.

The kernel trace runs all host code at all points anyway, with compiled functions as plain Python. It records the sizes of
each call's tensor and integer arguments, by name. Where that agrees with Dynamo's own frames at the probe points
(`RecordedCalls.is_consistent`), guards are checked at the recorded sizes, and host code runs only where they fail.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aot_cache.builder.call_signatures import CallSignature
from aot_cache.upstream.codec import unwrapping
from aot_cache.upstream.codec.real_tensors import is_parameter
from aot_cache.upstream.virtual import torch_fake

Call = tuple[str, dict[str, list[int]]]
"""`module:qualname` of a compiled function, and sizes of its arguments by their expression (`L['x']`)."""


def call_of(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """A call, as it is recorded; without name and sizes if the compiled function cannot be unwrapped."""
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


class RecordedCalls:
    """The calls at every point.

    Args:
        calls: name of a case → for each of its points its calls in order. Cases that were not traced are missing.
    """

    def __init__(self, calls: Mapping[str, Sequence[Sequence[Call]]]) -> None:
        self._calls = calls

    @classmethod
    def read(cls, path: Path) -> RecordedCalls:
        """Read what `written` made; empty if there is no such file."""
        return cls(json.loads(path.read_text()) if path.exists() else {})

    def at(self, signature: CallSignature, case: str, point: int) -> list[dict[str, list[int]]]:
        """The sizes of each call with this signature at a point."""
        return [sizes for name, sizes in self._points(case)[point] if _matches(signature, name, sizes)]

    def is_consistent(self, signature: CallSignature, case: str, seen: Collection[int], mine: Collection[int]) -> bool:
        """Whether the record agrees with Dynamo about which of the `seen` points have calls with this signature (`mine`)."""
        found = {at for at in seen if self.knows(case, at) and self.at(signature, case, at)}
        return self.knows(case, 0) and found == set(mine) & set(seen) and _named(signature)

    def unmatched_points(self, signatures: Sequence[CallSignature], case: str) -> set[int]:
        """Points with a call of one of these functions that matches none of the signatures."""
        names = {_name(signature) for signature in signatures}
        return {
            at
            for at, calls in enumerate(self._points(case))
            if any(
                name in names and not any(_matches(signature, name, sizes) for signature in signatures)
                for name, sizes in calls
            )
        }

    def knows(self, case: str, point: int) -> bool:
        """Whether the calls of a point were recorded. Points added for misses are not."""
        return point < len(self._points(case))

    def _points(self, case: str) -> Sequence[Sequence[Call]]:
        return self._calls.get(case, ())


def _matches(signature: CallSignature, name: str, sizes: Mapping[str, Sequence[int]]) -> bool:
    return name == _name(signature) and signature.takes(
        signature.structure, {path: found for path, found in sizes.items() if path in signature.paths}
    )


def _name(signature: CallSignature) -> str:
    return f"{signature.module}:{signature.function}"


def _named(signature: CallSignature) -> bool:
    """Whether every size that changes belongs to an argument itself, not to something inside one."""
    return all(path.startswith("L['") and path.endswith("']") and path.count("[") == 1 for path in signature.dynamic())


def resized(template: Mapping[str, Any], sizes: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """Arguments as in `template` with other sizes; None if a tensor is not simply dense.

    Must be called in the mode in which the template's tensors were made.
    """
    given = dict(template)
    for path, wanted in sizes.items():
        name = path[3:-2]
        value = given.get(name)
        if isinstance(value, torch.Tensor) and list(value.shape) != list(wanted):
            if not value.is_contiguous() or value.storage_offset() or value.requires_grad:
                return None
            with torch.inference_mode(value.is_inference()):
                given[name] = torch_fake.of_shape(value, wanted)
        elif type(value) is int:
            given[name] = wanted[0]
    return given
