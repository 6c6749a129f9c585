"""What the hooks of TensorRT-LLM take for granted of it: that a layout which lacks it is left alone, and that the real package,
where it can be imported, has it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
from contracts import need

from aot_cache.upstream.hooks import tensorrt_llm_warmup as engine

LAYOUT = engine.Layout("an_engine", "Engine", ())
HERE = importlib.util.find_spec("tensorrt_llm") is not None


class Whole:
    """An engine with all that is relied on."""

    def _create_cuda_graph_warmup_request(self, resource_manager: Any, batch_size: int, draft_len: int) -> str:
        return f"{batch_size} {draft_len}"

    def _release_batch_context(self, batch: Any, resource_manager: Any) -> Any: ...

    def warmup(self, resource_manager: Any) -> None: ...


def without(name: str) -> type:
    return type("Engine", (), {key: value for key, value in vars(Whole).items() if key != name})


def other_parameters() -> type:
    def _create_cuda_graph_warmup_request(self: Any, batch_size: int, resource_manager: Any) -> None: ...

    return type("Engine", (Whole,), {"_create_cuda_graph_warmup_request": _create_cuda_graph_warmup_request})


def hook(monkeypatch: pytest.MonkeyPatch, owner: type | None) -> bool:
    module = ModuleType(LAYOUT.module)
    if owner is not None:
        vars(module)[LAYOUT.owner] = owner
    monkeypatch.setitem(sys.modules, LAYOUT.module, module)
    return engine.hook(LAYOUT, lambda wanted: (wanted.shape, wanted.make()), lambda warmup: warmup())


def test_a_batch_is_asked_for_by_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    owner = type("Engine", (Whole,), {})
    assert hook(monkeypatch, owner)
    made = owner()._create_cuda_graph_warmup_request("resources", 8, draft_len=3)
    assert made == ("batch_size=8, draft_len=3", "8 3")


@pytest.mark.parametrize("owner", [None, without("_create_cuda_graph_warmup_request")], ids=["no class", "elsewhere"])
def test_a_layout_that_is_not_there_is_left_alone(monkeypatch: pytest.MonkeyPatch, owner: type | None) -> None:
    assert not hook(monkeypatch, owner)


@pytest.mark.parametrize("owner", [without("_release_batch_context"), without("warmup"), other_parameters()])
def test_what_is_relied_on_is_looked_for_first(monkeypatch: pytest.MonkeyPatch, owner: type) -> None:
    before = dict(vars(owner))
    with pytest.raises(AttributeError):
        hook(monkeypatch, owner)
    assert {name: vars(owner)[name] for name in before} == before


@pytest.mark.skipif(not HERE, reason="no tensorrt_llm here")
def test_the_real_package_has_one_of_the_layouts() -> None:
    importlib.import_module(engine.LAYOUTS[0].module)
    owners = [getattr(sys.modules.get(one.module), one.owner, None) for one in engine.LAYOUTS]
    found = [one for one in owners if hasattr(one, "_create_cuda_graph_warmup_request")]
    need(len(found) == 1, "one class of TensorRT-LLM makes the batches of its captures")
    parameters = tuple(inspect.signature(found[0]._create_cuda_graph_warmup_request).parameters)
    need(
        parameters[: len(engine.PARAMETERS)] == engine.PARAMETERS,
        "it takes the resources, a batch size and a draft length",
    )
    need(
        hasattr(found[0], "_release_batch_context") and hasattr(found[0], "warmup"),
        "that class frees batches and warms up",
    )
