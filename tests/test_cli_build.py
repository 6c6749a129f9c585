"""`aot-cache build` of recipes with options: what is passed on, what is refused, and what it takes to build again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS
from printed import without_progress
from stub_builds import a_built

from aot_cache.artifact.plan import CallPlan, CasePlan, Failure, Plan, Unit
from aot_cache.builder import assemble, pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.cli.main import main
from aot_cache.cli.render import terminal
from aot_cache.runtime import host_gpu as native_gpu
from aot_cache.store import read_bundle

ROOT = Path(__file__).parents[1]
RECIPE = """
import json
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, declare

@triton.jit
def scale(x, n, WIDTH: tl.constexpr):
    at = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)

def recipe(*, spec: Literal["none", "mtp"] = "none", max_batch: int = 2, tp: int = 1, config: str = "") -> Recipe:
    width = (json.loads(Path(config).read_text())["width"] if config else 64) // tp

    @declare(batch=Range(1, max_batch))
    def decode(batch):
        x = torch.empty(batch * (2 if spec == "mtp" else 1), device="cuda")

        def run():
            scale[(1,)](x, x.numel(), WIDTH=width)
            if tp > 1:
                dist.all_reduce(x)

        return Call(run)

    return Recipe("opt", [decode], ranks=tp)
"""


ENTRY_POINTS = """
[aot_cache.recipes]
opt = opt:recipe
[aot_cache.model_types]
tiny_3 = opt:recipe
"""


def command(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`aot-cache ARGUMENTS` in a folder on whose path the package `opt` is installed."""
    done = subprocess.run(
        [sys.executable, "-m", "aot_cache", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    done.stderr = without_progress(done.stderr)
    return done


# --- real builds ------------------------------------------------------------------------------------------------------


@dataclass
class Folder:
    """A folder with an installed recipe for `model_type` tiny_3, and what builds there made."""

    path: Path
    built: dict[str, dict[str, Any]] = field(default_factory=dict)

    def build(self, name: str, *arguments: object) -> None:
        done = command(self.path, "build", "--json", "--workers", 1, *arguments)
        assert done.returncode == 0, done.stderr  # on a busy machine it tells how far it is
        (self.built[name],) = json.loads(done.stdout)["bundles"]

    def manifest(self, name: str) -> Any:
        return read_bundle(Path(self.built[name]["path"])).manifest

    def file(self, name: str) -> str:
        return Path(self.built[name]["path"]).name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made = Folder(tmp_path_factory.mktemp("options"))
    (made.path / "opt.py").write_text(RECIPE)
    info = made.path / "opt-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: opt\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        "[aot_cache.recipes]\nopt = opt:recipe\n[aot_cache.model_types]\ntiny_3 = opt:recipe\n"
    )
    for name in "ab":
        (made.path / name).mkdir()
        (made.path / name / "config.json").write_text('{"model_type": "tiny_3", "width": 128}')
    given = ("--spec", "mtp", "--max-batch", 3)
    made.build("first", "--model", "opt", *given)
    made.build("same", "--model", "opt?max_batch=3", "--option", "spec=mtp")
    made.build("default given", "--model", "opt", *given, "--tp", 1)
    made.build("other", "--model", "opt", *given, "--tp", 2)
    made.build("config", "--model", "a/config.json", *given)
    made.build("moved", "--model", made.path / "b" / "config.json", *given)
    made.build("elsewhere", "--model", "b/config.json", *given, "--store", "other")
    (made.path / "a" / "config.json").write_text('{"model_type": "tiny_3", "width": 256}')
    made.build("edited", "--model", "a/config.json", *given)
    return made


def test_options_reach_the_recipe(folder: Folder) -> None:
    first = folder.built["first"]
    assert (first["points"], first["declared"], first["covered"], first["failed"]) == (3, 3, 3, [])
    assert folder.manifest("first")["spec"] == "opt?max_batch=3&spec=mtp"
    assert folder.file("first") == "opt-max_batch=3-spec=mtp-h200.safetensors"


def test_the_same_options_have_nothing_to_do(folder: Folder) -> None:
    first, same = folder.built["first"], folder.built["same"]
    assert not first["nothing_to_do"] and same["nothing_to_do"]
    assert (same["digest"], same["path"], same["covered"]) == (first["digest"], first["path"], 3)


def test_a_default_that_is_given_makes_the_same_bundle(folder: Folder) -> None:
    first, given = folder.built["first"], folder.built["default given"]
    assert (given["path"], given["digest"], given["compiled"]) == (first["path"], first["digest"], 0)


def test_another_option_is_built_anew(folder: Folder) -> None:
    other = folder.built["other"]
    assert not other["nothing_to_do"] and other["compiled"] == other["units"] > 0
    assert folder.manifest("other")["spec"] == "opt?max_batch=3&spec=mtp&tp=2"
    assert folder.file("other") == "opt-max_batch=3-spec=mtp-tp=2-h200.safetensors"


def test_the_ranks_that_a_recipe_says_are_those_of_the_job(folder: Folder) -> None:
    """Its host code sums over them, which without a job of so many raises."""
    path = Path(folder.built["other"]["path"])
    ranks = [folder.built["other"]["ranks"], folder.manifest("other")["ranks"]]
    assert [*ranks, Plan.read(path.with_suffix(".plan.json")).ranks] == [2, 2, 2]
    assert (folder.built["first"]["ranks"], folder.manifest("first")["ranks"]) == (1, 1)
    said = {name: command(folder.path, "inspect", folder.built[name]["path"]).stdout for name in ("first", "other")}
    assert "world size 2" in said["other"] and "world size" not in said["first"]


def test_the_number_of_ranks_that_is_given_is_the_recipes(folder: Folder) -> None:
    asked = ("build", "--model", "opt", "--tp", 2, "--show-plan", "--json")
    other = command(folder.path, *asked, "--ranks", 3)
    assert other.returncode == 3
    assert "expected a world size of 2 for recipe 'opt', found --ranks 3\nhint: omit --ranks" in other.stderr
    same = command(folder.path, *asked, "--ranks", 2)
    assert [plan["ranks"] for plan in json.loads(same.stdout)["plans"]] == [2], same.stderr


def test_a_config_file_counts_by_its_content(folder: Folder) -> None:
    first, moved, elsewhere = (folder.built[name] for name in ("config", "moved", "elsewhere"))
    assert not first["nothing_to_do"] and moved["nothing_to_do"] and not elsewhere["nothing_to_do"]
    assert first["digest"] == moved["digest"] == elsewhere["digest"]
    assert Path(first["path"]).read_bytes() == Path(elsewhere["path"]).read_bytes()
    assert folder.manifest("config")["spec"].startswith("opt?config=sha256:")


def test_an_edited_config_file_is_built_anew(folder: Folder) -> None:
    edited = folder.built["edited"]
    assert not edited["nothing_to_do"] and edited["compiled"] == edited["units"] > 0
    assert folder.manifest("edited")["spec"] != folder.manifest("config")["spec"]
    assert folder.file("edited") != folder.file("config")


def test_no_path_is_in_what_was_built(folder: Folder) -> None:
    for name in ("config", "edited"):
        path = Path(folder.built[name]["path"])
        for file in (path, path.with_suffix(".plan.json")):
            assert str(folder.path).encode() not in file.read_bytes() and b"config.json" not in file.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--model opt --dtype bfloat16", "error: 'opt' has no option 'dtype'; known: config, max_batch, spec, tp\n"),
        (
            "--model opt --spec mtpp",
            "error: expected one of none, mtp as option 'spec' of 'opt', found 'mtpp'\nhint: did you mean 'mtp'?\n",
        ),
        ("--model opt --option config=nowhere.json", "error: cannot read config file nowhere.json: No such file"),
    ],
)
def test_an_option_that_the_recipe_refuses(folder: Folder, arguments: str, words: str) -> None:
    said = command(folder.path, "build", *arguments.split(), "--json")
    assert said.returncode == 3 and said.stderr.startswith("error: ") and words in said.stderr
    assert said.stderr.count("\n") <= 2 and list(json.loads(said.stdout)) == ["error"]


