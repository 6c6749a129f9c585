"""The recipe declares what the engine runs: its cases, their ranges and the lines that say what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import qwen
import torch

from aot_cache.errors import AotCacheError, DeclarationError, UnknownName
from aot_cache.models.qwen3_5 import recipe as shipped
from aot_cache.models.qwen3_5.engine import Engine
from aot_cache.models.qwen3_5.model import Batch
from aot_cache.models.qwen3_5.settings import KINDS, SIZES
from aot_cache.recipes.declare import Case, Recipe

ROOT = Path(__file__).parents[2]


def entry_points(group: str) -> dict[str, str]:
    """As pyproject.toml has them: what is installed may be older. (Python 3.10 has no tomllib.)"""
    table = (ROOT / "pyproject.toml").read_text().split(f'[project.entry-points."aot_cache.{group}"]\n')[1]
    lines = table.split("\n\n")[0].splitlines()
    return {name.strip('"'): value.strip('"') for name, value in (line.split(" = ") for line in lines)}


def ranges(found: Recipe) -> dict[str, dict[str, tuple[int, int]]]:
    """Case → dimension → first and last value."""
    return {
        case.name: {name: (one.values[0], one.values[-1]) for name, one in case.dims.items()} for case in found.cases
    }


def test_without_speculation() -> None:
    found = shipped.recipe(max_batch=48, max_model_len=1000, prefill_chunk=300)
    assert ranges(found) == {"prefill": {"tokens": (1, 300)}, "decode": {"batch": (1, 48)}}
    assert found.name == "qwen3.5" and found.doc == "Qwen3.5 (qwen3.5-0.8b, bfloat16, 1 ranks), no speculation"


def test_with_drafts() -> None:
    found = shipped.recipe(size="27b", spec="mtp", num_speculative_tokens=3, tp=2, dtype="float16")
    steps = {name: {"batch": (1, 256)} for name in ("decode", "verify", "draft")}
    assert ranges(found) == {"prefill": {"tokens": (1, 512)}, **steps}
    assert found.doc == "Qwen3.5 (qwen3.5-27b, float16, 2 ranks), 3 drafts by MTP"
    assert (found.ranks, shipped.recipe().ranks) == (2, 1), "its layers are summed over them"


@pytest.mark.parametrize("drafts", [0, 2])
def test_all_that_an_engine_does_is_declared(drafts: int) -> None:
    spec = {"spec": "mtp", "num_speculative_tokens": drafts} if drafts else {}
    found = shipped.tiny(max_batch=6, max_model_len=100, prefill_chunk=16, **spec)
    made = qwen.engine(drafts, max_batch=6, max_model_len=100, prefill_chunk=16)
    declared = ranges(found)
    assert {*made.steps} <= {*declared}
    assert all(declared[name]["batch"] == (min(made.sizes), max(made.sizes)) for name in made.steps)
    lengths: list[int] = []
    take_in = made.model.prompt

    def watched(tokens: torch.Tensor, *rest: Any) -> Any:
        lengths.append(tokens.shape[1])
        return take_in(tokens, *rest)

    made.model.prompt = watched  # type: ignore[method-assign]
    for slot, length in enumerate((1, 16, 17, 99)):
        made.start(slot, qwen.prompt(length))
    assert (min(lengths), max(lengths)) == declared["prefill"]["tokens"]


def test_a_prompt_shorter_than_a_chunk_is_all_that_there_can_be() -> None:
    assert ranges(shipped.tiny(max_model_len=40))["prefill"] == {"tokens": (1, 39)}


@pytest.mark.parametrize("spec", ["none", "mtp"])
def test_cases_say_what_they_are(spec: str) -> None:
    for case in shipped.tiny(spec=spec).cases:
        assert case.doc.endswith(".") and "\n" not in case.doc and case.mode == "no_grad"


@pytest.mark.parametrize("size", SIZES)
def test_names_that_are_installed(size: str) -> None:
    module, _, name = entry_points("recipes")[f"qwen3.5-{size}"].partition(":")
    assert module == shipped.__name__
    made: Callable[..., Recipe] = getattr(shipped, name)
    assert f"qwen3.5-{size}," in made().doc
    with pytest.raises(AotCacheError):
        made(tp=3)


def test_types_of_models_that_are_installed() -> None:
    assert entry_points("model_types") == dict.fromkeys(KINDS, f"{shipped.__name__}:recipe")


def test_errors_are_those_of_settings() -> None:
    with pytest.raises(UnknownName, match="unknown size '2b'"):
        shipped.recipe(size="2b")
    with pytest.raises(DeclarationError, match="as --spec, found"):
        shipped.recipe(spec="ngram")


def called(case: Case, size: int, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a case calls, made on the CPU."""
    monkeypatch.setattr(shipped, "device", lambda: "cpu")
    return case.call(dict.fromkeys(case.dims, size))


@pytest.mark.parametrize("size", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("name", ["prefill", "decode", "verify", "draft"])
def test_what_a_case_calls_runs(name: str, size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers stand for all: with them a build traces the graphs of both kinds."""
    found = shipped.recipe(size=size, spec="mtp", dtype="float32", max_batch=3, max_model_len=40)
    (case,) = [case for case in found.cases if case.name == name]
    call = called(case, 3, monkeypatch)
    model = call.fn.__self__
    assert [layer.block_type for layer in model.net.layers] == ["linear_attention", "full_attention"]
    out = call.fn(*call.args)
    if name == "prefill":
        assert call.args[0].shape == (1, 3) and out[0].shape == (1, 1) and out[1].shape == (1, 1, 64)
    else:
        batch = call.args[0]
        assert isinstance(batch, Batch) and batch.tokens.shape == (3, 1 if name == "decode" else 3)
        assert (out if name == "draft" else out[0]).shape == batch.tokens.shape
        engine = Engine(model)
        assert getattr(engine.model, name) == call.fn, "the same code as serving runs"
