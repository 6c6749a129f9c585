"""aot_cache.builder from outside: what a build compiles again, the same bytes twice, and bad input. Builds are real ones."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS
from one_module import built_for_h200

from aot_cache.artifact import manifest
from aot_cache.artifact import target as targets
from aot_cache.artifact.key import UNITS
from aot_cache.artifact.plan import CallPlan, Plan
from aot_cache.builder import fingerprint, fork_map, pipeline, virtual_gpu
from aot_cache.builder.fingerprint import Inputs
from aot_cache.builder.pipeline import Built, Request
from aot_cache.builder.worker_pool import WorkerPool
from aot_cache.errors import (
    AotCacheError,
    DeclarationError,
    StoreChanged,
    StoreUnwritable,
    TargetError,
    TraceError,
    UnknownName,
)
from aot_cache.store import bundles_in, read_bundle, signature
from aot_cache.store.objects import LAYOUT

ROOT = Path(__file__).parents[1]

KERNELS = """
import triton
import triton.language as tl

@triton.jit
def inner(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0)

@triton.jit
def outer(x, BLOCK: tl.constexpr):
    inner(x, BLOCK)
    inner(x + BLOCK, BLOCK)

@triton.jit
def alone(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 3.0)

@triton.jit
def given(value):
    return value + 5.0

@triton.jit
def takes(x, FUNCTION: tl.constexpr, BLOCK: tl.constexpr):
    at = x + tl.arange(0, BLOCK)
    tl.store(at, FUNCTION(tl.load(at)))

@triton.autotune([triton.Config({"BLOCK": 16}, num_warps=1), triton.Config({"BLOCK": 32}, num_warps=2)], key=["n"])
@triton.jit
def tuned(x, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)

def make():
    @triton.jit
    def made(x, BLOCK: tl.constexpr):
        tl.store(x + tl.arange(0, BLOCK), 4.0)
    return made
"""

RECIPE = """
import torch
from aot_cache import Call, Range, Recipe, declare

import {kernels} as kernels

def host(n):
    x = torch.empty(64, device="cuda")
    kernels.inner[(1,)](x, BLOCK=16)
    kernels.outer[(1,)](x, BLOCK=16)
    kernels.alone[(1,)](x, BLOCK=16)
    kernels.takes[(1,)](x, kernels.given, BLOCK=16)
    kernels.tuned[(1,)](x, n)
    kernels.make()[(1,)](x, BLOCK=16)

@declare(n=Range(1, 17))
def case(n):
    return Call(host, n)

recipe = Recipe("project", [case])
"""


SMALL = """
import torch
from aot_cache import Call, Recipe, Values, declare
import {kernels} as kernels

def host(n):
    x = torch.empty(64, device="cuda")
    kernels.inner[(1,)](x, BLOCK=16)
    kernels.alone[(1,)](x, BLOCK=16)

@declare(n=Values(1))
def case(n):
    return Call(host, n)

recipe = Recipe("project", [case])
"""


@dataclass
class Project:
    """A folder with a recipe and its kernels, to be built by a worker that runs there."""

    folder: Path
    store: Path
    name: str = "project"

    @classmethod
    def at(cls, folder: Path, kernels: str = KERNELS, recipe: str = RECIPE) -> Project:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "project_kernels.py").write_text(kernels)
        (folder / "project.py").write_text(recipe.format(kernels="project_kernels"))
        return cls(folder, folder / "store")

    @property
    def kernels(self) -> Path:
        return self.folder / "project_kernels.py"

    def build(self, progress: Any = lambda *_: None, environment: dict[str, str] | None = None, **more: Any) -> Built:
        request = {
            "target": targets.get("h200"),
            "store": self.store,
            "model": f"{self.name}:recipe",
            "workers": 2,
            **more,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            patch.setenv("PYTHONPATH", str(ROOT))
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            return pipeline.build(Request(**request), progress)

    def snapshot(self, built: Built) -> dict[str, set[str]]:
        """Kernel → the store's keys of its units."""
        whole = manifest.whole(read_bundle(built.path, built.digest)).to_json()
        out: dict[str, set[str]] = {}
        for unit in whole["units"]:
            name = whole["kernels"][unit["kernel"]]["name"].partition(":")[2]
            out.setdefault(name, set()).add(unit["key"])
        return out


ALL = {"inner", "outer", "alone", "takes", "tuned", "make.<locals>.made"}

# --- building again ---------------------------------------------------------------------------------------------------


COMPILED = """
import torch
from aot_cache import Call, Recipe, Values, declare, device

{decorator}
def double(x):
    return x * 2

@declare(n=Values(2))
def case(n):
    return Call(double, torch.ones(n, device=device()))

recipe = Recipe("project", [case])
"""


@pytest.mark.parametrize(("decorator", "prepared"), [("@torch.compile", 1), ("", 0)])
def test_a_worker_for_graphs_gets_ready_early_only_where_there_may_be_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decorator: str, prepared: int
) -> None:
    """It costs as much as tracing a small recipe: importing torch's compiler."""
    asked: list[str] = []
    original = WorkerPool.prepare

    def prepare(self: WorkerPool, job: Any, environment: Any) -> Any:
        asked.append(job.stage)
        return original(self, job, environment)

    monkeypatch.setattr(WorkerPool, "prepare", prepare)
    (tmp_path / "project.py").write_text(COMPILED.format(decorator=decorator))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    request = Request(target=targets.get("h200"), store=tmp_path / "store", model="project:recipe", workers=2)
    planned = pipeline.plan_only(request)
    assert asked == ["graphs"] * prepared
    assert len(planned.plan.calls) == prepared


