"""aot_cache.artifact.scan: what only the builder had is found in every part of a graph; what a server has, too, is not."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor

from aot_cache.artifact import scan
from aot_cache.artifact.manifest import Graph, graph_from_json

FAKE = "class torch._subclasses.fake_tensor:FakeTensor"
TENSOR = "class torch:Tensor torch.float32 torch.strided on cpu, keys 8000010001"
GRAPH: dict[str, Any] = {
    "module": "model",
    "function": "f",
    "identities": [["CLASS_MATCH", "G['torch']._subclasses.FakeTensor", FAKE]],  # the model asks for the class itself
    "values": [["TENSOR_MATCH", "L['x']", TENSOR]],
    "guards": ["check_tensor(L['x'], Tensor, size=[None, 4])"],
    "imports": {"__import_torch": "torch"},
    "guard_state": "guards",
    "graphs": {"g": "code"},
    "bytecode": "bytecode",
    "resumes": {},
    "libraries": {"source": "library"},
    "code": "",
    "mode": "",
    "wrapping": None,
    "settings": "",
    "choices": {},
    "inlined": [],
    "line": 1,
    "dynamic": {},
    "kernels": [],
    "candidates": {},
}


def found(graph: dict[str, Any], **objects: bytes) -> list[str]:
    held = {"guards": pickle.dumps(("x", torch.Size([2]))), "code": b"def f", "bytecode": b"c", "library": b"ELF"}
    return [f.what for f in scan.findings([graph_from_json(Graph, graph)], {**held, **objects}.__getitem__)]


def test_a_sound_graph_has_nothing() -> None:
    assert found(GRAPH) == []


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("values", [["TENSOR_MATCH", "L['x']", FAKE]], "guard TENSOR_MATCH on L['x'] compares with"),
        ("values", [["TYPE_MATCH", "L['xs'][0]", FAKE]], "L['xs'][0]"),
        ("identities", [["CLASS_MATCH", "type(L['x'])", FAKE]], "type(L['x'])"),
        ("values", [["EQUALS_MATCH", "L['f']", "<function f at 0x7f2a0795afc0>"]], "names an address (0x7f2a0795afc0)"),
        ("identities", [["ID_MATCH", "G['_140436673376272_c2'].Tensor", "class torch:Tensor"]], "_140436673376272_c2"),
        ("guards", ["check_tensor(L['x'], FakeTensor, size=[2])"], "FakeTensor"),
        ("imports", {"a": "aot_cache.builder.graphs"}, "imports aot_cache.builder.graphs"),
    ],
)
def test_a_text_of_the_builder_is_found(part: str, value: Any, words: str) -> None:
    (what,) = found({**GRAPH, part: value})
    assert words in what


def test_a_type_of_the_builder_in_a_pickle_is_found() -> None:
    assert found(GRAPH, guards=pickle.dumps(FakeTensor)) == ["guards hold a torch._subclasses.fake_tensor.FakeTensor"]
    assert found(GRAPH, guards=pickle.dumps("FakeTensor")) == []  # the name of an attribute


@pytest.mark.parametrize("part", ["code", "bytecode"])
def test_code_that_needs_the_builder_is_found(part: str) -> None:
    assert found(GRAPH, **{part: b"\0from aot_cache.builder.graphs import x"}) != []
    assert found(GRAPH, **{part: b"\0from aot_cache.upstream.codec.inductor_source import x"}) == []


def test_a_folder_of_the_builder_in_guards_is_found() -> None:
    (what,) = found(GRAPH, guards=pickle.dumps(os.path.join(os.getcwd(), "model.py")))
    assert "names a folder of this machine" in what
