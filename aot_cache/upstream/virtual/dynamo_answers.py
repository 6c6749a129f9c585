"""Turn a graph that Dynamo traced into a function that only creates outputs of the right geometry, to run at every point.

Running a graph's operators on tensors without memory takes as long as its host code: 100 ms for a block of attention.
Dynamo has the outputs' sizes as formulas of the inputs' sizes. They are used after they predicted the operators' results at two
points, and never if they were wrong once, or if outputs are inputs or views of them.

Upstream: `torch/_dynamo/output_graph.py` (`example_value`), `torch/fx/experimental/symbolic_shapes.py`
(`ShapeEnv.bound_sympy`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch._dynamo as dynamo

_ENOUGH = 2
"""How often the formulas must predict the operators' results, at different sizes, before they are used."""

Geometry = tuple[tuple[int, ...], tuple[int, ...], torch.dtype, torch.device]


def answer(graph: Any) -> Callable[..., Any]:
    """`graph` as a function that creates its outputs without running it, if possible.

    Dynamic dimensions of outputs are marked with their bounds, for what Dynamo compiles after a graph break.
    """
    output = next(node for node in graph.graph.nodes if node.op == "output")
    bounds = [_bounds(node) for node in output.args[0]]
    formulas = _Formulas(graph, output.args[0])
    known: dict[Any, list[Geometry]] = {}

    def run(*args: Any) -> Any:
        asked = tuple(_asked(arg) for arg in args)
        found = known.get(asked)  # at each point, all equal layers of a model ask the same
        if found is None:
            found = formulas.at(args)
        if found is not None:
            known[asked] = found
            results = [_made(like) for like in found]
        else:
            results = list(graph.forward(*args))
            if _are_new(results, args):
                known[asked] = [_geometry(value) for value in results]
                formulas.compare(args, known[asked])
        for value, dims in zip(results, bounds):
            for dim, low, high in dims:
                if isinstance(value, torch.Tensor) and value.shape[dim] >= 2:
                    dynamo.mark_dynamic(value, dim, min=low, max=high)
        return results

    return run


class _Formulas:
    """The sizes and strides of a graph's outputs, as formulas of the input sizes."""

    def __init__(self, graph: Any, outputs: Sequence[Any]) -> None:
        self._where: dict[Any, tuple[int, int]] = {}
        inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
        for number, node in enumerate(inputs):
            for dim, size in _sizes(_example(node)):
                formula = _formula(size)
                if getattr(formula, "is_Symbol", False):
                    self._where.setdefault(formula, (number, dim))
        examples = [_example(node) for node in outputs]
        self._right = 0 if all(isinstance(example, torch.Tensor) for example in examples) else -1
        self._kinds: list[tuple[torch.dtype, torch.device]] = []
        self._outputs = [
            ([_formula(size) for size in example.shape], [_formula(step) for step in example.stride()])
            for example in examples
            if isinstance(example, torch.Tensor)
        ]

    def at(self, args: Sequence[Any]) -> list[Geometry] | None:
        """The outputs' geometry for `args`, if the formulas have proved right; else None."""
        return self._foretold(args) if self._right >= _ENOUGH else None

    def compare(self, args: Sequence[Any], found: list[Geometry]) -> None:
        """Compare the formulas with the operators' results."""
        if self._right < 0:
            return
        self._kinds = self._kinds or [(dtype, device) for _, _, dtype, device in found]
        self._right = self._right + 1 if self._foretold(args) == found else -1

    def _foretold(self, args: Sequence[Any]) -> list[Geometry] | None:
        values = {}
        for symbol, (number, dim) in self._where.items():
            values[symbol] = int(args[number] if dim < 0 else args[number].shape[dim])
        try:
            return [
                (tuple(_value(f, values) for f in shape), tuple(_value(f, values) for f in strides), *kind)
                for (shape, strides), kind in zip(self._outputs, self._kinds, strict=True)
            ]
        except (TypeError, ValueError):  # a size that depends on something else than input sizes
            return None


def _example(node: Any) -> Any:
    return node.meta.get("example_value") if hasattr(node, "meta") else None


def _sizes(example: Any) -> list[tuple[int, Any]]:
    """(dimension, size) of each dimension of a tensor; a symbolic integer is dimension -1."""
    if isinstance(example, torch.Tensor):
        return list(enumerate(example.shape))
    return [(-1, example)] if isinstance(example, torch.SymInt) else []


def _formula(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _value(formula: Any, values: dict[Any, int]) -> int:
    if isinstance(formula, int):
        return formula
    return values[formula] if formula in values else int(formula.xreplace(values))


def _asked(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    return *_geometry(value), value.requires_grad


def _geometry(value: torch.Tensor) -> Geometry:
    return tuple(value.shape), value.stride(), value.dtype, value.device


def _made(like: Geometry) -> torch.Tensor:
    shape, stride, dtype, device = like
    return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def _are_new(results: Sequence[Any], args: Sequence[Any]) -> bool:
    """Whether all results are tensors with their own memory (not arguments or views), and none requires a gradient."""
    if not all(isinstance(value, torch.Tensor) and not value.requires_grad for value in results):
        return False
    made = {value.untyped_storage()._cdata for value in results}
    given = {arg.untyped_storage()._cdata for arg in args if isinstance(arg, torch.Tensor)}
    return len(made) == len(results) and not made & given


_NO_BOUND = sys.maxsize - 1


def _bounds(node: Any) -> list[tuple[int, int, int]]:
    out: list[tuple[int, int, int]] = []
    example = _example(node)
    for dim, size in _sizes(example) if isinstance(example, torch.Tensor) else ():
        if isinstance(size, torch.SymInt):
            found = size.node.shape_env.bound_sympy(size.node.expr)
            high = int(found.upper) if found.upper.is_Integer else _NO_BOUND
            out.append((dim, max(2, int(found.lower)), high))
    return out
