"""The serving example over the real engine: tokens over HTTP are the engine's own, and a bundle of other sizes is told.

Nothing is compiled here: what the compiled functions compute is tested elsewhere.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers.modeling_layers", reason="the real engine needs transformers")

import httpx
import serve
import start_report
import torch
from fake_engine import SECONDS, ended, wait_until
from scheduler import Scheduler
from serving_http import make_app

import aot_cache
from aot_cache.errors import DeclarationError, Incompatible
from aot_cache.models.qwen3_5 import check_bundle
from aot_cache.models.qwen3_5.engine import Engine, make_engine
from aot_cache.recipes import declare as declaring
from aot_cache.runtime import loader

Json = Any
SIZES = ["--max-batch", "2", "--max-model-len", "48", "--prefill-chunk", "8", "--dtype", "float32"]
PROMPTS = [[1], [5, 6, 7], list(range(20, 45)), [9] * 8]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def _unsealed() -> Iterator[None]:
    yield
    loader.LEDGER._sealed = False


def options_of(*arguments: str) -> argparse.Namespace:
    return serve.make_parser().parse_args(["--model", "qwen3.5-tiny", "--device", "cpu", *SIZES, *arguments])


@pytest.fixture(scope="module")
def alone() -> Callable[..., Engine]:
    """Engines of one model: the same weights with and without drafts."""
    torch.manual_seed(0)
    settings = declaring.load(serve.spec_of(options_of("--spec", "mtp"))).settings
    made = make_engine(settings, "cpu")
    return lambda speculate=True: Engine(made.model, speculate=speculate)


def said(engine: Engine, prompt: list[int], count: int, temperature: float, seed: int) -> list[int]:
    """What an engine answers to one request that it serves alone."""
    out = [engine.start(0, prompt, temperature, seed)]
    while len(out) < count:
        (new,) = engine.step([0])
        out += new
    engine.stop(0)
    return out[:count]


def ask(app: Any, path: str, body: Json = None) -> httpx.Response:
    async def inside() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://here", timeout=SECONDS) as client:
            return await (client.get(path) if body is None else client.post(path, json=body))

    return asyncio.run(inside())


@pytest.mark.parametrize("speculate", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_over_http_are_the_engine_s_own(
    alone: Callable[..., Engine], speculate: bool, temperature: float
) -> None:
    wanted = [said(alone(False), prompt, 10, temperature, 3) for prompt in PROMPTS]
    scheduler = Scheduler(lambda: alone(speculate))
    scheduler.start()
    wait_until(lambda: scheduler.state() == "ready")
    app = make_app(scheduler, "tiny")
    asked = {"prompt": PROMPTS, "max_tokens": 10, "temperature": temperature, "seed": 3}
    choices = ask(app, "/v1/completions", asked).json()["choices"]
    assert [choice["token_ids"] for choice in choices] == wanted
    text = ask(app, "/v1/completions", {**asked, "stream": True}).text
    parts: list[list[int]] = [[] for _ in PROMPTS]
    for line in text.split("\n\n")[:-2]:
        choice = json.loads(line.removeprefix("data: "))["choices"][0]
        parts[choice["index"]] += choice["token_ids"]
    assert parts == wanted
    metrics = ask(app, "/metrics").text.splitlines()
    assert f"serve_tokens_total {2 * 10 * len(PROMPTS)}" in metrics
    assert ('serve_steps_total{accepted="2"} ' in ask(app, "/metrics").text) is speculate
    ended(scheduler)
    assert not scheduler.error


def test_a_step_without_speculation_leaves_the_drafts_alone(alone: Callable[..., Engine]) -> None:
    engine = alone(False)
    assert (list(engine.steps), engine.speculative) == (["decode"], 0)
    assert engine.settings.drafts == 2  # of which the caches' size, and so the graphs that fit, are a matter
    assert {batch.tokens.shape[1] for batch in engine._batches.values()} == {1}


def test_parts_of_a_prompt_are_laid_out_as_declared(
    alone: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, seen = alone(), []
    run = engine.model.prompt
    monkeypatch.setattr(engine.model, "prompt", lambda part, *rest: (seen.append(part), run(part, *rest))[1])
    engine.start(0, range(17))
    # A bundle's graphs are for the strides of a tensor of its own, also where a size of 1 lets them be anything.
    assert [(tuple(part.shape), part.stride()) for part in seen] == [
        ((1, 8), (8, 1)),
        ((1, 8), (8, 1)),
        ((1, 1), (1, 1)),
    ]


def test_the_server_starts_the_real_engine_and_tells_what_it_did(alone: Callable[..., Engine]) -> None:
    options, clock = options_of("--spec", "mtp", "--no-speculation"), start_report.Clock()
    scheduler = Scheduler(lambda: serve.start_engine(options, clock))
    scheduler.start()
    wait_until(lambda: scheduler.state() == "ready")
    assert list(clock.seconds) == ["imported", "weights", "bundle", "captured", "ready"]
    app = make_app(scheduler, options.model)
    answer = ask(app, "/v1/completions", {"prompt": [1, 2], "max_tokens": 3}).json()
    assert answer["usage"] == {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
    found = ask(app, "/aot").json()
    assert found["sealed"] is True and found["bundles"] == []
    ended(scheduler)


# --- a bundle of other options ----------------------------------------------------------------------------------------


def test_options_that_are_not_given_are_the_recipe_s() -> None:
    parsed = serve.make_parser().parse_args(["--model", "qwen3.5", "--spec", "mtp"])
    assert declaring.load(serve.spec_of(parsed)).settings == declaring.load("qwen3.5?spec=mtp").settings


def test_options_that_are_given_reach_the_engine_s_settings() -> None:
    made = declaring.load(serve.spec_of(options_of("--spec", "mtp", "--num-speculative-tokens", "3"))).settings
    wanted = (3, 2, 48, 8, "float32")
    assert (made.drafts, made.max_batch, made.max_model_len, made.prefill_chunk, made.dtype) == wanted


def loaded(monkeypatch: pytest.MonkeyPatch, *specs: str) -> None:
    found = [
        SimpleNamespace(bundle=SimpleNamespace(path="B.safetensors"), manifest=SimpleNamespace(spec=spec))
        for spec in specs
    ]
    monkeypatch.setattr(loader.SESSION, "_kernels", found)


TINY = "qwen3.5-tiny?dtype=float32&max_batch=2&max_model_len=48&prefill_chunk=8"


@pytest.mark.parametrize(
    ("built", "mine"),
    [
        ([], TINY),
        ([""], TINY),  # of a recorded plan: nobody knows
        ([TINY], TINY),
        (["gated-delta", TINY], TINY),  # one is enough
        ([TINY], "qwen3.5?size=tiny&dtype=float32&max_batch=2&max_model_len=48&prefill_chunk=8"),
        ([TINY], TINY.replace("prefill_chunk=8", "prefill_chunk=4")),  # lengths of which all were built
        ([TINY], TINY.replace("max_model_len=48", "max_model_len=50")),  # a cache of the same size
    ],
)
def test_bundles_that_fit(monkeypatch: pytest.MonkeyPatch, built: list[str], mine: str) -> None:
    loaded(monkeypatch, *built)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_bundle.check(mine, strict=True) == ""


@pytest.mark.parametrize(
    ("built", "words"),
    [
        (TINY.replace("max_batch=2", "max_batch=4"), "--max-batch is 2 here and 4 there"),
        (TINY.replace("max_model_len=48", "max_model_len=200"), "--max-model-len is 48 here and 200 there"),
        (TINY.replace("=8", "=4"), "--prefill-chunk is 8 here and 4 there"),
        (TINY.replace("dtype=float32&", ""), "--dtype is float32 here and bfloat16 there"),
        (TINY.replace("-tiny", "-0.8b"), "--model is qwen3.5-tiny here and qwen3.5-0.8b there"),
        (TINY.replace("-tiny", "-tiny-moe"), "--model is qwen3.5-tiny here and qwen3.5-tiny-moe there"),
        (TINY + "&tp=2", "--tp is 1 here and 2 there"),
        (
            TINY + "&spec=mtp",
            "--num-speculative-tokens is 0 here and 2 there; hint: start with its --spec mtp, and --no-spec",
        ),
        (TINY + "&wings=2", "'qwen3.5-tiny' has no option 'wings'"),
        ("gated-delta", f"is for gated-delta, not for {TINY}; hint: start with"),
        ("qwen3.5?config=sha256:00", f"is for qwen3.5?config=sha256:00, not for {TINY} (expected config file"),
    ],
)
def test_a_bundle_of_other_options_is_one_line(monkeypatch: pytest.MonkeyPatch, built: str, words: str) -> None:
    loaded(monkeypatch, built)
    with pytest.raises(Incompatible) as caught:
        check_bundle.check(TINY, strict=True)
    for one in (words, f"bundle B.safetensors is for {built}, not for {TINY}", f"aot-cache build --model '{TINY}'"):
        assert one in str(caught.value)
    with pytest.warns(aot_cache.AotCacheWarning, match="aot-cache: bundle B.safetensors is for"):
        said = check_bundle.check(TINY)
    assert said == str(caught.value) and "\n" not in said


def test_a_config_file_is_known_by_its_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    from aot_cache.models.qwen3_5.settings import SIZES as KNOWN
    from aot_cache.recipes import options

    for name, layers in (("a", 4), ("b", 8)):
        (tmp_path / name).mkdir()
        text = {**KNOWN["tiny"], "num_hidden_layers": layers}
        (tmp_path / name / "config.json").write_text(json.dumps(text))
    specs = [serve.spec_of(options_of("--model", str(tmp_path / name))) for name in ("a", "b")]
    loaded(monkeypatch, options.published(specs[0]))
    assert check_bundle.check(specs[0], strict=True) == ""
    with pytest.raises(Incompatible, match="AOT_CACHE_CONFIG"):
        check_bundle.check(specs[1], strict=True)


def test_each_size_has_bundles_of_its_own() -> None:
    named = {declaring.load(f"{one}?spec=mtp").name for one in ("qwen3.5-tiny", "qwen3.5", "qwen3.5-4b")}
    assert named == {"qwen3.5-tiny", "qwen3.5", "qwen3.5-4b"}
    assert declaring.load("qwen3.5-0.8b").name == "qwen3.5"


def test_a_wrong_value_is_the_recipe_s_error() -> None:
    with pytest.raises(DeclarationError, match="expected one of none, mtp as --spec"):
        serve.start_engine(options_of("--spec", "eagle"), start_report.Clock())
