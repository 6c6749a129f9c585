"""Arguments of a call as data, from which others like them can be made: everything about tensors but their values.

Upstream: what Dynamo guards on in a tensor (`torch/csrc/dynamo/guards.cpp`, `TensorCheck`), marks of its dimensions
(`torch/_dynamo/decorators.py`), and which tensors share memory (AOTAutograd treats inputs that are changed and overlap apart).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from aot_cache.errors import TraceError

Json = Any
_MARKS = {
    "mark_dynamic": "_dynamo_dynamic_indices",
    "mark_unbacked": "_dynamo_unbacked_indices",
    "mark_static": "_dynamo_static_indices",
}
_PLAIN = (bool, float, str, type(None))
STAND_FOR_TENSORS: set[type] = set()
"""Subclasses of a tensor that stand for a plain one in this process: the virtual device's."""


class _Writer:
    """Encodes the arguments of one call."""

    def __init__(self) -> None:
        self.sizes: list[list[int]] = []
        self._tensors: dict[int, dict[str, Json]] = {}
        """Object → what is written of a tensor."""
        self._views: list[tuple[dict[str, Json], torch.Tensor]] = []
        self._memory: dict[int, int] = {}

    def end(self) -> None:
        """All arguments are written: say of which of them some are views."""
        for written, base in self._views:
            if id(base) in self._tensors:
                written["view"] = self._tensors[id(base)]["tensor"]

    def write(self, value: Any, place: str) -> Json:
        if isinstance(value, torch.Tensor):
            return self._tensor(value, place)
        kind = type(value)
        if kind is int:
            self.sizes.append([value])
            return {"integer": len(self.sizes) - 1}
        if kind in _PLAIN:
            return value
        if kind in (torch.dtype, torch.device):
            return {kind.__name__: str(value).removeprefix("torch.").partition(":")[0]}
        if kind in (list, tuple, torch.Size):
            items = [self.write(item, f"{place}[{number}]") for number, item in enumerate(value)]
            return {"list" if kind is list else "tuple": items}
        if kind is dict and all(type(key) in (str, int) for key in value):
            return {"dict": [[key, self.write(item, f"{place}[{key!r}]")] for key, item in value.items()]}
        raise TraceError(f"{place} is a {kind.__module__}.{kind.__qualname__}")

    def _tensor(self, value: torch.Tensor, place: str) -> Json:
        if id(value) in self._tensors:
            return {"same": self._tensors[id(value)]["tensor"]}
        parameter = type(value) is torch.nn.Parameter
        if type(value) is not torch.Tensor and not parameter and type(value) not in STAND_FOR_TENSORS:
            raise TraceError(f"{place} is a {type(value).__module__}.{type(value).__qualname__}")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise TraceError(f"{place} is a tensor with layout {value.layout}, quantized, or without memory")
        if value.requires_grad and not value.is_leaf:
            raise TraceError(f"{place} is a tensor in the middle of a gradient's graph")
        number = len(self.sizes)
        self.sizes.append([*value.shape, *value.stride(), int(value.storage_offset())])
        memory = self._memory.setdefault(value.untyped_storage()._cdata, number)
        marks = {name: sorted(getattr(value, attribute, ())) for name, attribute in _MARKS.items()}
        found = {
            "tensor": number,
            "dtype": str(value.dtype).removeprefix("torch."),
            "device": value.device.type,
            "memory": memory,
            "view": None if value._base is None else -1,
            "inference": value.is_inference(),
            "gradient": value.requires_grad,
            "parameter": parameter,
            "marks": {name: dims for name, dims in marks.items() if dims},
        }
        self._tensors[id(value)] = found
        if value._base is not None:
            self._views.append((found, value._base))
        return found


def written(args: Sequence[Any], kwargs: Mapping[str, Any], names: Sequence[str]) -> tuple[Json, list[list[int]]]:
    """(all about the arguments of a call but sizes, the sizes).

    Args:
        names: of the parameters by position, for messages.

    Raises:
        TraceError: an argument is no tensor, number, text, or container of such.
    """
    writer = _Writer()
    called = [*names, *(f"argument {number}" for number in range(len(names), len(args)))]
    given = [writer.write(value, name) for name, value in zip(called, args)]
    named = [[name, writer.write(value, name)] for name, value in kwargs.items()]
    writer.end()
    return {"args": given, "kwargs": named}, writer.sizes


