"""`build --engine`: an engine starts on the virtual device, and what it launches and compiles is built.

The engine is `small_engine`. That the real vLLM goes this way to its end is checked by `tools/check_vllm`, beside a record of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import engine_starts_page
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from aot_cache.artifact import engine_cache
from aot_cache.artifact import target as targets
from aot_cache.artifact.manifest import Manifest, whole
from aot_cache.artifact.plan import Plan
from aot_cache.builder import pipeline
from aot_cache.builder.engine_start import Engine
from aot_cache.builder.pipeline import Built, Request
from aot_cache.cli.main import app
from aot_cache.engines.requests import Limits, waves
from aot_cache.engines.sglang import virtual_start as sglang_start
from aot_cache.engines.vllm import virtual_start
from aot_cache.errors import AotCacheError, DeclarationError
from aot_cache.store import read_bundle

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("engine")
    model = made / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights.bin").write_bytes(b"1")
    return made


@pytest.fixture(scope="module")
def build(folder: Path) -> Callable[..., Built]:
    def run(
        *options: str, engine: str = "tests.small_engine", target: str = "h200", plans: tuple[Path, ...] = ()
    ) -> Built:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
            patch.setenv("AOT_CACHE_STRICT", "1")
            asked = Engine(engine, (str(folder / "model"), *options))
            return pipeline.build(
                Request(target=targets.get(target), store=folder / "store", engine=asked, plans=plans)
            )

    return run


@pytest.fixture(scope="module")
def built(build: Callable[..., Built]) -> Built:
    return build()


def manifest_of(built: Built) -> Manifest:
    return whole(read_bundle(built.path, built.digest))


def test_all_of_it_is_in_the_bundle(built: Built) -> None:
    """Kernels of all candidates, compiled functions, the engine's caches, and what waits for the start."""
    manifest = manifest_of(built)
    assert not built.failed and built.units == len(manifest.units)
    assert {kernel.name.partition("@")[0] for kernel in manifest.kernels} == {
        f"sample_at_start:{name}" for name in ("conv", "update", "other")
    }
    assert [graph.function for graph in manifest.graphs] == ["step"] and built.neighbours >= 0
    (entry,) = manifest.engine_caches
    assert (entry.engine, entry.kind) == ("small", engine_cache.COMPILED)
    assert b"triton_poi_fused" in read_bundle(built.path).object(entry.files["rank_0/model"]), (
        "Inductor's kernel for the target"
    )
    assert {name for variant in manifest.at_start for name in variant.arguments} == {"num_lines"}


def test_what_it_says_of_the_engine(built: Built) -> None:
    told = built.engine
    assert told["name"] == "tests.small_engine" and told["requests"] == 2 and told["models"] == ["small:Model"]
    assert told["unreached"] == ["requests with two heads: no second head (small_engine.py:1)"]
    ((place, what),) = told["assumed"].items()
    assert "small_engine.py" in place and "tolist()" in what
    assert "was not tried" in built.untested and "0.0.1 were" in built.untested


def test_the_start_is_a_plan_like_a_recording(folder: Path, built: Built) -> None:
    (path,) = (folder / "store" / "starts").glob("*.plan.json")
    plan = Plan.read(path)
    assert plan.origin == "started" and plan.target == "h200" and plan.caches
    assert [function.function for function in plan.functions] == ["recorded_steps:step"]
    batches = [call[0][0] for call in plan.functions[0].calls]
    assert batches == [2, 6], "two rows for each request, because each sampled token is taken for 1"
    assert {tuning.kernel.partition("@")[0] for tuning in plan.tunings} == {"sample_at_start:update"}


def test_nothing_to_do_and_what_changes_it(folder: Path, build: Callable[..., Built], built: Built) -> None:
    again = build()
    assert again.nothing_to_do and again.engine == built.engine
    (folder / "model" / "weights.bin").write_bytes(b"2")
    assert build().nothing_to_do, "weights decide nothing"
    (folder / "model" / "config.json").write_text('{"a": 1}')
    changed = build()
    assert not changed.nothing_to_do and changed.compiled == 0, "another start that launches the same"


def test_another_option_compiles_only_what_it_adds(build: Callable[..., Built], built: Built) -> None:
    more = build("--batches=1,3,16,5")
    assert more.compiled == 1 and more.units == built.units, (
        "16 and 5 are in known classes: only the graph has other calls"
    )
    assert read_bundle(more.path).object(manifest_of(more).engine_caches[0].files["batch"]) == b"16"


def test_each_rank_is_started(build: Callable[..., Built], built: Built) -> None:
    """A rank has kernels of its own, and graphs for the GPU with its number."""
    two = build("--ranks=2")
    manifest = manifest_of(two)
    assert two.engine["ranks"] == 2 and built.engine["ranks"] == 1
    assert two.units == built.units + 1 and two.engine["unreached"] == built.engine["unreached"]
    (entry,), bundle = manifest.engine_caches, read_bundle(two.path)
    for rank in (0, 1):
        graph = bundle.object(entry.files[f"rank_{rank}/model"])
        assert b"triton_poi_fused" in graph and f"_DeviceGuard({rank})".encode() in graph


def test_a_recording_beside_it_adds_choices_and_functions(
    folder: Path, build: Callable[..., Built], built: Built, tmp_path: Path
) -> None:
    """A GPU has chosen between the configs, and met calls of the same function."""
    label = Engine("tests.small_engine", (str(folder / "model"),)).label
    plan = Plan.read(folder / "store" / "starts" / f"{label}-h200.plan.json")
    tunings = [replace(tuning, choice=tuning.candidates[1]) for tuning in plan.tunings]
    functions = [replace(one, calls=[[[96, 8, 8, 1, 0], [8, 4, 4, 1, 0]]]) for one in plan.functions]
    recorded = tmp_path / "server.plan.json"
    replace(plan, origin="recorded", caches="", tunings=tunings, functions=functions).write(recorded)
    both = build(plans=(recorded,))
    manifest = manifest_of(both)
    assert [tuning.choice for tuning in manifest.tunings] == [tuning.choice for tuning in tunings]
    assert both.units == built.units and both.points == built.points + 1
    assert manifest.engine_caches, "of the start: the recording has none"