@dataclass
class Edited:
    """One project, built again after each change."""

    project: Project
    first: Built
    same: Built
    open_to_all: Built
    without_stamp: Built
    moved: Built
    edited: Built
    keys: dict[str, dict[str, set[str]]]


@pytest.fixture(scope="module")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Edited:
    project = Project.at(tmp_path_factory.mktemp("edited"))
    keys = {}
    first = project.build()
    keys["first"] = project.snapshot(first)
    assert read_bundle(first.path).check_all() == [] and first.size == first.path.stat().st_size
    same = project.build()
    project.store.chmod(0o777)
    open_to_all = project.build()
    project.store.chmod(0o755)
    shutil.rmtree(project.store / LAYOUT / "records" / pipeline.STAMPS)
    without_stamp = project.build()
    moved_down = "\n\n# a remark\n\n" + KERNELS.replace("\n@triton.jit", "\n\n\n@triton.jit")
    project.kernels.write_text(moved_down)
    moved = project.build()
    keys["moved"] = project.snapshot(moved)
    project.kernels.write_text(moved_down.replace("1.0", "1.5").replace("5.0", "5.5"))
    changed = project.build()
    keys["edited"] = project.snapshot(changed)
    return Edited(project, first, same, open_to_all, without_stamp, moved, changed, keys)


def test_a_build(edited: Edited) -> None:
    first = edited.first
    assert not first.failed and not first.nothing_to_do and not first.sampled
    assert set(edited.keys["first"]) == ALL
    assert first.compiled == first.units == sum(map(len, edited.keys["first"].values()))
    assert first.points == 17


def test_a_build_again_has_nothing_to_do(edited: Edited) -> None:
    assert edited.same.nothing_to_do and edited.same.compiled == 0
    assert (edited.same.digest, edited.same.units, edited.same.path) == (
        edited.first.digest,
        edited.first.units,
        edited.first.path,
    )


def test_a_store_that_others_can_write_is_a_warning(edited: Edited) -> None:
    """What they put there is built into bundles, which are signed afterwards."""
    (warning,) = edited.open_to_all.warnings
    store = edited.project.store
    assert warning.startswith(f"the store {store} can have been written by others")
    assert f"everybody can write {store}" in warning and "AOT_CACHE_TRUSTED_FOLDERS" in warning
    assert edited.open_to_all.nothing_to_do and not edited.first.warnings and not edited.without_stamp.warnings


def test_a_build_without_its_stamp_compiles_nothing(edited: Edited) -> None:
    again = edited.without_stamp
    assert not again.nothing_to_do and again.compiled == 0
    assert again.digest == edited.first.digest


def test_moving_kernels_within_their_file_compiles_nothing(edited: Edited) -> None:
    assert not edited.moved.nothing_to_do, "the file did change"
    assert edited.moved.compiled == 0
    assert edited.keys["moved"] == edited.keys["first"]


def test_an_edit_recompiles_the_kernel_and_who_calls_it(edited: Edited) -> None:
    before, after = edited.keys["moved"], edited.keys["edited"]
    assert set(after) == ALL
    changed = {name for name in ALL if after[name] != before[name]}
    assert {"inner", "outer"} <= changed, "who calls it"
    assert not changed & {"alone", "tuned", "make.<locals>.made"}, "and nothing else"
    assert all(not after[name] & before[name] for name in changed)
    assert edited.edited.compiled == sum(len(after[name]) for name in changed)


def test_an_edit_recompiles_who_is_given_the_function(edited: Edited) -> None:
    """A jit function that is handed over as a constexpr is part of the code."""
    before, after = edited.keys["moved"], edited.keys["edited"]
    assert not after["takes"] & before["takes"], "`given` was edited, and the old binary would be used"


def test_a_damaged_bundle_is_built_again(edited: Edited) -> None:
    data = bytearray(edited.edited.path.read_bytes())
    data[-1] ^= 1
    edited.edited.path.write_bytes(data)
    again = edited.project.build()
    assert not again.nothing_to_do and again.compiled == 0 and again.digest == edited.edited.digest
    assert read_bundle(again.path).check_all() == []


def test_a_module_that_host_code_imports_late_is_looked_at(tmp_path: Path) -> None:
    """Models import kernels inside functions; a change of such a file is a change."""
    project = Project.at(tmp_path)
    (tmp_path / "project.py").write_text(
        "import torch\n"
        "from aot_cache import Call, Case, Recipe, Values\n"
        "def host(n):\n"
        "    import project_kernels\n"
        "    project_kernels.alone[(1,)](torch.empty(64, device='cuda'), BLOCK=16)\n"
        "recipe = Recipe('late', [Case('case', lambda n: Call(host, n), {'n': Values(3)})])\n"
    )
    first = project.build()
    assert not first.failed and first.units == 1
    project.kernels.write_text(KERNELS.replace("3.0", "3.5"))
    second = project.build()
    assert not second.nothing_to_do, "the kernel's source changed"
    assert second.compiled == 1


