"""aot_cache.cli.main: what each command prints, its exit codes, and that a mistake is an error and a hint. Builds are real."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from a_missed_call import MISS
from limits import HANGS
from printed import without_progress
from stub_builds import a_built

from aot_cache.artifact import target as targets
from aot_cache.artifact.key import Part
from aot_cache.artifact.plan import Plan
from aot_cache.artifact.target import Difference
from aot_cache.builder import pipeline
from aot_cache.builder.fingerprint import Inputs
from aot_cache.builder.pipeline import Built, Request
from aot_cache.cli.main import main
from aot_cache.cli.render import terminal
from aot_cache.errors import StoreUnwritable, TargetError
from aot_cache.runtime import host_gpu as native_gpu
from aot_cache.store import read_bundle, write_bundle

ROOT = Path(__file__).parents[1]
RECIPES = '''
import torch
import triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, declare

@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)

@triton.jit
def broken(x):
    tl.store(x, no_such_name)

def run(x):
    scale[(1,)](x, torch.empty_like(x), x.numel(), BLOCK=64, num_warps=2)

def run_broken(x):
    run(x)
    broken[(1,)](x)

@declare(n=Range(15, 17))
def twice(n):
    """Twice as much.

    And more."""
    return Call(run, torch.empty(n, device="cuda"))

@declare(n=Range(16, 16))
def fails(n):
    return Call(run_broken, torch.empty(n, device="cuda"))

def run_only_broken(x):
    broken[(1,)](x)

@declare(n=Range(16, 16))
def only_fails(n):
    return Call(run_only_broken, torch.empty(n, device="cuda"))

good, bad, worst = Recipe("good", [twice]), Recipe("bad", [fails]), Recipe("worst", [only_fails])
'''


MISSES = json.dumps(
    {"aot-cache miss": 1, "kind": "load", "name": "f", "in_capture": False, "sealed": True, "action": "fallback"}
    | {"why": "", "pid": 1, "seen": 1}
)


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document on stdout."""
        return json.loads(self.out)


Run = Callable[..., Said]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`aot-cache ARGUMENTS` in an empty folder of a machine without a GPU; also what children print is caught."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(native_gpu, "gpu_here", lambda: False)
    monkeypatch.setattr(terminal.Progress, "FIRST", HANGS)  # however slow the machine is

    def call(*arguments: object) -> Said:
        capfd.readouterr()
        code = main([str(a) for a in arguments])
        return Said(code, *capfd.readouterr())

    return call


def assert_error(said: Said, *words: str, code: int = 3) -> None:
    """A mistake is one line on stderr, another one with a hint, and no traceback."""
    assert said.code == code, said
    error, *hint = said.err.splitlines()
    assert error.startswith("error: ") and [line[:6] for line in hint] in ([], ["hint: "]), said.err
    assert all(word in said.err for word in words), said.err


@pytest.fixture
def real(tmp_path: Path) -> Run:
    """`aot-cache ARGUMENTS` in a process of its own, in a folder with the recipes."""
    (tmp_path / "tiny.py").write_text(RECIPES)

    def call(*arguments: str) -> Said:
        done = command(tmp_path, *arguments)
        return Said(done.returncode, done.stdout, done.stderr)

    return call


class Sample(NamedTuple):
    """A bundle that was built by the command line, once for all tests."""

    bundle: Path
    plan: Path
    said: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Sample:
    folder = tmp_path_factory.mktemp("sample")
    (folder / "tiny.py").write_text(RECIPES)
    said = command(folder, "build", "--model", "tiny:good")
    bundle = folder / "artifacts" / "bundles" / "good-h200.safetensors"
    return Sample(bundle, bundle.with_suffix(".plan.json"), said)