@pytest.mark.parametrize(
    ("engine", "options", "said"),
    [
        (
            "tests.no_such_engine",
            (),
            "expected an engine (sglang, vllm), or a module with an adapter, found 'tests.no_such_engine'",
        ),
        ("nothing", (), "expected an engine (sglang, vllm), or a module with an adapter, found 'nothing'"),
        (
            "tensorrt_llm",
            (),
            "expected an engine (sglang, vllm), or a module with an adapter, found 'tensorrt_llm'",
        ),  # no adapter
        ("sglang", (), "expected sglang beside aot-cache, found none"),
        ("vllm", (), "expected vllm beside aot-cache, found none"),
        ("tests.small_engine", ("--depth=3",), "expected the option batches, found ['depth']"),
    ],
)
def test_what_cannot_start(build: Callable[..., Built], engine: str, options: Sequence[str], said: str) -> None:
    with pytest.raises(DeclarationError) as error:
        build(*options, engine=engine)
    assert str(error.value).partition("; hint")[0] == said


def test_an_engine_needs_a_gpu_target(build: Callable[..., Built]) -> None:
    with pytest.raises(DeclarationError, match="expected a GPU target for an engine, found cpu"):
        build(target="cpu")


# --- the command line -------------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["build", *arguments])
    return done.exit_code, done.stdout if not isinstance(done.exception, AotCacheError) else str(done.exception)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--engine", "vllm"], "expected a model behind `--`, found none"),
        (["--", "model"], "expected no arguments without --engine, found model"),
        ([], "expected --model, --plan or --engine, found none of them"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], said: str) -> None:
    code, text = run(*arguments)
    assert code and said in text


def test_a_command_line(folder: Path, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options behind `--` are the engine's own; what is printed names what was not reached."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(HERE)]))
    given = ["--engine", "tests.small_engine", "--target", "h200", "--store", str(folder / "store")]
    code, text = run(*given, "--", str(folder / "model"), "--batches=1,3")
    assert code == 0, text
    assert "2 kinds of requests to tests.small_engine, 1 not reached" in " ".join(text.split())
    assert "not reached: requests with two heads" in text and "compiles itself: small:Model" in text
    code, text = run(*given, "--show-plan", "--json", "--", str(folder / "model"), "--batches=1,3")
    (plan,) = json.loads(text)["plans"]
    assert code == 0 and plan["engine"]["unreached"] and plan["units"] == built.units
    why = {row["kernel"].partition("@")[0]: row["reached_by"] for row in plan["kernels"]}
    assert all(first == ["start"] for first in why.values()) and len(why) == 3, "the capture comes before the requests"


# --- requests --------------------------------------------------------------------------------------------------------


@given(
    limits=st.builds(
        Limits,
        requests=st.integers(1, 2048),
        batched_tokens=st.integers(16, 1 << 15),
        length=st.integers(2, 1 << 18),
        vocabulary=st.just(1000),
        adapters=st.integers(0, 4),
    )
)
def test_requests_stay_within_the_limits(limits: Limits) -> None:
    refused = ("min_p", "logit_bias", "min_tokens")
    assert any(set(wave.sampling) & set(refused) for wave in waves(limits))
    made = waves(limits, refused)
    assert made and len({wave.label for wave in made}) == len(made)
    for wave in made:
        lengths = [*wave.lengths, *wave.later]
        assert 0 < len(lengths) <= limits.requests and min(lengths) >= 1
        assert max(lengths) + wave.tokens <= limits.length
        assert not set(wave.sampling) & set(refused)
        assert set(wave.adapters) <= set(range(limits.adapters + 1))
    assert {number for wave in made for number in wave.adapters} == set(range(limits.adapters + 1))
    assert any(len(wave.lengths) == limits.requests for wave in made)
    assert max(max(wave.lengths) + wave.tokens for wave in made) <= limits.length


@pytest.mark.parametrize("page", engine_starts_page.PAGES, ids=lambda page: page.engine)
def test_the_page_has_the_record_s_table(page: engine_starts_page.Page) -> None:
    assert page.in_page() == page.table()


@pytest.mark.parametrize(
    ("page", "tried"), [(engine_starts_page.VLLM, virtual_start.TRIED), (engine_starts_page.SGLANG, sglang_start.TRIED)]
)
def test_what_is_said_of_all_starts(page: engine_starts_page.Page, tried: Sequence[str]) -> None:
    """The versions that an adapter was tried with, each model to its end."""
    record = page.read()
    assert set(record) == set(tried)
    for models in record.values():
        assert "qwen3.5 + mtp" in models and "llama 8b" in models
        for row in models.values():
            assert not row.get("error") and row["failed"] == [] and row["unreached"] == [] and row["units"]
        again = models["qwen3.5 + mtp"]["again"]
        assert again["nothing to do"] and again["seconds"] <= 10


def test_what_is_said_of_vllm() -> None:
    """docs/vllm.md: every family, a second build in seconds, and all that a GPU has recorded."""
    record = engine_starts_page.VLLM.read()
    for models in record.values():
        assert all(row["models"] and row["largest process, GiB"] < 8 for row in models.values())
        assert models["qwen3.5 + mtp"]["again"]["seconds"] <= 5
    assert record["0.24.0"]["qwen3.5 + mtp"]["recorded on a GPU and not built here"] == []