# --- a store that loses things ------------------------------------------------------------------------------------------


def of_store(project: Project, part: str) -> list[Path]:
    return [path for path in (project.store / LAYOUT / part).rglob("*") if path.is_file()]


def forget(project: Project, built: Built) -> None:
    """Remove the bundle and its stamp: the next build makes the bundle from the store."""
    shutil.rmtree(project.store / LAYOUT / "records" / pipeline.STAMPS)
    built.path.unlink()


def test_flipped_bits_and_swapped_records_are_mended(tmp_path: Path) -> None:
    project = Project.at(tmp_path, recipe=SMALL)
    first = project.build()
    forget(project, first)
    for path in of_store(project, "objects"):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    again = project.build()
    assert again.digest == first.digest and not again.failed
    assert read_bundle(again.path).check_all() == []

    forget(project, again)
    records = sorted(of_store(project, f"records/{UNITS}"))
    one, two = records[0].read_bytes(), records[1].read_bytes()
    assert one != two
    records[0].write_bytes(two)
    records[1].write_bytes(one)
    third = project.build()
    assert third.compiled == 2 and third.digest == first.digest


@pytest.fixture(scope="module")
def built_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Project, Built, bytes]:
    project = Project.at(tmp_path_factory.mktemp("lossy"), recipe=SMALL)
    built = project.build()
    return project, built, built.path.read_bytes()


def lossy(project: Project, part: str, change: str, most: int) -> tuple[Any, list[int]]:
    """(a progress function that changes a part of the store as soon as all is compiled, how often it did)"""
    times: list[int] = []

    def lose(stage: str, done: int, total: int) -> None:
        if stage == "compile" and done == total and len(times) < most:
            paths = of_store(project, part)
            times.append(len(paths))
            for path in paths:
                if change == "remove":
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(path.read_bytes()[:-9] + b"not these")

    return lose, times


@pytest.mark.parametrize("part", [f"records/{UNITS}", "objects"])
@pytest.mark.parametrize("change", ["remove", "damage"])
def test_what_is_lost_while_a_build_runs_is_made_again(
    built_once: tuple[Project, Built, bytes], part: str, change: str
) -> None:
    project, first, whole = built_once
    forget(project, first)
    lose, times = lossy(project, part, change, 1)
    again = project.build(progress=lose)
    assert len(times) == 1 and times[0] and not again.failed and again.units == first.units
    assert again.path.read_bytes() == whole


def test_a_store_that_loses_everything_each_time_stops_the_build(built_once: tuple[Project, Built, bytes]) -> None:
    project, first, _ = built_once
    first.path.write_bytes(b"what was there before")
    shutil.rmtree(project.store / LAYOUT / "records" / pipeline.STAMPS, ignore_errors=True)
    lose, times = lossy(project, f"records/{UNITS}", "remove", 1000)
    with pytest.raises(StoreChanged, match=r"expected .*, found") as caught:
        project.build(progress=lose)
    assert len(times) > 1 and str(project.store) in str(caught.value)
    assert first.path.read_bytes() == b"what was there before"
    assert not of_store(project, f"records/{pipeline.STAMPS}"), "the next build does not take it for done"


def test_an_incomplete_bundle_does_not_take_a_complete_one_s_place(tmp_path: Path) -> None:
    project = Project.at(tmp_path, recipe=SMALL)
    broken = KERNELS.replace("tl.store(x + tl.arange(0, BLOCK), 3.0)", "tl.static_assert(False, 'no')")
    project.kernels.write_text(broken)
    alone = project.build()
    assert alone.failed and alone.path.name == "project-h200.safetensors", "there is nothing that it could replace"
    project.kernels.write_text(KERNELS)
    good = project.build()
    whole = good.path.read_bytes()
    assert not good.failed and good.path == alone.path

    project.kernels.write_text(broken)
    bad = project.build()
    assert bad.failed and bad.digest and bad.path.name == "project-h200.incomplete.safetensors"
    assert good.path.read_bytes() == whole and read_bundle(bad.path).manifest["complete"] is False
    assert bundles_in(good.path.parent) == [good.path], "a server does not choose the other one"
    project.kernels.write_text(KERNELS.replace("3.0", "3.5"))
    for signed in (good, bad):
        signature.beside(signed.path).write_text("of what is replaced or removed")
    mended = project.build()
    assert not mended.failed and mended.path == good.path
    assert not list(good.path.parent.glob("*.incomplete.*")) and not signature.beside(good.path).exists()


# --- the same bytes ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Project, Built]]:
    """The same source, built in two places by two parents of other hash seeds."""
    out = []
    for number, seed in enumerate(("1", "2")):
        project = Project.at(tmp_path_factory.mktemp(f"twin{number}") / ("a" * (1 + 7 * number)) / "source")
        out.append((project, project.build(environment={"PYTHONHASHSEED": seed, "TMPDIR": str(project.folder)})))
    return out


