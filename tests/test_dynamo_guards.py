"""aot_cache.upstream.codec.dynamo_guards: guards that were written down hold for the calls that they should, and for no other.

One process writes and reads here; what a call leads to is changed in between, as a server may have it otherwise.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamo_calls import compiled_by_dynamo

from aot_cache import tested
from aot_cache.upstream.codec import dynamo_guards, guard_lookups


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


SOURCE = """
import dataclasses, enum, functools
import torch

NUMBER, PAIR, TABLE, FLAG, TEXT = 3, (1, 2), {"a": {"b": [4]}}, True, "abc"

def helper(x):
    return x * 2

def default(x, k=5):
    return x * k

def by_name(x, *, k=6):
    return x * k

def factory(k):
    def made(x):
        return x * k
    return made

made = factory(7)
scaled = functools.partial(default, k=8)
functions = {"f": lambda x: x * 9}

class Mode(enum.Enum):
    A = 10

class Layer(torch.nn.Module):
    scale = 11
    sizes = [12, 13]
    def forward(self, x):
        return x * self.scale
    def first(self, x, k=14):
        return x * self.sizes[0] * k

@dataclasses.dataclass
class Config:
    scale: int = 15

layer, config = Layer(), Config()
"""

other: Any = types.ModuleType("aot_cache_other_module")


@pytest.fixture(autouse=True)
def _module(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that a compiled function looks into, new for each test."""
    monkeypatch.setitem(sys.modules, other.__name__, other)
    vars(other).update({"__name__": other.__name__})
    exec(SOURCE, vars(other))  # noqa: S102 - the source is above


def retuple(function: Any, *values: Any) -> Callable[[], None]:
    return lambda: setattr(function(), "__defaults__", values)


# What is called, and what is then changed.
CHANGED: dict[str, tuple[Callable[[Any], Any], Callable[[], None]]] = {
    "a global": (lambda x: x * other.NUMBER, lambda: setattr(other, "NUMBER", 30)),
    "a flag": (lambda x: x * 3 if other.FLAG else x * 2, lambda: setattr(other, "FLAG", False)),
    "a text": (lambda x: x * len(other.TEXT), lambda: setattr(other, "TEXT", "abcd")),
    "a tuple": (lambda x: x * other.PAIR[1], lambda: setattr(other, "PAIR", (1, 20))),
    "deep in a dict": (lambda x: x * other.TABLE["a"]["b"][0], lambda: other.TABLE["a"]["b"].__setitem__(0, 40)),
    "a default": (lambda x: other.default(x), retuple(lambda: other.default, 50)),
    "a default by name": (lambda x: other.by_name(x), lambda: other.by_name.__kwdefaults__.update(k=60)),
    "what a closure holds": (lambda x: other.made(x), lambda: setattr(other, "made", other.factory(70))),
    "a partial's argument": (
        lambda x: other.scaled(x),
        lambda: other.scaled.keywords.update(k=80),
    ),
    "an enum's value": (lambda x: x * other.Mode.A.value, lambda: setattr(other.Mode.A, "_value_", 100)),
    "a class's attribute": (lambda x: x * other.Layer.scale, lambda: setattr(other.Layer, "scale", 110)),
    "an attribute that an instance has of its class": (
        lambda x: other.layer(x),
        lambda: setattr(other.Layer, "scale", 111),
    ),
    "in a class's list": (lambda x: other.layer.first(x), lambda: other.Layer.sizes.__setitem__(0, 120)),
    "a method's default": (lambda x: other.layer.first(x), retuple(lambda: other.Layer.first, 140)),
    "an instance's attribute": (lambda x: x * other.config.scale, lambda: setattr(other.config, "scale", 150)),
    "a function": (lambda x: other.helper(x), lambda: setattr(other, "helper", lambda x: x * 200)),
    "a function in a dict": (
        lambda x: other.functions["f"](x),
        lambda: other.functions.update(f=lambda x: x * 90),
    ),
    "a class": (
        lambda x: x * other.Config(2).scale,
        lambda: setattr(other, "Config", dataclasses.make_dataclass("C", ["scale"])),
    ),
    "a module": (lambda x: x * other.NUMBER, lambda: None),
}


