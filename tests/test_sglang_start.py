"""`build --engine sglang` with a small package that has SGLang's names and the order of its calls.

How far the real SGLang gets is what `tools/check_sglang_starts` holds, and that it has these names `test_sglang_contract.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from aot_cache.artifact import target as targets
from aot_cache.artifact.manifest import whole
from aot_cache.artifact.plan import Plan
from aot_cache.builder import pipeline
from aot_cache.builder.engine_start import Engine
from aot_cache.builder.pipeline import Built, Request
from aot_cache.engines.sglang import virtual_start
from aot_cache.errors import DeclarationError
from aot_cache.store import read_bundle

HERE = Path(__file__).parent
FAKE = HERE / "fake_sglang"


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Built]:
    folder = tmp_path_factory.mktemp("sglang")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")
    about = folder / "installed" / "sglang-0.0.1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.0.1\n")

    def run(*options: str) -> Built:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE.parent), str(FAKE), str(about.parent)]))
            patch.setenv("AOT_CACHE_STRICT", "1")
            asked = Engine("sglang", (str(folder / "model"), *options))
            return pipeline.build(Request(target=targets.get("h200"), store=folder / "store", engine=asked))

    return run


def launched(built: Built) -> dict[str, list[object]]:
    """Kernel → the constants of its specializations."""
    found: dict[str, list[object]] = {}
    (plan,) = built.path.parents[1].joinpath("starts").glob(f"{built.path.stem}.plan.json")
    for unit in Plan.read(plan).units:
        constants = [pair["t"][1] for pair in unit.specialization if pair["t"][0] == "constexpr"]
        found.setdefault(unit.kernel.partition("@")[0], []).extend(constants)
    return {name: sorted(values, key=str) for name, values in found.items()}


def test_what_a_server_launches_and_calls(build: Callable[..., Built]) -> None:
    """Each power of two up to the most requests, a kernel that only one kind of requests launches, a compiled function. A step
    that raises costs its own kinds of requests, and no others."""
    built = build("--max-running-requests", "8")
    assert launched(built) == {"fake_sglang_kernel:decode": [1, 2, 4, 8], "fake_sglang_kernel:with_bias": []}
    manifest = whole(read_bundle(built.path))
    assert {graph.name for graph in manifest.graphs} == {"fake_sglang_model:step"}, (
        "one for 1 request, and one for more"
    )
    unreached = built.engine["unreached"]
    assert built.engine["requests"] > 50
    said = "with penalties: RuntimeError: penalties are not implemented (srt/managers/"
    for text, n in zip(unreached, (1, 3, 8), strict=True):
        assert text.startswith(f"requests {n} {said}")
    assert built.untested.startswith("sglang 0.0.1 was not tried on the virtual device; 0.5.16, 0.5.23 were")
    assert built.engine["models"] == [] and built.covered == built.declared
    assert build("--max-running-requests", "8").compiled == 0


def test_each_rank_is_started(build: Callable[..., Built]) -> None:
    built = build("--tp", "2")
    assert built.engine["ranks"] == 2 and launched(built)["fake_sglang_kernel:decode"] == [1, 2, 4]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--no-such-option",), "sglang serve does not take these arguments: unrecognized arguments: --no-such-option"),
        (("--max-running-requests", "0"), "arguments: ValueError: max_running_requests must be positive"),
        (("--pp", "2", "--dp", "2"), "expected no split but --tp, found pp_size 2, dp_size 2"),
    ],
)
def test_what_cannot_start(build: Callable[..., Built], options: tuple[str, ...], said: str) -> None:
    with pytest.raises(DeclarationError) as error:
        build(*options)
    assert said in str(error.value)


@pytest.mark.parametrize("given", [["MODEL", "--tp", "2"], ["--model-path", "MODEL"], ["--tp=2", "--model=MODEL"]])
def test_the_folder_of_the_model(given: list[str], tmp_path: Path) -> None:
    assert virtual_start.model_folder([one.replace("MODEL", str(tmp_path)) for one in given]) == tmp_path
    assert virtual_start.model_folder([one.replace("MODEL", "an/other") for one in given]) is None
    assert virtual_start.model_folder(["--tp", "2"]) is None