def test_the_same_source_gives_the_same_bytes(twins: Sequence[tuple[Project, Built]]) -> None:
    (_, one), (_, two) = twins
    assert not one.failed and one.path != two.path
    assert one.digest == two.digest
    assert one.path.read_bytes() == two.path.read_bytes()


def test_the_same_source_gives_the_same_plan(twins: Sequence[tuple[Project, Built]]) -> None:
    (_, one), (_, two) = twins
    assert one.path.with_suffix(".plan.json").read_bytes() == two.path.with_suffix(".plan.json").read_bytes()


def test_no_path_of_this_machine_is_in_the_bundle(twins: Sequence[tuple[Project, Built]]) -> None:
    import sysconfig

    project, built = twins[0]
    data = built.path.read_bytes()
    paths = {str(project.folder), str(project.store), str(ROOT), str(Path.home()), sysconfig.get_paths()["purelib"]}
    found = [path for path in paths if len(path) > 5 and path.encode() in data]
    assert not found
    assert b"/tmp/" not in data and b"aot-cache-" not in data.replace(b"aot-cache-native", b"")


def test_objects_of_the_twins_are_the_same(twins: Sequence[tuple[Project, Built]]) -> None:
    one, two = (
        {path.name for path in (project.store / LAYOUT / "objects").rglob("*") if path.is_file()}
        for project, _ in twins
    )
    assert one == two


def test_line_info_is_a_build_of_its_own(twins: Sequence[tuple[Project, Built]]) -> None:
    project, built = twins[0]
    lined = project.build(line_info=True, ranges={"n": "3"}, out=project.folder / "lined.safetensors")
    assert not lined.failed and lined.compiled == lined.units > 0
    keys, lined_keys = project.snapshot(built), project.snapshot(lined)
    assert all(not keys[name] & lined_keys[name] for name in ALL)
    assert b"project_kernels.py" in lined.path.read_bytes(), "what a profiler reads"


def test_a_plan_gives_the_same_bytes_wherever_it_lies(twins: Sequence[tuple[Project, Built]], tmp_path: Path) -> None:
    project, built = twins[0]
    digests = set()
    for name in ("a", "bbbb"):
        plan = tmp_path / name / f"{name}.plan.json"
        plan.parent.mkdir()
        # A kernel that is made inside a function is reached by the recipe's host code alone, and a plan has none.
        document = json.loads(built.path.with_suffix(".plan.json").read_text())
        document["units"] = [unit for unit in document["units"] if "<locals>" not in unit["kernel"]]
        plan.write_text(json.dumps(document))
        from_plan = project.build(model=None, plans=(plan,), out=tmp_path / name / "out.safetensors")
        assert not from_plan.failed and from_plan.compiled == 0 and from_plan.units == built.units - 1
        digests.add(from_plan.digest)
    assert len(digests) == 1


def without_made(document: dict[str, Any]) -> dict[str, Any]:
    """A plan as a recording has it: a kernel that is made inside a function is reached by the recipe's host code alone."""
    units = [unit for unit in document["units"] if "<locals>" not in unit["kernel"]]
    return {**document, "units": units, "cases": [], "origin": "recorded"}