# --- what is passed on ------------------------------------------------------------------------------------------------

Run = Callable[[str], tuple[int, str, str, list[str | None]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`aot-cache build ARGUMENTS` that builds nothing: (exit code, stdout, stderr, the models that were asked for)."""
    asked: list[str | None] = []

    def build(request: Request, progress: object) -> Built:
        asked.append(request.model)
        return a_built(target=request.target.id)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(native_gpu, "gpu_here", lambda: False)
    monkeypatch.setattr(terminal.Progress, "FIRST", HANGS)  # however slow the machine is
    monkeypatch.setattr(pipeline, "build", build)

    def call(arguments: str) -> tuple[int, str, str, list[str | None]]:
        code = main(["build", *arguments.split()])
        return code, *capfd.readouterr(), asked

    return call


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        ("", "m:r"),
        (
            "--spec mtp --max-batch 64 --num-speculative-tokens 2 --max-model-len 4096 --tp 2 --dtype bfloat16",
            "m:r?dtype=bfloat16&max_batch=64&max_model_len=4096&num_speculative_tokens=2&spec=mtp&tp=2",
        ),
        ("--option b=x=y --option a= --tp 1", "m:r?a=&b=x%3Dy&tp=1"),
    ],
)
def test_options_that_are_given_are_passed_on(run: Run, arguments: str, model: str) -> None:
    code, _, err, asked = run(f"--model m:r {arguments}")
    assert (code, err, asked) == (0, "", [model])


@pytest.mark.parametrize(
    ("arguments", "words", "code"),
    [
        ("--model m:r --option tp", "expected an option as name=value, found 'tp'", 3),
        ("--model m:r --option =2", "'=2'", 3),
        ("--model m:r --option tp=2 --tp 2", "option 'tp' is given twice: '2' and '2'", 3),
        ("--model m:r --option a=1 --option a=2", "option 'a' is given twice", 3),
        ("--model m:r?tp=2 --tp 4", "option 'tp' of 'm:r' is given twice: '2' and '4'", 3),
        ("--model m:r?tp", "name=value&name=value, found 'tp'", 3),
        ("--model m:r --tp 0", "'--tp'", 2),
        ("--model m:r --max-batch many", "'--max-batch'", 2),
        ("--plan p.json --tp 2", "options of a recipe (tp) need --model", 3),
        ("--model x/config.json", "cannot read config file x/config.json: No such file", 3),
        ("--model nowhere --tp 2", "unknown model 'nowhere'", 3),
    ],
)
def test_a_mistake_is_found_before_anything_starts(run: Run, arguments: str, words: str, code: int) -> None:
    found, out, err, asked = run(arguments)
    assert (found, out, asked) == (code, "", [])
    assert err.startswith("error: ") and err.count("\n") <= 2 and words in err


# --- the file's name, and what is covered -----------------------------------------------------------------------------


def test_points_that_reach_what_failed_are_not_covered() -> None:
    units = [
        Unit(kernel="m:k", source="s", specialization=[n], options={}, reached={"a": [{"n": values}]})
        for n, values in enumerate(("1..4", "3..6"))
    ]
    call = CallPlan(function="m:f", line=1, id="c" * 16, mode="inference", wrapping={}, dynamic={}, reached={"b": [{}]})
    cases = [
        CasePlan(name="a", dims={"n": "1..10"}, points=10, total=10, sampled=[]),
        CasePlan(name="b", dims={}, points=1, total=1, sampled=[]),
    ]
    plan = Plan(recipe="r", target="h200", cases=cases, units=units, calls=[call])

    def covered(*failed: tuple[str, str]) -> int:
        return assemble.covered(plan, [Failure(kernel=kernel, unit=unit, error="") for kernel, unit in failed])

    assert covered() == 11
    assert covered(("m:k", units[0].id)) == 7
    assert covered(("m:k", units[0].id), ("m:k", units[1].id)) == 5
    assert covered(("m:f", call.id)) == 10
    assert covered(("case a", "n=9"), ("m:k", units[0].id), ("case a", "n=2")) == 6
    assert covered(("launcher (.so)", "0123")) == 0, "nobody knows which points need it"