def command(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`aot-cache ARGUMENTS` as users run it, in a process of its own; without lines of progress."""
    done = subprocess.run(
        [sys.executable, "-m", "aot_cache", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    done.stderr = without_progress(done.stderr)
    return done


def host(monkeypatch: pytest.MonkeyPatch, *parts: Part) -> None:
    """Have the runtime find these parts."""
    fake = ModuleType("aot_cache.runtime.host_check")
    fake.parts = lambda manifest, **_: list(parts)  # type: ignore[attr-defined]
    fake.graph_parts = lambda manifest: []  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aot_cache.runtime.host_check", fake)


FITS = Part("triton", "3.7.1", "3.7.1")
COSTS = Part("gpu name", "NVIDIA H200", "NVIDIA H100", needed=False)
MISFIT = Part("arch", "90", "80")


# --- build ------------------------------------------------------------------------------------------------------------


def test_a_build_ends_with_what_a_dockerfile_needs(sample: Sample) -> None:
    said = sample.said
    assert (said.returncode, said.stderr) == (0, "")  # no bars where stderr is no terminal
    digest = read_bundle(sample.bundle).digest
    lines = said.stdout.splitlines()
    assert lines[0].startswith("target: h200 (the default where no GPU is found; choose with --target")
    there = "/opt/aot-cache/good-h200.safetensors"
    assert lines[-3:] == [
        f"Dockerfile: COPY artifacts/bundles/good-h200.safetensors {there}",
        f"Dockerfile: ENV AOT_CACHE={there} AOT_CACHE_DIGEST={digest}",
        "server: import aot_cache.auto  # before the model",
    ]
    (row,) = [line.split() for line in lines if line.startswith("h200 ")]
    assert any(line.split()[:2] == ["target", "specializations"] for line in lines), "as inspect calls them"
    size = f"{sample.bundle.stat().st_size / 1000:.1f}"
    assert row[:-1] == ["h200", "2", "0", "2", "0", "0", size, "kB", "3", "of", "3", "enumerated", "3", "points"]
    assert f"digest: {digest}" in lines
    assert "enumerated 3 points" in said.stdout and "compiled now" in said.stdout


def test_a_build_again_has_nothing_to_do(real: Run, tmp_path: Path) -> None:
    first = real("build", "--model", "tiny:good", "--range", "n=16", "--out", "a.safetensors", "--json")
    assert (first.code, first.err) == (0, "")
    (built,) = first.document["bundles"]
    assert (built["points"], built["units"], built["compiled"], built["nothing_to_do"]) == (1, 1, 1, False)
    assert Path(built["path"]) == tmp_path / "a.safetensors"
    again = real("build", "--model", "tiny:good", "--range", "n = 16", "--out", "a.safetensors")
    assert "nothing to do" in again.out
    assert built["digest"] in again.out


def test_a_kernel_that_fails_is_named_and_the_rest_kept(real: Run, run: Run) -> None:
    said = real("build", "--model", "tiny:bad", "--target", "h200")
    assert_error(said, "failed (h200: tiny:broken)", code=4)
    assert "0 of 1" in said.out and "not proved: 1 failed" in said.out
    assert "h200: failed: tiny:broken: CompilationError" in said.out and "no_such_name" in said.out
    found = run("verify", "artifacts/bundles/bad-h200.safetensors", "--json")
    assert found.code == 32
    assert "tiny:broken" in found.document["findings"][0]["what"]
    assert "no, 1 failed" in run("inspect", "artifacts/bundles/bad-h200.safetensors").out
    assert not any(line.startswith(("Dockerfile", "server")) for line in said.out.splitlines()), "nothing to put there"
    assert "bundle: " in said.out


def test_a_build_of_which_all_failed_leaves_what_was_there(real: Run, tmp_path: Path) -> None:
    whole = real("build", "--model", "tiny:good", "--out", "b.safetensors")
    before = (tmp_path / "b.safetensors").read_bytes()
    said = real("build", "--model", "tiny:worst", "--target", "h200", "--out", "b.safetensors")
    assert (whole.code, said.code) == (0, 4)
    assert "h200: FAILED: nothing could be built" in said.out and "b.safetensors is unchanged" in said.out
    assert (tmp_path / "b.safetensors").read_bytes() == before
    facts = real("build", "--model", "tiny:worst", "--target", "h200", "--out", "b.safetensors", "--json").document
    (built,) = facts["bundles"]
    assert (built["written"], built["digest"], built["dockerfile"], len(built["failed"])) == (False, "", [], 1)


def test_a_build_of_nothing(real: Run, tmp_path: Path) -> None:
    said = real("build", "--model", "tiny:good", "--target", "cpu")
    assert_error(
        said, "good launches no Triton kernel and calls no compiled function for cpu", "name one with --target"
    )
    assert not list(tmp_path.rglob("*.safetensors"))


def test_what_is_narrower_or_wider_does_not_take_the_place_of_the_whole(real: Run, tmp_path: Path) -> None:
    (tmp_path / "misses.json").write_text(MISSES)
    names = {
        path: Path(real("build", "--model", "tiny:good", "--json", *path.split()).document["bundles"][0]["path"]).name
        for path in ("", "--range n=16", "--range n=15,16", "--ranks 2", "--misses misses.json")
    }
    assert names[""] == "good-h200.safetensors" and names["--range n=16"] == "good-range.n=16-h200.safetensors"
    assert names["--ranks 2"] == "good-ranks=2-h200.safetensors"
    assert len(set(names.values())) == 5, names
    plan = "artifacts/bundles/good-range.n=16-h200.plan.json"
    built = real("build", "--plan", plan, "--json").document["bundles"][0]
    assert Path(built["path"]).name == "good-range.n=16-h200.safetensors", "it is this one's, and not the whole one's"


def test_the_plan_can_be_seen_without_compiling(real: Run, tmp_path: Path) -> None:
    (plan,) = real("build", "--model", "tiny:good", "--show-plan", "--json").document["plans"]
    assert (plan["units"], plan["points"], plan["coverage"]) == (2, 3, "enumerated 3 points")
    assert plan["kernels"][0]["kernel"] == "tiny:scale"
    assert plan["kernels"][0]["reached"] == {"twice": [{"n": "15..17"}]}
    assert plan["cases"][0]["doc"] == "Twice as much."
    said = real("build", "--model", "tiny:good", "--show-plan").out
    assert "case:      twice: n=15..17 (3 points, inference): Twice as much.\n" in said
    assert [line.split() for line in said.splitlines() if line.startswith("twice ")] in (
        [["twice", "tiny:scale", "k1", "│", "k2"]],
        [["twice", "tiny:scale", "k2", "│", "k1"]],
    )
    reached = "tiny:scale: 2 specializations, 1 config, no choice\n  reached by twice: n 15..17\n"
    assert said.endswith(f"\n\n{reached}\n") and said.count("tiny:scale") == 2, "in the grid, and in full"
    assert not (tmp_path / "artifacts").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [("--model tiny:good --range m=1..2", ["'m'", "known: n"]), ("--model nowhere:x", ["nowhere"])],
)
def test_a_mistake_that_the_worker_finds(real: Run, arguments: str, words: list[str]) -> None:
    said = real("build", *arguments.split(), "--json")
    assert_error(said, *words)
    assert list(said.document) == ["error"]


class Pipeline:
    """Stands in for `pipeline.build`: notes what is asked for."""

    def __init__(self) -> None:
        self.asked: list[Request] = []

    def __call__(self, request: Request, progress: Callable[[str, int, int], None]) -> Built:
        self.asked.append(request)
        progress("trace", 1, 1)
        if request.target.id == "b200":
            raise StoreUnwritable("cannot write there: no space")
        path = Path("b.safetensors")
        return a_built(target=request.target.id, path=path, sampled=["twice.n"])


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    made = Pipeline()
    monkeypatch.setattr(pipeline, "build", made)
    return made


def test_a_plan_is_built_for_its_own_target(run: Run, sample: Sample, stub: Pipeline) -> None:
    plan = Plan.read(sample.plan)
    plan = replace(plan, target="a100")
    plan.write(Path("recorded.plan.json"))
    said = run("build", "--plan", "recorded.plan.json")
    assert said.out.startswith("target: a100 (the plan's; choose with --target")
    (asked,) = stub.asked
    assert (asked.target.id, asked.plans, asked.model) == ("a100", (Path("recorded.plan.json"),), None)


def test_every_option_arrives(run: Run, stub: Pipeline) -> None:
    options = "--target h200 --target a100 --target h200 --range n=1..4/2 --range m=8 --store S --line-info --workers 3"
    said = run("build", "--model", "tiny:good", *options.split(), "--python", "p1", "--python", "p2", "--json")
    assert said.code == 0
    assert [r.target.id for r in stub.asked] == ["h200", "a100"]
    asked = stub.asked[1]
    assert (asked.ranges, asked.store, asked.out) == ({"n": "1..4/2", "m": "8"}, Path("S"), None)
    assert (asked.line_info, asked.workers, asked.pythons) == (True, 3, ("p1", "p2"))


def test_releases_that_nobody_tested_are_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    doubt = "never tested with torch 9.9.0 × triton 9.9.0 × transformers 9.9.0 (tested there: none)"

    def build(request: Request, progress: Callable[[str, int, int], None]) -> Built:
        return a_built(target=request.target.id, untested=doubt)

    monkeypatch.setattr(pipeline, "build", build)
    said = run("build", "--model", "tiny:good", "--target", "h200", "--target", "a100")
    assert [line for line in said.out.splitlines() if "never tested" in line] == [f"warning: {doubt}"]
    said = run("build", "--model", "tiny:good", "--target", "h200", "--json")
    assert json.loads(said.out)["bundles"][0]["untested"] == doubt


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        (Inputs(packages={"torch": "", "transformers": ""}), True),
        (Inputs(packages={"torch": ""}, files={"/a/transformers/__init__.py": ""}), True),
        (Inputs(packages={"torch": ""}, files={"/a/my_transformers/__init__.py": "", "/transformers/x.py": ""}), False),
        (Inputs(), False),
    ],
)
def test_transformers_counts_where_the_recipe_imported_it(inputs: Inputs, found: bool) -> None:
    assert pipeline._imported("transformers", inputs) is found


STRANGE_MISS = {
    **MISS,
    "why": "no graph\x1b[31m of it",
    "points": {"decode": {"batch": 600}},
    "declare": "decode: batch=Range(1, 600)",
}


def test_misses_go_with_a_model(run: Run, stub: Pipeline, sample: Sample) -> None:
    Path("m").write_text(json.dumps(STRANGE_MISS))
    assert run("build", "--model", "tiny:good", "--misses", "m", "--misses", "m").code == 0
    assert stub.asked[0].misses == (Path("m"), Path("m"))
    assert run("build", "--plan", sample.plan, "--misses", "m").code == 0
    assert (stub.asked[1].model, stub.asked[1].plans, stub.asked[1].misses) == (None, (sample.plan,), (Path("m"),))


def test_plans_go_with_a_model_and_each_other(run: Run, stub: Pipeline, sample: Sample) -> None:
    assert run("build", "--model", "tiny:good", "--plan", sample.plan, "--plan", sample.plan).code == 0
    assert (stub.asked[0].model, stub.asked[0].plans) == ("tiny:good", (sample.plan, sample.plan))


def test_what_became_of_misses_is_said(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"kind": "graph", "name": "m:layer", "asked": "x 600×16", "count": 12, "why": "no case\x1b calls it"}
    misses = {"given": 3, "covered": 2, "uncovered": [row], "cut_off": 1}
    built = a_built(misses=misses)
    monkeypatch.setattr(pipeline, "build", lambda *_: built)
    said = run("build", "--model", "tiny:good")
    assert "h200: misses: 2 of 3 covered\n" in said.out and "a killed process: 1\n" in said.out
    assert "h200: not covered: graph m:layer (12 times, x 600×16): no case? calls it\n" in said.out
    assert run("build", "--model", "tiny:good", "--json").document["bundles"][0]["misses"] == misses


def test_what_was_built_before_an_error_is_said(run: Run, stub: Pipeline) -> None:
    arguments = ("build", "--model", "tiny:good", "--target", "h200", "--target", "b200")
    said = run(*arguments)
    assert_error(said, "no space")
    assert "sampled: twice.n" in said.out and "AOT_CACHE_DIGEST" in said.out
    assert [b["target"] for b in run(*arguments, "--json").document["bundles"]] == ["h200"]
    nothing = run(*arguments[:3], "--target", "b200", "--json")
    assert (nothing.code, list(nothing.document), nothing.document["error"]["type"]) == (
        3,
        ["error"],
        "StoreUnwritable",
    )


def test_control_c_ends_with_130(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time; print('up', flush=True); time.sleep(60)")
    process = subprocess.Popen(
        [sys.executable, "-m", "aot_cache", "build", "--model", "slow:x"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "AOT_CACHE_DEBUG": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert "up\n" in iter(process.stderr.readline, "")  # the worker runs, and would for long
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    assert err.splitlines()[-2:] == ["error: interrupted", "hint: run it again to continue: what is done is kept"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["--model", "--plan"]),
        ("--model tiny:good --plan x", ["plan x", "No such file"]),
        ("--model no-such-model", ["no-such-model"]),
        ("--model tiny:good --target h2000", ["h2000", "did you mean 'h200'"]),
        ("--model tiny:good --target h200 --target a100 --out x", ["--out", "2 targets"]),
        ("--model tiny:good --range n", ["'n'", "--range tokens=1..64"]),
        ("--model tiny:good --range =3", ["'=3'"]),
        ("--model tiny:good --range n=", ["n="]),
        ("--model tiny:good --range n=1-4", ["n=1-4", "'1-4'"]),
        ("--model tiny:good --range n=5..1", ["n=5..1", "has no value"]),
        ("--model tiny:good --range n=1 --range n=2", ["'n'", "two ranges"]),
        ("--plan no.json", ["no.json", "No such file"]),
        ("--plan tiny.py", ["tiny.py", "not JSON"]),
        ("--plan no.json --range n=1", ["--range", "--model"]),
        ("--plan no.json --misses m", ["no.json", "No such file"]),
        ("--model tiny:good --misses m", ["misses file m: ", "No such file"]),
        ("--model tiny:good --misses tiny.py", ["tiny.py, line 2", "not JSON"]),
    ],
)
def test_a_mistake_is_found_before_anything_starts(
    run: Run, stub: Pipeline, tmp_path: Path, arguments: str, words: list[str]
) -> None:
    (tmp_path / "tiny.py").write_text(RECIPES)
    said = run("build", *arguments.split())
    assert_error(said, *words)
    assert (said.out, stub.asked) == ("", [])


# --- the machine's own GPU --------------------------------------------------------------------------------------------

NATIVE = replace(targets.get("h200"), memory_bytes=1, measured=True)


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_gpu, "native", lambda: (NATIVE, [Difference("memory_bytes", 2, 1)]))


@pytest.mark.usefixtures("native")
def test_native_says_where_the_device_differs(run: Run, stub: Pipeline) -> None:
    said = run("build", "--model", "tiny:good", "--target", "native")
    assert said.out.startswith(
        "target: h200 (as requested)\nnative: memory_bytes is 1 on this h200, but 2 in the table\n"
    )
    assert stub.asked[0].target is NATIVE
    facts = run("build", "--model", "tiny:good", "--target", "native", "--json").document
    assert facts["differences"] == [{"target": "h200", "field": "memory_bytes", "table": 2, "device": 1}]


@pytest.mark.usefixtures("native")
def test_a_gpu_that_is_here_is_the_default(run: Run, stub: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_gpu, "gpu_here", lambda: True)
    assert run("build", "--model", "tiny:good").out.startswith("target: h200 (this machine's GPU; choose with --target")
    assert stub.asked[0].target is NATIVE


def test_a_gpu_that_cannot_be_used_is_said(run: Run, stub: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    def unusable() -> None:
        raise TargetError("this machine's GPU cannot be used: torch 2.13 finds none")

    monkeypatch.setattr(native_gpu, "gpu_here", lambda: True)
    monkeypatch.setattr(native_gpu, "native", unusable)
    said = run("build", "--model", "tiny:good")
    assert said.out.startswith(
        "target: h200 (the default, because this machine's GPU cannot be used: torch 2.13 finds none;"
    )
    assert_error(run("build", "--model", "tiny:good", "--target", "native"), "finds none")


@pytest.mark.parametrize(
    ("devices", "environment", "here"),
    [
        ([], {}, False),
        (["nvidiactl"], {}, False),
        (["nvidia0"], {}, True),
        (["nvidia3"], {"CUDA_VISIBLE_DEVICES": "0"}, True),
        (["nvidia0"], {"CUDA_VISIBLE_DEVICES": ""}, False),
        (["nvidia0"], {"CUDA_VISIBLE_DEVICES": "-1"}, False),
        (["kfd"], {}, True),
        (["kfd"], {"HIP_VISIBLE_DEVICES": ""}, False),
        (["kfd"], {"CUDA_VISIBLE_DEVICES": ""}, False),
    ],
)
def test_a_gpu_is_seen_without_torch(
    tmp_path: Path, devices: list[str], environment: dict[str, str], here: bool
) -> None:
    for name in devices:
        (tmp_path / name).touch()
    assert native_gpu.gpu_here(tmp_path, environment) is here


# --- looking ----------------------------------------------------------------------------------------------------------


def test_inspecting_a_bundle(run: Run, sample: Sample) -> None:
    said = run("inspect", sample.bundle)
    assert (said.code, said.err) == (0, "")
    for words in ("good (traced)", "h200, NVIDIA H200", read_bundle(sample.bundle).digest, "enumerated 3 points"):
        assert words in said.out
    assert "tiny:scale" in said.out and "toolkit" not in said.out


def test_inspecting_a_kernel(run: Run, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sample.bundle.parents[2])  # where the recipe's source is: names come from it
    said = run("inspect", sample.bundle, "--kernel", "scal")
    assert "x:*fp32:16 y:*fp32:16 n:i32:16 BLOCK=64 num_warps=2" in said.out
    assert "reached by twice: n 15,17" in said.out
    assert "bytes of shared memory, key " in said.out and "toolkit = " in said.out
    facts = run("inspect", sample.bundle, "--kernel", "scal", "--json").document
    assert {s["signature"].split()[2] for s in facts["specializations"]} == {"n:i32", "n:i32:16"}
    assert_error(run("inspect", sample.bundle, "--kernel", "nope"), "'nope'", "tiny:scale")


def test_inspecting_shows_which_sizes_are_served(run: Run, sample: Sample) -> None:
    lines = run("inspect", sample.bundle).out.splitlines()
    (row,) = [line for line in lines if line.startswith("twice ")]
    assert row.split() == ["twice", "tiny:scale", *row.split()[2:]]
    assert sorted(row.split()[2:]) == ["k1", "k2", "│"]
    head = next(line for line in lines if line.startswith("case ") and "function or kernel" in line)
    assert head.split()[-3:] == ["15,17", "│", "16"] and any(line.startswith("kernels ") for line in lines)


def ledger(bundle: Path, **more: Any) -> str:
    """What `aot_cache.stats()` gives in a process that loaded a bundle."""
    counts = {"compile": 1, "gcc": 0}
    report = {"digest": read_bundle(bundle).digest, "units": 2, "primed": 2, "stale": {}, "pending": []}
    missed = {"kind": "kernel", "name": "tiny:scale", "in_capture": True, "why": "n is another"}
    stats = {"sealed": True, "total": counts, "in_capture": counts, "after_seal": counts}
    return json.dumps({**stats, "bundles": [report], "graphs": [], "misses": [missed], **more})


def test_a_ledger_in_the_grid(run: Run, sample: Sample) -> None:
    Path("stats.json").write_text(ledger(sample.bundle))
    said = run("inspect", sample.bundle, "--ledger", "stats.json")
    assert (said.code, said.err) == (0, "")
    (row,) = [line for line in said.out.splitlines() if line.startswith("twice ")]
    assert row.endswith("  loaded, missed 1") and "loaded:    2 of 2 specializations" in said.out
    facts = run("inspect", sample.bundle, "--ledger", "stats.json", "--json").document
    assert facts["ledger"]["events"] == [{"kind": "compile", "total": 1, "in_capture": 1, "after_seal": 1}]
    Path("none.json").write_text(ledger(sample.bundle, bundles=[]))
    assert_error(run("inspect", sample.bundle, "--ledger", "none.json"), "none.json", "found none")
    assert_error(run("inspect", sample.bundle, "--ledger", "nowhere"), "nowhere")
    assert_error(run("inspect", sample.plan, "--ledger", "stats.json"), "found a plan")


def test_a_page(run: Run, sample: Sample) -> None:
    Path("page.html").write_text("an older one")
    said = run("inspect", sample.bundle, "--html", "page.html")
    assert (said.code, said.err, said.out) == (0, "", f"page: {Path('page.html').absolute()}\n")
    text = Path("page.html").read_text()
    assert read_bundle(sample.bundle).digest in text and 'data-units="k1"' in text and text.endswith("</html>\n")
    assert run("inspect", sample.plan, "--html", "new/plan.html").code == 0 and Path("new/plan.html").is_file()
    facts = run("inspect", sample.bundle, "--html", "page.html", "--json").document
    assert facts == run("inspect", sample.bundle, "--points", "--json").document


def test_a_page_that_cannot_be_written(run: Run, sample: Sample) -> None:
    Path("file").touch()
    assert_error(run("inspect", sample.bundle, "--html", "file/page.html"), "file/page.html")
    Path("folder").mkdir()
    assert_error(run("inspect", sample.bundle, "--html", "folder"), "folder")
    assert sorted(path.name for path in Path().iterdir()) == ["file", "folder"], "nothing is left behind"
    Path("m").write_text(json.dumps(STRANGE_MISS))
    assert_error(run("inspect", "--misses", "m", "--html", "page.html"), "--html")


def test_inspecting_a_plan(run: Run, sample: Sample) -> None:
    facts = run("inspect", sample.plan, "--points", "--json").document
    assert (facts["kind"], facts["units"], len(facts["specializations"])) == ("plan", 2, 2)
    assert "tiny:scale" in run("inspect", sample.plan, "--points").out


def test_inspecting_misses(run: Run, sample: Sample) -> None:
    Path("m").write_text(
        json.dumps(STRANGE_MISS)
        + "\n"
        + json.dumps({**STRANGE_MISS, "pid": 2, "seen": 3})
        + "\n"
        + json.dumps(STRANGE_MISS)[:30]
    )
    said = run("inspect", "--misses", "m")
    assert (said.code, said.err) == (0, "")
    (row,) = [line.split() for line in said.out.splitlines() if "m:layer" in line]
    assert row[:2] == ["graph", "m:layer"] and "15" in row and " ".join(row[-2:]).endswith("batch=Range(1, 600)")
    assert "\x1b" not in said.out and "a killed process: 1\n" in said.out
    facts = run("inspect", "--misses", "m", "--json").document
    assert (facts["kind"], facts["different"], facts["count"], facts["cut_off"]) == ("misses", 1, 15, 1)
    assert facts["misses"][0]["points"] == {"decode": {"batch": 600}}
    assert_error(run("inspect"), "neither")
    assert_error(run("inspect", sample.bundle, "--misses", "m"), "both")
    assert_error(run("inspect", "--misses", "m", "--points"), "--points")
    assert_error(run("inspect", "--misses", sample.plan), "line 2, is not a miss")


def test_a_file_that_is_neither(run: Run, tmp_path: Path) -> None:
    Path("empty").write_bytes(b"")
    Path("list.json").write_text("[1]")
    Path("other.json").write_text('{"a": 1}')
    # A bundle whose header has 123 bytes begins with the byte of "{".
    Path("brace").write_bytes(b"{" + bytes(7) + b"x" * 200)
    assert_error(run("inspect", "nowhere"), "nowhere")
    assert_error(run("inspect", "."), "folder", code=8)
    assert_error(run("inspect", "empty"), "empty", code=8)
    assert_error(run("inspect", "list.json"), "list.json", code=8)
    assert_error(run("inspect", "other.json"), "found none")
    assert_error(run("inspect", "brace"), "brace", "header", code=8)


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ("build --model tiny:goood", "good"),
        ("build --model tinny:good", "tiny"),
        ("build --model tiny:good --range nn=16", "n"),
        ("build --model tiny:good --target h20", "h200"),
        ("build --model qwen3.5-tinny", "qwen3.5-tiny"),
        ("build --model qwen3.5-tiny --option speec=mtp", "spec"),
        ("build --model qwen3.5-tiny --spec mpt", "mtp"),
        ("build --model qwen3.5-tiny --dtype bfloat61", "bfloat16"),
        ("inspekt nowhere", "inspect"),
    ],
)
def test_what_is_misspelt_is_told_what_may_be_meant(real: Run, arguments: str, meant: str) -> None:
    said = real(*arguments.split())
    assert said.code in (2, 3) and said.err.count("\n") == 2
    assert f"did you mean '{meant}'?" in said.err.lower(), said.err


def test_inspecting_what_is_corrupt_says_so(run: Run, sample: Sample) -> None:
    """Wherever the byte is: in the header, in a binary that only a server reads, at the end."""
    data = sample.bundle.read_bytes()
    for at in (20, len(data) // 2, len(data) - 1):
        bad = bytearray(data)
        bad[at] ^= 1
        Path("bad.safetensors").write_bytes(bad)
        assert_error(run("inspect", "bad.safetensors"), "error: bundle bad.safetensors is damaged: ", code=8)
    Path("bad.safetensors").write_bytes(data[:300])
    assert_error(
        run("inspect", "bad.safetensors"), "error: bundle bad.safetensors is damaged: ", "the file has 300", code=8
    )


def test_verifying(run: Run, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, FITS, COSTS)
    assert run("verify", sample.bundle) == Said(0, "ok\n", "")
    host(monkeypatch, FITS, MISFIT)
    said = run("verify", sample.bundle, "--digest", "0" * 64)
    assert (said.code, said.err, said.out.count("\n")) == (8 | 16, "", 2)
    assert "arch: the bundle is for 90, this host has 80" in said.out
    facts = run("verify", sample.bundle, "--json").document
    assert (facts["exit_code"], [f["code"] for f in facts["findings"]]) == (16, [16])


def test_verifying_what_is_damaged(run: Run, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = read_bundle(sample.bundle)
    objects = {name: bytes(bundle.object(name)) for name in bundle.manifest["objects"]}
    write_bundle("bad", bundle.manifest | {"complete": False}, objects)
    data = bytearray(Path("bad").read_bytes())
    data[-1] ^= 1
    Path("bad").write_bytes(data)
    host(monkeypatch, MISFIT)
    assert run("verify", "bad").code == 8 | 16 | 32
    Path("bad").write_bytes(data[:-1])
    said = run("verify", "bad", "--json")
    assert (said.code, said.document["digest"]) == (8, None)
    assert_error(run("verify", "nowhere"), "nowhere")


def test_verifying_on_this_host(run: Run, sample: Sample) -> None:
    """With the real comparison: what was built here by this Triton fits here."""
    assert run("verify", sample.bundle) == Said(0, "ok\n", "")
    assert "this bundle loads here" in run("explain", sample.bundle).out


def test_explaining(run: Run, sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    host(monkeypatch, FITS, COSTS, MISFIT)
    said = run("explain", sample.bundle)
    assert said.code == 0
    rows = [line.split() for line in said.out.splitlines() if line.startswith(("triton", "gpu", "arch"))]
    assert [row[-1] for row in rows] == ["ok", "costs", "differs"]
    assert not run("explain", sample.bundle, "--json").document["loads"]
    assert_error(run("explain", "nowhere"), "nowhere")


def test_comparing(run: Run, sample: Sample) -> None:
    assert run("diff", sample.plan, sample.bundle) == Said(0, "the same is launched by both\n", "")
    plan = Plan.read(sample.plan)
    *units, gone = plan.units
    replace(plan, units=units).write(Path("less.json"))
    said = run("diff", sample.bundle, "less.json")
    assert (said.code, said.err) == (1, "")
    assert said.out.startswith("only left: 1 specialization\n")
    assert f"only in {sample.bundle}:" in said.out and gone.kernel in said.out
    assert "only in less.json" not in said.out
    facts = run("diff", "less.json", sample.plan, "--json").document
    assert (facts["same"], len(facts["only_right"]["units"])) == (False, 1)
    assert_error(run("diff", sample.plan, "nowhere"), "nowhere")


def test_the_table_of_targets(run: Run) -> None:
    said = run("targets")
    assert (
        "NVIDIA H200" in said.out and "h100: limits per SM" in said.out and "h200: all read from a device" in said.out
    )
    assert [row["id"] for row in run("targets", "--json").document["targets"]] == list(targets.TARGETS)


def test_the_installed_models(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aot_cache.recipes.declare.names", lambda: {"b": "x:y", "a": "m:r"})
    assert run("models", "--json").document == {"models": {"a": "m:r", "b": "x:y"}}
    assert "m:r" in run("models").out
    monkeypatch.setattr("aot_cache.recipes.declare.names", dict)
    assert "no recipe is installed" in run("models").out


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "exit_code"), [(0, 0), (7, 7), (-9, 137)])
def test_recording(run: Run, sample: Sample, monkeypatch: pytest.MonkeyPatch, code: int, exit_code: int) -> None:
    asked: list[Any] = []
    fake = ModuleType("aot_cache.runtime.record")

    def run_command(*given: Any) -> tuple[int, Plan]:
        asked.append(given)
        return code, Plan.read(sample.plan)

    fake.run_command, fake.CANDIDATES = run_command, ("launched", "all", "chosen")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aot_cache.runtime.record", fake)
    said = run("record", "--out", "day/seen.plan.json", "--", "python", "serve.py", "--json", "--out", "x")
    assert asked == [(["python", "serve.py", "--json", "--out", "x"], Path("day/seen.plan.json"), "seen", "launched")]
    assert (said.code, said.out) == (exit_code, "")  # stdout is the program's
    assert "2 specializations of 1 kernels" in said.err
    run("record", "--out", "p", "--recipe-name", "mine", "true")
    assert asked[-1] == (["true"], Path("p"), "mine", "launched")
    run("record", "--out", "p", "--candidates", "all", "true")
    assert asked[-1] == (["true"], Path("p"), "p", "all")
    assert_error(run("record", "--out", "p", "--candidates", "some", "true"), "launched, all, chosen", "'some'")


def test_tuning(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    fake = ModuleType("aot_cache.tuning.kernels")

    def tune(path: Path, out: Path, **more: Any) -> dict[str, Any]:
        more.pop("progress")("measure", 1, 2)
        asked.append((path, out, more))
        return {"digest": "d", "device": {"name": "NVIDIA H200"}, "measured": 3}

    fake.tune = tune  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "aot_cache.tuning.kernels", fake)
    said = run("tune", "a", "--out", "b", "--prune", "--points", "5")
    assert (said.code, said.err) == (0, "")
    assert asked == [(Path("a"), Path("b"), {"prune": True, "points": 5})]
    assert "NVIDIA H200" in said.out
    assert run("tune", "a", "--out", "b", "--json").document["measured"] == 3


# --- the command itself -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    ["frobnicate", "build --frobnicate", "build --workers 0", "build --workers x", "record --out x", "diff a"],
)
def test_what_is_not_understood_is_an_error_and_a_hint(run: Run, arguments: str) -> None:
    assert_error(run(*arguments.split()), code=2)


def test_help_names_every_command(run: Run) -> None:
    said = run()
    assert said.code == 0
    assert all(
        name in said.out for name in "build rehearse inspect verify explain targets record diff tune models".split()
    )
    assert run("build", "--help").code == 0


def test_looking_imports_no_torch(sample: Sample) -> None:
    code = (
        "import sys; from aot_cache.cli.main import main\n"
        f"bundle, plan = {str(sample.bundle)!r}, {str(sample.plan)!r}\n"
        "commands = ['inspect', bundle], ['diff', plan, bundle], ['targets'], ['build', '--model', 'x'], "
        "['verify', bundle]\n"
        "codes = [main(c) for c in commands]\n"
        "print(codes, *[m for m in ('torch', 'triton', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 3, 0]", done.stderr