def test_one_build_takes_a_recipe_plans_and_misses(
    twins: Sequence[tuple[Project, Built]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each gives what the others lack; the units are those of a recipe that declares all of it."""
    project, built = twins[0]
    whole = json.loads(built.path.with_suffix(".plan.json").read_text())
    recorded, missing = without_made(whole), []
    for unit in [unit for unit in recorded["units"] if unit["kernel"].endswith(":alone")]:
        recorded["units"].remove(unit)
        kept = {name: unit[name] for name in ("kernel", "source", "specialization", "options", "overrides")}
        missing.append(missed("kernel", unit["kernel"], unit=kept, nearest=[]))
    plan, misses = tmp_path / "server.plan.json", tmp_path / "misses.jsonl"
    plan.write_text(json.dumps({**recorded, "target": "h100"}))  # recorded on another machine
    misses.write_text("".join(missing))
    (project.folder / "few.py").write_text(
        RECIPE.format(kernels="project_kernels")
        .replace("    kernels.alone[(1,)](x, BLOCK=16)\n", "")
        .replace("17)", "1)")
        .replace('Recipe("project"', 'Recipe("few"')
    )
    few = Project(project.folder, project.store, "few")
    alone = few.build()
    assert alone.units < built.units
    joined = few.build(plans=(plan,), misses=(misses,))
    assert not joined.failed and joined.misses["covered"] == 1 and joined.compiled == 0, "all of it is in the store"
    assert few.snapshot(joined) == project.snapshot(built)
    assert joined.path.name.startswith("few-plans=server-misses=")
    assert few.build(plans=(plan,), misses=(misses,)).nothing_to_do
    without_recipe = few.build(model=None, plans=(plan,), misses=(misses,))
    assert not without_recipe.failed and without_recipe.units == built.units - 1
    monkeypatch.chdir(project.folder)
    merged = run_merge(project.folder, plan, misses, out=tmp_path / "all.plan.json")
    assert (merged["misses"], merged["uncovered"], merged["specializations"]) == (1, [], built.units - 1)
    from_merged = few.build(model=None, plans=(tmp_path / "all.plan.json",))
    assert few.snapshot(from_merged) == few.snapshot(without_recipe)


def run_merge(folder: Path, *files: Path, out: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "aot_cache", "merge", *map(str, files), "--out", str(out), "--json"],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


# --- bad input --------------------------------------------------------------------------------------------------------


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


BAD_RECIPES = """
import torch
from aot_cache import Call, Range, Recipe, Values, declare

def host(n, m):
    if n == 5 and m == 2:
        raise ValueError("five does not divide")

@declare(n=Range(1, 9), m=Values(1, 2))
def divides(n, m):
    return Call(host, n, m)

raises = Recipe("raises", [divides])
"""


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project.at(tmp_path_factory.mktemp("bad"))
    (project.folder / "bad_recipes.py").write_text(BAD_RECIPES)
    (project.folder / "bad_import.py").write_text("import torch\nraise RuntimeError('no such model here')\n")
    (project.folder / "needs.py").write_text("import torch\nimport not_installed_here\n")
    return project


def test_a_model_that_nobody_knows(bad: Project) -> None:
    with pytest.raises(UnknownName, match="no-such-model"):
        bad.build(model="no-such-model")


def test_a_dimension_that_nobody_declared(bad: Project) -> None:
    with pytest.raises(UnknownName) as caught:
        bad.build(model="bad_recipes:raises", ranges={"tokens": "1..4"})
    assert "'tokens'" in str(caught.value) and "known: m, n" in str(caught.value)


def test_a_recipe_that_raises_at_a_point(bad: Project) -> None:
    with pytest.raises(DeclarationError) as caught:
        bad.build(model="bad_recipes:raises")
    line = BAD_RECIPES.splitlines().index('        raise ValueError("five does not divide")') + 1
    for part in ("'divides'", "n=5, m=2", "ValueError: five does not divide", f"bad_recipes.py:{line}"):
        assert part in str(caught.value)
    assert not list((bad.store).rglob("*.safetensors")), "nothing was written"


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        ("bad_import:recipe", DeclarationError, "RuntimeError: no such model here"),
        ("needs:recipe", UnknownName, "no module named 'not_installed_here'"),
        ("bad_recipes:gone", UnknownName, "no recipe at bad_recipes:gone"),
    ],
)
def test_a_recipe_that_cannot_be_had(bad: Project, model: str, error: type[AotCacheError], words: str) -> None:
    with pytest.raises(error, match=words):
        bad.build(model=model)


def test_the_cpu_has_no_kernels(bad: Project) -> None:
    """Triton compiles for GPUs only: for `cpu` there are compiled graphs, of which this recipe has none."""
    with pytest.raises(TargetError, match="expected a GPU target for Triton kernels, found cpu"):
        virtual_gpu.become(targets.get("cpu"))
    with pytest.raises(TraceError, match=r"at any of its 17 points.*name one with --target"):
        bad.build(target=targets.get("cpu"))
    assert not list(bad.folder.rglob("*-cpu.safetensors"))


def test_a_plan_of_kernels_for_the_cpu(bad: Project, tmp_path: Path) -> None:
    Plan(recipe="project", target="h200").write(tmp_path / "kernels.plan.json")
    with pytest.raises(AotCacheError) as caught:
        bad.build(model=None, plans=(tmp_path / "kernels.plan.json",), target=targets.get("cpu"))
    assert isinstance(caught.value, DeclarationError) and "aot-cache-" not in str(caught.value), (
        "a scratch folder's path says nothing to the user"
    )


def test_a_plan_with_calls_is_not_complete_without_their_graphs(bad: Project, tmp_path: Path) -> None:
    call = CallPlan(
        function="project:f", line=3, id="0" * 16, mode="inference", wrapping={"backend": "inductor"}, dynamic={}
    )
    Plan(recipe="project", target="h200", calls=[call]).write(tmp_path / "calls.plan.json")
    try:
        built, refused = bad.build(model=None, plans=(tmp_path / "calls.plan.json",)), ""
    except AotCacheError as error:  # to refuse it is right as well
        built, refused = None, str(error)
    assert refused or (built is not None and (built.graphs or built.failed))


FACTORY = """
import torch, triton, triton.language as tl
from aot_cache import Call, Recipe, Values, declare

class Table:
    def __init__(self, value): self.values = {"a": value}

def factory(table, plain):
    PLAIN = tl.constexpr(plain)
    @triton.constexpr_function
    def taken(): return table.values["a"]
    @triton.jit
    def unclear(x, B: tl.constexpr): tl.store(x + tl.arange(0, B), taken())
    @triton.jit
    def clear(x, B: tl.constexpr): tl.store(x + tl.arange(0, B), PLAIN)
    return unclear, clear

made = *factory(Table(1.0), 1.0), *factory(Table(2.0), 2.0)
LATE = torch.full((16,), 1.0, device="cuda:0")  # models' modules make some when they are imported

def host(n):
    for kernel in made:
        kernel[(1,)](LATE, B=16)

recipe = Recipe("factory", [declare(name="one", n=Values(1, 2))(lambda n: Call(host, n))])
"""


def test_kernels_that_nothing_tells_apart_are_not_built(tmp_path: Path) -> None:
    """The others of that factory are, and the bundle says that it is not all."""
    built = built_for_h200(tmp_path, "factory_project", FACTORY)
    ((kernel, why),) = {(failure["kernel"], failure["error"]) for failure in built.failed}
    assert kernel == "factory_project:factory.<locals>.unclear" and "table.values in" in why
    whole = manifest.whole(read_bundle(built.path)).to_json()
    assert not whole["complete"] and built.units == 2 and built.covered == 0
    assert len({unit["object"] for unit in whole["units"]}) == 2, "each with its own constant"
    assert all("<locals>.clear@" in kernel["name"] for kernel in whole["kernels"] if "unclear" not in kernel["name"])


def test_a_store_that_is_no_folder(bad: Project, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StoreUnwritable):
        bad.build(store=tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def mount(folder: Path, *options: str) -> None:
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("this user may not mount a file system")


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mount(folder, "-t", "tmpfs", "-o", f"size={size}", "none")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_leaves_the_store_as_it_was(edited: Edited, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        project = Project(edited.project.folder, disk / "store")
        first = project.build(ranges={"n": "3"})
        assert not first.failed
        before = files(disk)
        room = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        (disk / "ballast").write_bytes(bytes(max(0, room - 16 * 1024)))
        with pytest.raises(StoreUnwritable, match="no space"):
            project.build(ranges={"n": "1..17"}, target=targets.get("a100"))
        (disk / "ballast").unlink()
        after = files(disk)
        assert {name: after[name] for name in before} == before
        # What was kept is sound, and the next build goes on from there.
        assert not [name for name in after if name.endswith(".tmp")]
        assert project.build(ranges={"n": "3"}).digest == first.digest


def test_a_read_only_store_is_found_before_the_work(edited: Edited, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "1m") as disk:
        project = Project(edited.project.folder, disk / "store")
        project.store.mkdir()
        mount(disk, "-o", "remount,ro")
        seen: list[str] = []
        with pytest.raises(StoreUnwritable, match="read-only"):
            project.build(lambda stage, *_: seen.append(stage))
        assert not seen and files(disk) == {}


# --- workers that die -------------------------------------------------------------------------------------------------


def children() -> set[int]:
    """This process's children."""
    out = set()
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = status.read_text().rpartition(")")[2].split()
            if int(fields[1]) == os.getpid() and fields[0] != "Z":
                out.add(int(status.parent.name))
    return out


@pytest.mark.parametrize("stage", ["trace", "compile"])
def test_a_worker_that_is_killed(edited: Edited, tmp_path: Path, stage: str) -> None:
    """The kernel's memory killer takes the worker: an error says so, and the store is as it was."""
    before = children()

    def kill(now: str, done: int, total: int) -> None:
        if now == stage:
            for child in children() - before:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)

    project = Project(edited.project.folder, tmp_path / "store")
    with pytest.raises(TargetError, match=r"SIGKILL|-9"):
        project.build(kill)
    assert not list(project.store.rglob("*.safetensors"))
    assert children() == before


def test_a_child_that_dies_loses_its_item_only() -> None:
    def work(item: int) -> int:
        if item == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if item == 5:
            os._exit(7)
        return item * item

    results = dict(fork_map.run(work, list(range(8)), 2))
    assert results.pop(3) == fork_map.Died("its process was killed by SIGKILL")
    assert results.pop(5) == fork_map.Died("its process ended with exit code 7")
    assert results == {n: n * n for n in (0, 1, 2, 4, 6, 7)}


def test_every_child_dies() -> None:
    def work(item: int) -> None:
        os._exit(1)

    results = dict(fork_map.run(work, list(range(5)), 2))
    assert set(results) == set(range(5)) and all(isinstance(r, fork_map.Died) for r in results.values())


class KillsItsMaker:
    """A result of which the process that made it dies when it arrives: between this item and its next."""

    def __init__(self) -> None:
        self.made_by = os.getpid()

    def __setstate__(self, state: dict[str, int]) -> None:
        os.kill(state["made_by"], signal.SIGKILL)
        os.waitid(os.P_PID, state["made_by"], os.WEXITED | os.WNOWAIT)


def test_a_child_that_dies_between_two_items() -> None:
    results = dict(fork_map.run(lambda item: KillsItsMaker() if item == 0 else item, [0, 1, 2], 1))
    assert set(results) == {0, 1, 2} and isinstance(results[0], KillsItsMaker)
    assert results[2] == 2


def test_results_come_as_they_are_ready() -> None:
    """Item 0 waits for what the others leave: with two children the rest is done meanwhile."""
    read, write = os.pipe()

    def work(item: int) -> int:
        if item == 0:
            os.read(read, 1)
        return item

    order = []
    for index, _ in fork_map.run(work, list(range(5)), 2):
        order.append(index)
        if len(order) == 4:
            os.write(write, b"x")
    assert order[-1] == 0 and sorted(order) == list(range(5))


def test_a_reader_that_gives_up_leaves_no_child() -> None:
    before = children()
    running = fork_map.run(lambda item: time.sleep(60 if item else 0), [0, 1, 2], 2)
    next(running)
    running.close()  # type: ignore[attr-defined]
    while children() != before:  # they were killed; the system takes a moment
        time.sleep(0.01)


def test_no_items() -> None:
    assert list(fork_map.run(lambda item: item, [], 2)) == []


# --- stamps -----------------------------------------------------------------------------------------------------------


def test_the_environment_is_part_of_the_stamp(monkeypatch: pytest.MonkeyPatch) -> None:
    before = fingerprint.environment()
    monkeypatch.setenv("COLUMNS", "7")
    monkeypatch.setenv("SSH_TTY", "x")
    assert fingerprint.environment() == before, "where a shell runs says nothing about kernels"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "new for each worker")
    assert fingerprint.environment() == before, "nothing in the store would be found by the next build"
    monkeypatch.setenv("FLA_SOMETHING", "1")
    assert fingerprint.environment() != before