def made(
    arguments: Json, sizes: Sequence[Sequence[int]], device: Callable[[str], str]
) -> tuple[list[Any], dict[str, Any]]:
    """(args, kwargs) as `written` had them, with uninitialised tensors.

    Args:
        device: device type in the recording → device on which to make such a tensor.
    """
    reader = _Reader(arguments, sizes, device)
    return [reader.read(one) for one in arguments["args"]], {name: reader.read(v) for name, v in arguments["kwargs"]}


class _Reader:
    def __init__(self, arguments: Json, sizes: Sequence[Sequence[int]], device: Callable[[str], str]) -> None:
        self._sizes, self._device = sizes, device
        self._tensors: dict[int, torch.Tensor] = {}
        self._memory: dict[int, torch.Tensor] = {}
        self._written: dict[int, dict[str, Json]] = {}
        """Number → what is written of a tensor."""
        self._find(arguments)
        alike = [one["memory"] for one in self._written.values()]
        self._shared = {number for number in alike if alike.count(number) > 1}

    def _find(self, data: Json) -> None:
        if isinstance(data, dict) and "tensor" in data:
            self._written[data["tensor"]] = data
        elif isinstance(data, (dict, list)):
            for item in data.values() if isinstance(data, dict) else data:
                self._find(item)

    def read(self, data: Json) -> Any:
        if not isinstance(data, dict):
            return data
        if "tensor" in data:
            return self._tensor(data)
        ((kind, value),) = data.items()
        if kind == "same":
            return self._tensors[value]
        if kind == "integer":
            return self._sizes[value][0]
        if kind == "dtype":
            return getattr(torch, value)
        if kind == "device":
            return torch.device(self._device(value))
        if kind == "dict":
            return {key: self.read(item) for key, item in value}
        items = [self.read(item) for item in value]
        return items if kind == "list" else tuple(items)

    def _tensor(self, data: Json) -> torch.Tensor:
        if data["tensor"] not in self._tensors:
            self._tensors[data["tensor"]] = self._made(data)
        return self._tensors[data["tensor"]]

    def _made(self, data: Json) -> torch.Tensor:
        shape, strides, offset = _split(self._sizes[data["tensor"]])
        dtype, view = _dtype(data), data["view"]
        with torch.inference_mode(data["inference"]), torch.no_grad():
            if view is not None and view >= 0:
                base = self._tensor(self._written[view])
                found = (base if base.dtype == dtype else base.view(dtype)).as_strided(shape, strides, offset)
            elif view is not None or offset or data["memory"] in self._shared:
                found = self._of_memory(data).as_strided(shape, strides, offset)
                found = found if view is not None or data["inference"] else found.detach()
            else:
                found = torch.empty_strided(shape, strides, dtype=dtype, device=self._device(data["device"]))
        if data["parameter"]:
            found = torch.nn.Parameter(found, requires_grad=data["gradient"])
        elif data["gradient"]:
            found.requires_grad_()
        from torch._dynamo import (
            decorators,
        )  # imported here, because a process that only records may not need Dynamo yet

        for mark, dims in data["marks"].items():
            for dim in dims:
                getattr(decorators, mark)(found, dim)
        return found

    def _of_memory(self, data: Json) -> torch.Tensor:
        """The memory of a tensor, as numbers of its dtype: enough for all that lie in it and are views of no argument."""
        number = data["memory"]
        if number not in self._memory:
            alike = [one for one in self._written.values() if one["memory"] == number and (one["view"] or -1) < 0]
            needed = max(_end(*_split(self._sizes[one["tensor"]])) * _dtype(one).itemsize for one in alike)
            length = -(-needed // 16) * 16  # whole numbers of any dtype
            self._memory[number] = torch.empty(length, dtype=torch.uint8, device=self._device(data["device"]))
        return self._memory[number].view(_dtype(data))


def _end(shape: Sequence[int], strides: Sequence[int], offset: int) -> int:
    """How many numbers of its memory a tensor spans."""
    return offset + sum((size - 1) * stride for size, stride in zip(shape, strides)) + 1 if all(shape) else offset


def _split(sizes: Sequence[int]) -> tuple[Sequence[int], Sequence[int], int]:
    """(shape, strides, offset)"""
    rank = len(sizes) // 2
    return sizes[:rank], sizes[rank : 2 * rank], sizes[-1]


def _dtype(data: Json) -> torch.dtype:
    found = getattr(torch, data["dtype"])
    assert isinstance(found, torch.dtype)
    return found