NOT_GUARDED = ("a default", "an enum's value", "a class's attribute")
"""What torch 2.11 itself has no guard on: its graphs are stale in the process that made them, too. In a bundle that is a
server where such a value is not the builder's, with the same source."""


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(
            what,
            marks=pytest.mark.xfail(
                tested.minor(torch.__version__) == "2.11" and what in NOT_GUARDED,
                reason="torch 2.11 does not guard on it either",
                strict=True,
            ),
        )
        for what in CHANGED
    ],
)
@pytest.mark.contract("dynamo_guards", "guard_facts")
def test_what_a_call_leads_to_is_compared_with_what_was_written_down(what: str) -> None:
    call, change = CHANGED[what]
    kept = compiled_by_dynamo(call, torch.ones(3))
    ((made, frame),) = kept.frames
    assert kept.nameless == [[]]

    def why(f_globals: dict[str, Any]) -> str:
        recorded = kept.identities[0], kept.values[0]
        return dynamo_guards.build(made.guards, *recorded, call.__code__, f_globals, {"x": torch.ones(3)})[1]

    assert why(frame.f_globals) == "", "nothing changed"
    change()
    if what == "a module":
        found = why({**frame.f_globals, "other": types.ModuleType("another")})
    else:
        found = why(frame.f_globals)
    assert found, "a call that would compute something else is given this graph"


@pytest.mark.contract("guard_lookups")
def test_tables_that_are_looked_up_by_key_are_only_looked_up() -> None:
    """`guard_lookups` leaves out guards on a table's other entries: the library's own source may not go through it."""
    pytest.importorskip("transformers")
    for module, name in guard_lookups.LOOKED_UP:
        package = Path(importlib.import_module(module.partition(".")[0]).__file__ or "").parent
        users = [path for path in package.rglob("*.py") if name in path.read_text()]
        assert users
        for path in users:
            tree = ast.parse(path.read_text())
            inside = {id(child): parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                    parent = inside[id(node)]
                    by_key = isinstance(parent, ast.Attribute) and parent.attr == "get"
                    assert by_key or isinstance(parent, ast.Subscript), f"{path}:{node.lineno} goes through {name}"


REGISTRY = """
class Registry(dict):
    def get(self, model):
        return super().get(str(model)) or {}

_CAN_RECORD_REGISTRY = Registry()
_CAN_RECORD_REGISTRY["before"] = {"k": 2}
_CAN_RECORD_REGISTRY["mine"] = {"k": 3}
"""


@pytest.mark.contract("guard_lookups")
def test_other_entries_of_such_a_table_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard_lookups, "LOOKED_UP", ((other.__name__, "_CAN_RECORD_REGISTRY"),))
    exec(REGISTRY, vars(other))  # noqa: S102 - the source is above
    call = lambda x: x * other._CAN_RECORD_REGISTRY.get("mine")["k"]  # noqa: E731
    kept = compiled_by_dynamo(call, torch.ones(3))
    ((made, frame),) = kept.frames

    def why() -> str:
        recorded = kept.identities[0], kept.values[0]
        return dynamo_guards.build(made.guards, *recorded, call.__code__, frame.f_globals, {"x": torch.ones(3)})[1]

    table = other._CAN_RECORD_REGISTRY
    assert why() == ""
    table["another"] = {"k": 5}
    del table["before"]
    assert why() == "", "a table with other entries besides"
    table["mine"]["k"] = 4
    assert why(), "an entry that was looked up has changed"
    table["mine"]["k"] = 3
    assert why() == ""
    del table["mine"]
    assert why(), "an entry that was looked up is gone"
