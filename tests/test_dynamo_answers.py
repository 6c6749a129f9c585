"""aot_cache.upstream.virtual.dynamo_answers: what a graph gives without running is what its operators give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aot_cache.upstream.virtual import dynamo_answers
from aot_cache.upstream.virtual.torch_fake import HostMode

pytestmark = pytest.mark.contract("dynamo_answers")

SIZES = (64, 7, 2, 33, 64)


class Answering:
    """A backend that answers as the build's children do, and counts how often a graph's operators ran."""

    def __init__(self) -> None:
        self.graphs = self.ran = 0

    def __call__(self, graph: Any, inputs: Any) -> Callable[..., Any]:
        self.graphs += 1
        return dynamo_answers.answer(Counted(self, graph))


class Counted:
    """A graph module, in place of its own `forward`, which looks itself up by its class."""

    def __init__(self, backend: Answering, module: Any) -> None:
        self._backend, self._module, self.graph = backend, module, module.graph

    def forward(self, *args: Any) -> Any:
        self._backend.ran += 1
        return self._module.forward(*args)


def split(x: torch.Tensor) -> Any:
    return torch.cat((x, x * 2)), x.repeat(3, 1), (x + 1).flatten()


def turned(x: torch.Tensor) -> Any:
    return (x + 1).t().contiguous().t(), (x * 2).to(torch.bfloat16)


def constant(x: torch.Tensor) -> Any:
    return x.sum(), x.sum(0)


def viewing(x: torch.Tensor) -> Any:
    return x[1:], x + 1


def twice(x: torch.Tensor) -> Any:
    y = x + 1
    return y, y.t()


def geometry(values: Any) -> list[Any]:
    return [(tuple(v.shape), v.stride(), v.dtype, v.device, v.requires_grad) for v in values]


def answers(function: Any, sizes: tuple[int, ...] = SIZES, **options: Any) -> Answering:
    """Call `function` under the backend at each size, and hold the outputs against its own."""
    torch._dynamo.reset()
    backend = Answering()
    compiled: Any = torch.compile(function, backend=backend, **options)
    with HostMode("cpu"), torch.no_grad():
        for size in sizes:
            x = torch.empty(size, 16)
            if "dynamic" not in options:
                torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            found, wanted = compiled(x), function(x)
            assert geometry(found) == geometry(wanted)
            shares = [v.untyped_storage()._cdata == x.untyped_storage()._cdata for v in found]
            assert shares == [v.untyped_storage()._cdata == x.untyped_storage()._cdata for v in wanted]
    assert backend.graphs == 1
    return backend


@pytest.mark.parametrize("function", [split, turned, constant])
def test_two_points_are_run_and_the_others_foretold(function: Any) -> None:
    assert answers(function).ran == 2


@pytest.mark.parametrize("function", [viewing, twice])
def test_views_of_inputs_and_of_one_another_are_always_run(function: Any) -> None:
    assert answers(function).ran == len(SIZES)


def test_sizes_without_bounds_are_foretold() -> None:
    assert answers(split, dynamic=True).ran == 2


def test_the_same_sizes_are_not_run_again() -> None:
    assert answers(split, (64, 64, 64)).ran == 1


def test_gradients_are_always_run() -> None:
    torch._dynamo.reset()
    backend = Answering()
    compiled = torch.compile(lambda x: x * 2, backend=backend)
    with HostMode("cpu"):
        for size in SIZES:
            x = torch.empty(size, 16, requires_grad=True)
            torch._dynamo.mark_dynamic(x, 0, min=2, max=64)
            assert compiled(x).requires_grad
    assert backend.graphs == 1 and backend.ran == len(SIZES)


def test_a_formula_that_was_wrong_once_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    right = dynamo_answers._value
    monkeypatch.setattr(dynamo_answers, "_value", lambda formula, values: min(right(formula, values), 40))
    assert answers(split, (64, 7, 2, 33, 12)).ran == 5
