"""What a process says of a point before anything is called, beside what then happens."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import Built

SCRIPT = """
import aot_cache.auto
from serving import FACTS, aot_cache, replaced, say

def told(name, *asked):
    try:
        hit = aot_cache.will_hit(*asked)
        FACTS[name] = [bool(hit), hit.why]
    except aot_cache.AotCacheError as error:
        FACTS[name] = str(error)

import torch
import sample_model as m
told("not loaded", "decorated", {"n": 5})
aot_cache.ready()
told("a case", "decorated", {"n": 5})
told("a function", m.decorated, {"n": 5})
told("its name", "sample_model:decorated", {"n": 5})
told("outside", "decorated", {"n": 100})
told("another dimension", "decorated", {"tokens": 5})
told("nobody", "decoratd", {"n": 5})
told("no such function", "sample_model:gone", {"n": 5})
with torch.inference_mode(), replaced(m.helper, "__code__", (lambda x, factor=3.0: x * factor - SHIFT).__code__):
    m.decorated(torch.randn(5, 16))
    told("stale", "decorated", {"n": 5})
say()
"""


@pytest.fixture(scope="module")
def facts(built: Built) -> dict[str, Any]:
    return built.project.serve(SCRIPT, built.bundle)


@pytest.mark.parametrize("name", ["a case", "a function", "its name"])
def test_a_declared_point_will_hit(facts: dict[str, Any], name: str) -> None:
    assert facts[name] == [True, []]


def test_what_is_not_there_yet_is_said(facts: dict[str, Any]) -> None:
    assert facts["not loaded"] == [False, ["sample_model:decorated: its graph is not loaded"]]


@pytest.mark.parametrize(("name", "where"), [("outside", "n=100"), ("another dimension", "tokens=5")])
def test_a_point_that_nobody_declared(facts: dict[str, Any], name: str, where: str) -> None:
    assert facts[name] == [False, [f"decorated is not declared at {where}"]]


def test_names_that_no_bundle_has(facts: dict[str, Any]) -> None:
    assert facts["nobody"].startswith("no loaded bundle has a case, compiled function or kernel 'decoratd'")
    assert facts["no such function"].startswith(
        "no loaded bundle has a case, compiled function or kernel 'sample_model:gone'"
    )


def test_a_source_that_changed(facts: dict[str, Any]) -> None:
    hit, why = facts["stale"]
    assert not hit and why == ["sample_model:decorated: the source of sample_model:helper differs"]
