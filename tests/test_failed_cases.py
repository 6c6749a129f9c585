"""Recipes of which some cases cannot be built: each is named with its place, and the bundle has all others. Real builds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS

from aot_cache.artifact import manifest
from aot_cache.artifact.plan import Plan
from aot_cache.store import read_bundle

ROOT = Path(__file__).parents[1]

GRAPHS = """
import os
import signal
import sys

import torch
from aot_cache import Call, Range, Recipe, declare, device

HERE = os.getpid()


@torch.compile
def host(x): return x * 2 + 1

@torch.compile
def picks(x): return x[x > 0] + 1  # picks

@torch.compile
def branches(x): return x + 1 if x.sum() > 0 else x - 1  # branches

@torch.compile(fullgraph=True)
def breaks(x):
    torch._dynamo.graph_break()  # breaks
    return x * 3

def rows(n): return torch.ones(n, 4, device=device())

def raises(x):
    if x.shape[0] == 3:
        raise ValueError("three is odd")  # raises
    return host(x)

def raises_late(x):
    if x.shape[0] == 57:
        raise ValueError("nobody looked")  # raises_late
    return host(x)

def leaves(x):
    sys.exit(7)  # leaves

def ends(x):
    if x.shape[0] == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return host(x)

def ends_in_a_child(x):
    if os.getpid() != HERE:
        os._exit(9)
    return host(x)

def case_of(name, function, most=4):
    return declare(name=name, n=Range(1, most))(lambda n: Call(function, rows(n)))

good = case_of("good", host)
bad = {
    "picks": picks, "branches": branches, "breaks": breaks, "raises": raises, "leaves": leaves, "ends": ends,
    "ends_in_a_child": ends_in_a_child,
}
last = case_of("last", host)
recipe = Recipe("some", [
    good, *(case_of(name, function) for name, function in bad.items()), case_of("raises_late", raises_late, 100), last,
])
all_bad = Recipe("none", [case_of("raises", raises), case_of("picks", picks)])
"""


def line_of(source: str, mark: str) -> int:
    return next(n for n, text in enumerate(source.splitlines(), 1) if text.endswith(f"# {mark}"))


def run(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "aot_cache", *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


@dataclass(frozen=True)
class Done:
    """A build of which something failed."""

    run: subprocess.CompletedProcess[str]
    folder: Path

    @property
    def said(self) -> dict[str, Any]:
        (bundle,) = json.loads(self.run.stdout)["bundles"]
        return bundle  # type: ignore[no-any-return]

    @property
    def bundle(self) -> Path:
        return Path(self.said["path"])

    @property
    def whole(self) -> dict[str, Any]:
        return manifest.whole(read_bundle(self.bundle)).to_json()

    def why(self, name: str) -> list[str]:
        """Why a case or a function failed, for each time that it did."""
        return [failure["error"] for failure in self.whole["failed"] if failure["kernel"] == name]


def built(folder: Path, module: str, source: str, target: str) -> Done:
    (folder / f"{module}.py").write_text(source)
    return Done(
        run(folder, "build", "--model", f"{module}:recipe", "--target", target, "--json", "--workers", 1), folder
    )


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some(tmp_path_factory: pytest.TempPathFactory) -> Done:
    done = built(tmp_path_factory.mktemp("some"), "some_graphs", GRAPHS, "cpu")
    assert done.run.returncode == 4, done.run.stderr
    return done


@pytest.mark.parametrize(
    ("case", "point", "words"),
    [
        ("picks", "n=4", "reads the values of a tensor"),
        ("branches", "n=4", "reads the values of a tensor"),
        ("raises", "n=3", "ValueError: three is odd"),
        ("raises_late", "n=57", "ValueError: nobody looked"),
        ("leaves", "n=4", "SystemExit: 7"),
    ],
)
def test_a_case_that_cannot_be_run_is_named_with_its_place(some: Done, case: str, point: str, words: str) -> None:
    (why,) = some.why(f"case {case}")
    assert why.startswith(f"at {point}: {words}") and why.endswith(f"(some_graphs.py:{line_of(GRAPHS, case)})")


def test_a_case_that_ends_the_process_is_named(some: Done) -> None:
    (why,) = some.why("case ends")
    assert why.startswith("at n=2: its process was killed by SIGKILL")


def test_a_call_that_cannot_be_compiled_is_named_with_its_case(some: Done) -> None:
    place = f"some_graphs.py:{line_of(GRAPHS, 'breaks')}"
    one, more = sorted(some.why("some_graphs:breaks"))
    assert one.startswith("case breaks: at n=1: ") and more.startswith("case breaks: at n=4: ")
    assert place in one and place in more


def test_a_case_that_ends_every_child_is_named(some: Done) -> None:
    (why,) = some.why("case ends_in_a_child")
    assert why.startswith("at n=4: its process ended with exit code 9")


def test_the_other_cases_are_in_the_bundle(some: Done) -> None:
    whole = some.whole
    assert whole["complete"] is False and some.said["complete"] is False
    reached = {case for graph in whole["graphs"] for case in graph["reached"]}
    assert reached == {"good", "last"}
    assert {box["n"] for graph in whole["graphs"] for box in graph["reached"]["good"]} == {"1", "2..4"}


def test_the_points_of_failed_cases_are_not_covered(some: Done) -> None:
    assert (some.said["declared"], some.said["covered"]) == (9 * 4 + 100, 2 * 4)
    assert some.said["coverage"].startswith("not proved")


def test_people_are_told(some: Done) -> None:
    assert "case raises_late" in some.run.stderr
    inspected = run(some.folder, "inspect", some.bundle).stdout
    verified = run(some.folder, "verify", some.bundle)
    for text in (inspected, verified.stdout):
        assert "case picks: at n=4: reads the values of a tensor" in " ".join(text.split())
    assert verified.returncode == 32 and "not proved" in inspected and "raises_late: n=1..100 (failed" in inspected
    plan = Plan.read(some.bundle.with_suffix(".plan.json"))
    assert {"picks", "ends", "raises_late"} <= {one.case for one in plan.failed} and len(plan.cases) == 10


SERVE = """
import json
import aot_cache.auto
import some_graphs, torch, aot_cache
aot_cache.ready()
aot_cache.seal()
asked = {name: aot_cache.will_hit(name, {"n": 2}) for name in ("good", "last", "picks", "ends_in_a_child")}
with torch.inference_mode():
    right = torch.equal(some_graphs.host(torch.ones(3, 4)), torch.ones(3, 4) * 3)
