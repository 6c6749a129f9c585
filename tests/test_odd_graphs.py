"""Compiled functions that are odd: each becomes a graph, or is named as what could not be built, with its place.

Built for the CPU, with one worker: a child compiles several of them, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aot_cache.artifact import manifest
from aot_cache.artifact import target as targets
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.store import read_bundle

ROOT = Path(__file__).parents[1]

MODULE = """
import threading
import torch
from aot_cache import Call, Range, Recipe, declare, device

@torch.compile
def first(x): return x * 2 + 1

@torch.compile
def second(x): return x * 2 + 1

class Place:
    def __get__(self, instance, owner=None): return 3

class Placed:
    held = Place()

lock = threading.Lock()

@torch.compile
def given_up(x):
    return x + Placed.held if x.shape[0] else x

def breaks(x):
    with lock:
        return x * 5

@torch.compile
def after_a_break(x):
    return breaks(x * 4) + 1

@torch.compile
def no_operator(x): return x

@torch.library.custom_op("odd_model::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor: return x * 2

@double.register_fake
def _(x): return torch.empty_like(x)

@torch.compile
def custom_object(x): return double(x) + 6

@torch.compile
def custom_name(x): return torch.ops.odd_model.double(x) + 7

@torch.compile(fullgraph=True)
def whole(x): return x * 8

@torch.compile(mode="max-autotune-no-cudagraphs")
def with_a_mode(x): return x * 9

@torch.compile(dynamic=True)
def dynamic(x): return x * 14

@torch.compile(dynamic=False)
def static(x): return x * 15

@torch.compile
def one_kernel_twice(x):
    y = x * 16 + 1
    torch._dynamo.graph_break()
    return y * 16 + 1

@torch.compile
def branches(x): return x * 10 if x.shape[0] > 3 else x * 11

@torch.compile
def specializes(x): return x * 12 if x.shape[0] == 3 else x * 13

def case_of(function):
    return declare(name=function.__name__, n=Range(2, 5))(lambda n: Call(function, torch.ones(n, 2, device=device())))

odd = Recipe("odd", [case_of(f) for f in (
    first, second, given_up, after_a_break, no_operator, custom_object, custom_name, with_a_mode, dynamic, static,
    one_kernel_twice, branches, specializes,
)])
fullgraph = Recipe("fullgraph", [case_of(whole)])
"""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Built]:
    folder = tmp_path_factory.mktemp("odd")
    (folder / "odd_model.py").write_text(MODULE)

    def build(recipe: str) -> Built:
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setenv("PYTHONPATH", str(ROOT))
            return pipeline.build(
                Request(target=targets.get("cpu"), store=folder / "store", model=f"odd_model:{recipe}", workers=1)
            )

    return build


@pytest.fixture(scope="module")
def whole(build: Callable[[str], Built]) -> dict[str, Any]:
    return manifest.whole(read_bundle(build("odd").path)).to_json()


def graphs_of(whole: dict[str, Any], function: str) -> list[dict[str, Any]]:
    return [graph for graph in whole["graphs"] if graph["function"] == function]


def failures_of(whole: dict[str, Any], function: str) -> list[str]:
    return [failure["error"] for failure in whole["failed"] if failure["kernel"] == f"odd_model:{function}"]


def reached(whole: dict[str, Any], function: str) -> set[str]:
    """The points of a function's case that some graph of its was made for, as text."""
    return {box["n"] for graph in graphs_of(whole, function) for boxes in graph["reached"].values() for box in boxes}


@pytest.mark.parametrize("function", ["custom_name", "with_a_mode", "static"])
def test_what_is_built(whole: dict[str, Any], function: str) -> None:
    assert failures_of(whole, function) == [] and reached(whole, function) == {"2..5"}


def test_functions_that_have_a_kernel_in_common(whole: dict[str, Any]) -> None:
    assert failures_of(whole, "first") == failures_of(whole, "second") == []
    one, two = (graphs_of(whole, name) for name in ("first", "second"))
    assert one[0]["libraries"] == two[0]["libraries"] != {}


def test_a_function_that_has_one_kernel_twice(whole: dict[str, Any]) -> None:
    assert failures_of(whole, "one_kernel_twice") == []
    assert reached(whole, "one_kernel_twice") == {"2..5"}


def test_sizes_without_bounds(whole: dict[str, Any]) -> None:
    """`dynamic=True` also makes sizes dynamic that the recipe does not change."""
    assert failures_of(whole, "dynamic") == [] and reached(whole, "dynamic") == {"2..5"}


def test_guards_that_split_a_range(whole: dict[str, Any]) -> None:
    """Each part is traced, and the plan says which points it serves."""
    assert failures_of(whole, "branches") == []
    assert reached(whole, "branches") == {"2,3", "4,5"}


def test_guards_that_want_one_size(whole: dict[str, Any]) -> None:
    assert failures_of(whole, "specializes") == []
    assert reached(whole, "specializes") == {"3", "2,4,5"}


@pytest.mark.parametrize(
    "function",
    [
        "no_operator",
        "after_a_break",
    ],
)
def test_what_dynamo_gives_up_is_named(whole: dict[str, Any], function: str) -> None:
    """With the place in the source: it is traced again, and run as plain Python, in every process."""
    (error,) = failures_of(whole, function)
    assert "odd_model" in error and whole["complete"] is False


def test_a_custom_operator_by_its_object(whole: dict[str, Any]) -> None:
    assert failures_of(whole, "custom_object") == []


def test_every_call_is_a_graph_or_a_failure(whole: dict[str, Any]) -> None:
    for call in whole["calls"]:
        function = call["function"].partition(":")[2]
        assert graphs_of(whole, function) or failures_of(whole, function), function


def test_functions_that_want_their_whole_graph(build: Callable[[str], Built]) -> None:
    built = build("fullgraph")
    assert built.graphs == 1 and not built.failed