def test_what_changed_is_named(tmp_path: Path) -> None:
    import platform

    path = tmp_path / "read.py"
    path.write_text("one")
    inputs = Inputs(python=platform.python_version())
    assert fingerprint.changed(inputs) == ""
    files, packages = {str(path): fingerprint._file_digest(str(path))}, {"pytest": fingerprint.package_digest("pytest")}
    inputs = replace(inputs, files=files, packages=packages)
    assert fingerprint.changed(inputs) == ""
    path.write_text("two")
    assert fingerprint.changed(inputs) == str(path)
    path.unlink()
    assert fingerprint.changed(inputs) == str(path)
    assert fingerprint.changed(replace(inputs, packages={"pytest": "0.1 other"})) == "package pytest"
    assert fingerprint.changed(replace(inputs, packages={"not-here": "1"})) == "package not-here"
    assert fingerprint.changed(replace(inputs, python="2.7")) == "Python's version"


def test_what_another_package_brings_along_is_a_part_of_that(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """setuptools puts its `_vendor` on the path of a process that imports it: packages are there that the next process lacks."""
    vendor = tmp_path / "site" / "_vendor"
    info = vendor / "brought_along-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: brought-along\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("pytest\n")
    (info / "RECORD").write_text("")
    monkeypatch.syspath_prepend(str(vendor))
    assert "brought-along" in metadata.packages_distributions()["pytest"], "it claims a module that is imported"
    inputs = fingerprint.inputs()
    monkeypatch.undo()
    assert "pytest" in inputs.packages and fingerprint.changed(inputs) == ""


def test_what_this_process_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "stamped_module.py").write_text("x = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("stamped_module")
    inputs = fingerprint.inputs()
    assert str(tmp_path / "stamped_module.py") in inputs.files
    assert "pytest" in inputs.packages
    assert not [path for path in inputs.files if path.startswith(os.path.dirname(os.__file__) + "/json")]
    sys.modules.pop("stamped_module")


def test_a_plan_of_kernels_that_changed_is_not_nothing_to_do(tmp_path: Path) -> None:
    """A plan's kernels are imported by the compiler's children only; their source counts as much."""
    project = Project.at(tmp_path)
    recipe = "from project_kernels import alone\nimport torch\nfrom aot_cache import Call, Case, Recipe, Values\n"
    recipe += "def host(n):\n    alone[(1,)](torch.empty(64, device='cuda'), BLOCK=16)\n"
    recipe += "recipe = Recipe('one', [Case('case', lambda n: Call(host, n), {'n': Values(3)})])\n"
    (tmp_path / "project.py").write_text(recipe)
    plan = project.build().path.with_suffix(".plan.json")
    (tmp_path / "one.plan.json").write_bytes(plan.read_bytes())
    more: dict[str, Any] = {"model": None, "plans": (tmp_path / "one.plan.json",), "out": tmp_path / "out.safetensors"}
    assert not project.build(**more).failed
    assert project.build(**more).nothing_to_do
    project.kernels.write_text(KERNELS.replace("3.0", "3.5"))
    (failure,) = project.build(**more).failed
    assert "source of project_kernels:alone differs" in failure["error"]


# --- what servers missed ----------------------------------------------------------------------------------------------

SERVED = """
import project
from aot_cache import Call, Range, Recipe, declare

@declare(n=Range(1, 17))
def case(n):
    if n > 1000:
        raise ValueError("too many")
    return Call(project.host, n)

recipe = Recipe("served", [case])
"""


def missed(kind: str, name: str, **own: Any) -> str:
    """A line of a misses file."""
    common = {"in_capture": True, "sealed": True, "action": "twin", "why": "not there", "pid": 1, "seen": 2}
    return json.dumps({"aot-cache miss": 1, "kind": kind, "name": name, **common, **own}) + "\n"


def missed_call(**point: int) -> str:
    facts = {
        "place": "",
        "wrapping": {},
        "mode": "inference",
        "structure": "",
        "declare": "",
        "sizes": {"n": [*point.values()]},
    }
    return missed("graph", "nobody:calls", points={"case": point}, **facts)


@dataclass
class AfterMisses:
    """The recipe built again with what was missed: what the build said, its manifest, and its plan."""

    built: Built
    manifest: dict[str, Any]
    plan: Plan

    @property
    def uncovered(self) -> list[tuple[str, str]]:
        return [(row["name"].rpartition(":")[2], row["why"]) for row in self.built.misses["uncovered"]]


@pytest.fixture(scope="module")
def after_misses(twins: Sequence[tuple[Project, Built]]) -> AfterMisses:
    project, before = twins[1]
    (project.folder / "served.py").write_text(SERVED)
    plan = json.loads(before.path.with_suffix(".plan.json").read_text())
    kept = ("kernel", "source", "specialization", "options", "overrides")
    units = {u["kernel"].rpartition(":")[2]: {name: u[name] for name in kept} for u in plan["units"]}

    def with_block(name: str, block: Any) -> dict[str, Any]:
        *pairs, _ = units[name]["specialization"]
        return {**units[name], "specialization": [*pairs, {"t": ["constexpr", block]}]}

    def kernel(unit: dict[str, Any]) -> str:
        return missed("kernel", unit["kernel"], unit=unit, nearest=[])

    tuning = {name: plan["tunings"][0][name] for name in ("kernel", "tuner", "candidates")}
    configs = [
        {**{name: u[name] for name in kept}, "via": [[0, c] for t, c in u["via"] if t == 0]}
        for u in plan["units"]
        if any(t == 0 for t, _ in u["via"])
    ]
    lines = [
        kernel(with_block("alone", 32)),
        kernel(with_block("make.<locals>.made", 32)),
        kernel(with_block("alone", 16)),
        kernel(with_block("inner", 16) | {"source": "0" * 64}),
        kernel(with_block("outer", "no number")),
        kernel(with_block("takes", 16) | {"specialization": [5]}),
        kernel(units["alone"] | {"kernel": "no_such_module:kernel"}),
        missed("tuning", tuning["kernel"], tuning={**tuning, "key": [99, "torch.float32"]}, units=configs),
        missed("load", "project_kernels:tuned"),
        missed("tuning", "triton_poi_fused"),
        missed_call(n=200),
        missed_call(n=2000),
        missed_call(m=3),
    ]
    path = project.folder / "misses.jsonl"
    path.write_text("".join(lines) + lines[0][:50])
    served = Project(project.folder, project.store, "served").build(misses=(path,))
    whole = manifest.whole(read_bundle(served.path, served.digest)).to_json()
    return AfterMisses(served, whole, Plan.read(served.path.with_suffix(".plan.json")))


def test_misses_fail_no_build(after_misses: AfterMisses) -> None:
    built = after_misses.built
    assert not built.failed and after_misses.manifest["complete"] and not built.nothing_to_do
    assert (built.misses["given"], built.misses["covered"], built.misses["cut_off"]) == (13, 4, 1)


def test_missed_specializations_are_compiled(after_misses: AfterMisses) -> None:
    """Also one of a kernel that is made inside a function."""
    found = {
        (after_misses.manifest["kernels"][u["kernel"]]["name"], u["specialization"][-1]["t"][1], bool(u["reached"]))
        for u in after_misses.manifest["units"]
    }
    for name in ("project_kernels:alone", "project_kernels:make.<locals>.made"):
        assert (name, 32, False) in found and (name, 16, True) in found
    assert after_misses.built.compiled == 2, "the others are in the store"
    assert (
        after_misses.built.units == len(after_misses.plan.units) == len({unit.id for unit in after_misses.plan.units})
    )


def test_a_missed_choice_is_there_with_its_configs(after_misses: AfterMisses) -> None:
    (number,) = [n for n, t in enumerate(after_misses.manifest["tunings"]) if t["key"][0] == 99]
    assert after_misses.manifest["tunings"][number]["default"] == 0
    reached = {tuple(via) for unit in after_misses.manifest["units"] for via in unit["via"]}
    assert {(number, 0), (number, 1)} <= reached


def test_a_missed_point_is_visited_and_named(after_misses: AfterMisses) -> None:
    (case,) = after_misses.plan.cases
    assert (case.dims, case.missed, case.points, case.total) == ({"n": "1..17"}, [{"n": 200}], 18, 18)
    assert 200 in {tuning.key[0] for tuning in after_misses.plan.tunings}
    assert after_misses.built.points == 18


def test_what_is_not_covered_is_named_with_its_reason(after_misses: AfterMisses) -> None:
    why = dict(after_misses.uncovered)
    assert len(after_misses.uncovered) == 9 and why.pop("outer").startswith("CompilationError")
    assert why == {
        "calls": "no declared case calls a compiled function",
        "inner": "its source here differs from the source that missed",
        "kernel": "no kernel of this name can be imported; hint: is its module installed here?",
        "takes": "its specialization is not a list of (type, value) pairs",
        "tuned": "it was compiled, and loaded late: there is nothing to build",
        "triton_poi_fused": "Inductor's kernel has all its configs in the bundle: tune it, or ready(tune=True)",
    }


def test_other_misses_are_another_build(twins: Sequence[tuple[Project, Built]], tmp_path: Path) -> None:
    project, _ = twins[0]
    nothing, something = tmp_path / "nothing", tmp_path / "something"
    nothing.write_text("")
    something.write_text(missed("load", "m:k"))
    request = Request(target=targets.get("h200"), store=project.store, model="project:recipe")
    asked = {pipeline._question(request, pipeline.miss_file.read(paths)) for paths in ((), [nothing], [something])}
    assert len(asked) == 2, "a file with nothing in it is as none"