hits = {name: [hit.hit, *hit.why] for name, hit in asked.items()}
print(json.dumps({"right": right, "misses": len(aot_cache.stats()["misses"]), "hits": hits}))
"""


def test_what_serves_it_says_the_same(some: Done) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{some.folder}", "AOT_CACHE": str(some.bundle)},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["right"] and found["misses"] == 0
    assert found["hits"]["good"] == [True] and found["hits"]["last"] == [True]
    assert found["hits"]["picks"][0] is False and "reads the values of a tensor" in found["hits"]["picks"][1]
    assert found["hits"]["ends_in_a_child"][0] is False and "exit code 9" in found["hits"]["ends_in_a_child"][1]


def test_all_of_a_recipe_is_bad(some: Done) -> None:
    done = run(some.folder, "build", "--model", "some_graphs:all_bad", "--target", "cpu", "--store", "other")
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "case 'raises' at n=3: its code raised " in done.stderr and "case picks at n=4" in done.stderr
    assert not list((some.folder / "other").rglob("*.safetensors"))


def test_a_plan_of_the_others_is_shown(some: Done) -> None:
    done = run(some.folder, "build", "--model", "some_graphs:recipe", "--target", "cpu", "--show-plan")
    assert done.returncode == 4 and "case picks" in done.stderr
    assert "case picks: at n=4: reads the values" in " ".join(done.stdout.split())
    assert "good" in done.stdout


# --- kernels, and graphs beside them ----------------------------------------------------------------------------------

KERNELS = '''
import os
import signal
import sys

import torch
import triton
import triton.language as tl
from aot_cache import Call, Range, Recipe, declare


@triton.jit
def fill(x, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK), 1.0)

@torch.compile
def host(x): return x * 2 + 1

@torch.compile
def late_host(x): return x * 5 + 1

def fills(n):
    x = torch.empty(n, 64, device="cuda")
    fill[(1,)](x, BLOCK=16)
    return host(x)

def values(n):
    x = torch.empty(n, 64, device="cuda")
    fill[(1,)](x, BLOCK=32)
    return torch.empty(int(x.sum()))  # values

def raises(n):
    x = torch.empty(n, 64, device="cuda")
    fill[(1,)](x, BLOCK=64)
    if n == 5:
        raise ValueError("five does not divide")  # raises
    return host(x)

def only_graphs(n):
    """Raises where graphs are looked at, not where kernels are."""
    x = torch.empty(n, 64, device="cuda")
    fill[(1,)](x, BLOCK=128)
    fakes = "Fake" in type(x).__name__
    if fakes and n == 9:
        raise ValueError("a fake one")  # only_graphs
    return late_host(x)

def ends(n):
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)

def leaves(n):
    if n == 4:
        sys.exit(7)  # leaves

def sets(n):
    """Whatever a process can set."""
    import torch._dynamo
    import torch._inductor.config
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(7)
    torch.set_float32_matmul_precision("high")
    torch._inductor.config.max_autotune = True
    torch._dynamo.config.recompile_limit = 2
    os.environ["SET_BY_A_CASE"] = "1"
    os.chdir("/")

def unset():
    import torch._dynamo
    import torch._inductor.config
    state = [
        torch.get_default_dtype(), str(torch.get_default_device()), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), torch._inductor.config.max_autotune,
        torch.compiler.is_compiling(), os.environ.get("SET_BY_A_CASE"), os.getcwd() == "/",
    ]
    assert state == [torch.float32, "cpu", False, "highest", False, False, None, False], state

def in_the_call(n):
    """Under what its arguments set, and nothing that another point of it has set after."""
    assert torch._inductor.config.max_autotune and os.environ["SET_BY_A_CASE"] == "1"
    fills(n)
    torch._inductor.config.max_autotune = False

def case_of(name, function, most=9):
    return declare(name=name, n=Range(1, most))(lambda n: Call(function, n))

@declare(n=Range(2, 9))
def in_the_arguments(n):
    unset()
    sets(n)
    return Call(in_the_call, n)

recipe = Recipe("some", [
    case_of("values", values), case_of("raises", raises), case_of("only_graphs", only_graphs), case_of("ends", ends),
    case_of("leaves", leaves), in_the_arguments, case_of("good", fills),
])
'''


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Done:
    done = built(tmp_path_factory.mktemp("kernels"), "some_kernels", KERNELS, "h200")
    assert done.run.returncode == 4, done.run.stderr
    return done


@pytest.mark.parametrize(
    ("case", "point", "words"),
    [
        ("values", "n=1", "int() reads the values of"),
        ("raises", "n=5", "ValueError: five does not divide"),
        ("only_graphs", "n=9", "ValueError: a fake one"),
        ("leaves", "n=4", "SystemExit: 7"),
    ],
)
def test_of_kernels_too_it_is_named_with_its_place(kernels: Done, case: str, point: str, words: str) -> None:
    (why,) = kernels.why(f"case {case}")
    assert why.startswith(f"at {point}: {words}") and why.endswith(f"(some_kernels.py:{line_of(KERNELS, case)})")


def test_the_point_at_which_a_child_was_killed(kernels: Done) -> None:
    assert kernels.why("case ends") == ["at n=7: its process was killed by SIGKILL"]


def test_nothing_else_failed_and_all_else_is_there(kernels: Done) -> None:
    """What a case sets for its process reaches no other: that would have failed in `unset`."""
    whole = kernels.whole
    assert len(whole["failed"]) == 5 and whole["complete"] is False
    assert {case for unit in whole["units"] for case in unit["reached"]} == {"good", "in_the_arguments"}
    assert {unit["specialization"][-1]["t"][1] for unit in whole["units"]} == {16}
    assert {case for graph in whole["graphs"] for case in graph["reached"]} == {"good", "in_the_arguments"}
    assert {graph["function"] for graph in whole["graphs"]} == {"host"}
    assert (kernels.said["declared"], kernels.said["covered"]) == (6 * 9 + 8, 9 + 8)


def test_what_a_case_sets_is_a_condition_of_its_own_graphs_and_is_said(kernels: Done) -> None:
    """A server does as the recipe does: it makes the model, which may set something, and calls it."""
    settings = {case: graph["settings"] for graph in kernels.whole["graphs"] for case in graph["reached"]}
    assert settings["good"] != settings["in_the_arguments"]
    changed = kernels.said["sets"]
    assert list(changed) == ["in_the_arguments"]
    assert {"the variable SET_BY_A_CASE", "torch._inductor.config.max_autotune"} <= set(changed["in_the_arguments"])
