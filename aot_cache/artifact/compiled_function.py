"""What a recording knows of a compiled function: with which arguments it was called, so that a build can call it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

from aot_cache.store import JsonObject, JsonValue

Sizes: TypeAlias = Sequence[Sequence[int]]
"""What differs between calls: sizes, strides and offset of each tensor, and each integer, in the order of the arguments."""


@dataclass(frozen=True, kw_only=True)
class CompiledFunction:
    """Calls of one function that is under `torch.compile`, with arguments that differ in sizes only.

    Args:
        function: `module:qualname`.
        arguments: all but the sizes, see `upstream.codec.call_arguments`; None if it cannot be called again.
        why: why it cannot be called again without a recipe; empty if it can.
        mode, autocast: the grad mode, and the dtype of autocast or an empty text.
        compiled_by: the arguments of `torch.compile` that the caller used; empty if the module's attribute is compiled itself.
        settings: process-wide settings under which it was called, where they are not torch's defaults.
        calls: the sizes of each call.
    """

    function: str
    arguments: JsonValue = None
    why: str = ""
    mode: str = "inference"
    autocast: str = ""
    compiled_by: JsonObject = field(default_factory=dict)
    settings: JsonObject = field(default_factory=dict)
    calls: Sequence[Sizes] = ()

    @property
    def identity(self) -> str:
        """Text of everything but the sizes."""
        return json.dumps(asdict(replace(self, calls=())), sort_keys=True)


def merged(functions: Iterable[CompiledFunction]) -> list[CompiledFunction]:
    """Each function with the calls of all processes, each once, smallest first."""
    found: dict[str, list[CompiledFunction]] = {}
    for one in functions:
        found.setdefault(one.identity, []).append(one)
    return [
        replace(alike[0], calls=[json.loads(row) for row in _each_once(alike)]) for _, alike in sorted(found.items())
    ]


def _each_once(alike: Iterable[CompiledFunction]) -> list[str]:
    return sorted({json.dumps(row) for one in alike for row in one.calls}, key=json.loads)


def from_json(data: Mapping[str, Any]) -> CompiledFunction:
    """Raises TypeError if it has other fields."""
    return CompiledFunction(**data)
