"""tools/check_torch: every module of upstream/ has its contract, and what is published is what was recorded."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import checked_record as record
import pytest
from checked_environments import Spec
from checked_parts import CONTRACTS, PARTS, RECIPES, read
from limits import HANGS

from aot_cache import tested

ROOT = Path(__file__).parents[1]
TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
WHOLE_FILES = ("test_torch_contract", "test_upstream_contract", "test_miss_contract", "test_small_contracts")
NO_CONTRACTS = {
    "test_the_reader_of_names_reads_them",
    "test_hooks_are_taken_out",
    "test_nothing_here_left_something_behind",
}


def marked(node: ast.AST) -> set[str]:
    """The modules that marks under `node` name as text."""
    return {
        argument.value
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.contract"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


TREES = {path.stem: ast.parse(path.read_text()) for path in TESTS if path != Path(__file__)}
MARKED = {name: marked(tree) for name, tree in TREES.items()}


# --- contracts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", record.modules())
def test_a_module_says_what_it_relies_on_and_has_a_contract(module: str) -> None:
    """One more than that its names are there, which is asked of all of them."""
    assert record.relies_on(module), f'{module}.py has no paragraph "Upstream: …" in its docstring'
    owners = [name for name, found in MARKED.items() if module in found]
    assert owners, f'no test has the mark pytest.mark.contract("{module}")'


def test_contracts_are_of_modules_that_are_there() -> None:
    named = set().union(*MARKED.values())
    assert named <= set(record.modules())


@pytest.mark.parametrize("file", WHOLE_FILES)
def test_every_test_of_a_contract_says_whose_it_is(file: str) -> None:
    tests = [n for n in TREES[file].body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]
    without = {test.name for test in tests if "mark.contract" not in "".join(map(ast.unparse, test.decorator_list))}
    assert tests and without <= NO_CONTRACTS, f"{file}: no mark `contract`: {sorted(without - NO_CONTRACTS)}"


# --- what is published ------------------------------------------------------------------------------------------------

AGAIN = "run tools/check_torch --page, and VERSION… where there is a new module or release"


def test_the_package_s_table_is_what_was_recorded() -> None:
    assert json.loads(tested.TABLE.read_text()) == record.table(record.read()), AGAIN


def test_the_page_of_support_says_what_was_recorded() -> None:
    text = record.PAGE.read_text()
    assert record.in_page(text) and record.in_page(text) == record.page_block(record.read()), AGAIN


def test_every_module_held_somewhere() -> None:
    rows = tested.table().modules
    assert set(rows) == set(record.modules())
    never = [name for name, row in rows.items() if not (row.torch and row.triton)]
    assert not never, f"{never}: {AGAIN}"


def test_a_serving_process_imports_what_is_called_serving() -> None:
    code = (
        "import sys; from aot_cache.runtime import graph_lookup, loader; import triton\n"
        "[*loader.SESSION.triton_hooks()]; print(*[m.split('.')[-1] for m in sys.modules if m.startswith('aot_cache.upstream.')])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.split()) - {*record.NO_ROOMS, "codec", "hooks"}
    assert imported and imported <= record.serving() and "inductor_target" not in record.serving()


# --- the tool ---------------------------------------------------------------------------------------------------------

REPORT = """<?xml version="1.0"?><testsuites><testsuite>
<testcase classname="tests.test_one" name="test_a[x]"><properties><property name="contract" value="m"/></properties></testcase>
<testcase classname="tests.test_one" name="test_b"><properties><property name="contract" value="m"/>
<property name="contract" value="n"/></properties><failure message="upstream moved:&#10; gone">trace</failure></testcase>
<testcase classname="tests.test_one" name="test_c"><properties><property name="contract" value="n"/></properties>
<skipped message="no"/></testcase>
<testcase classname="tests.test_one" name="test_d"><error message="boom">trace</error></testcase>
</testsuite></testsuites>"""


def test_a_report_of_pytest_is_read() -> None:
    found = read(REPORT)
    assert (found.passed, found.skipped) == (1, 1)
    assert found.failed == {"tests/test_one.py::test_b": "upstream moved: gone", "tests/test_one.py::test_d": "boom"}
    assert found.modules == {"m": {"passed": 1, "failed": 1}, "n": {"passed": 0, "failed": 1}}


def a_run(torch: str, triton: str, transformers: str, parts: Any = PARTS, **failed: dict[str, str]) -> dict[str, Any]:
    """A run in which every module's contract passed, and every part but for `failed`."""
    modules = {name: {"passed": 1, "failed": 0} for name in record.modules()}
    made = {
        part: {
            "passed": 7,
            "skipped": 0,
            "seconds": 1.0,
            "failed": failed.get(part.replace(" ", "_"), {}),
            "modules": modules if part == CONTRACTS else {},
        }
        for part in parts
    }
    return {"torch": torch, "triton": triton, "transformers": transformers, "python": "3.11.7", "parts": made}


def test_a_run_again_takes_the_place_of_its_parts() -> None:
    """Of a run under another patch release, too; what ran there alone is not said to have run under this one."""
    old = a_run("2.13.0+cpu", "3.7.1", "5.23.0", guards={"t": "why"})
    runs = record.merged([old, a_run("2.9.0", "3.4.0", "5.17.0")], a_run("2.13.1", "3.7.1", "5.23.4", ["guards"]))
    assert [run["torch"] for run in runs] == ["2.9.0", "2.13.0+cpu", "2.13.1"]
    assert set(runs[1]["parts"]) == set(PARTS) - {"guards"} and set(runs[2]["parts"]) == {"guards"}
    assert not record.moved(runs)
    assert record.moved([old]) == ["2.13.0 × 3.7.1 × 5.23.0: t: why"]
    (again,) = record.merged([old], a_run("2.13.0+cpu", "3.7.1", "5.23.0", ["guards"]))
    assert set(again["parts"]) == set(PARTS) and not record.moved([again])


def test_the_table_of_a_record() -> None:
    broken = a_run("2.14.1", "3.8.0", "5.24.0", contracts={"t": "moved"}, graph_hits={"u": "misses"})
    broken["parts"][CONTRACTS]["modules"] = {
        **broken["parts"][CONTRACTS]["modules"],
        "dynamo_guards": {"passed": 1, "failed": 1},
    }
    runs = [
        a_run("2.9.0", "3.4.0", "5.24.0"),
        a_run("2.9.0", "3.4.0", "5.17.0", [RECIPES]),
        a_run("2.9.0", "3.4.0", "5.16.0", [RECIPES], shipped_recipes={"t": "no MtpModel"}),
        a_run("2.13.0", "3.7.0", "5.24.0", [CONTRACTS]),
        broken,
    ]
    found = tested.read(json.dumps(record.table(runs)))
    assert [pair.text for pair in found.pairs] == ["2.9 × 3.4", "2.13 × 3.7", "2.14 × 3.8"]
    good, unrun, bad = found.pairs
    assert good.transformers == ("5.24", "5.17") and not good.failed
    assert unrun.failed == tuple(f"{part} (not run)" for part in PARTS if part != CONTRACTS)
    assert found.doubt("2.13.0", "3.7.0").startswith("not all tests were run with torch 2.13.0 × triton 3.7.0: ")
    assert bad.broken == ("dynamo_guards",) and bad.failed == ("graph hits",)
    assert found.modules["dynamo_guards"].torch == ("2.9", "2.13")
    assert found.modules["triton_jit"].triton == ("3.4", "3.7", "3.8")
    assert found.refused(tested.GRAPHS, "2.14.1", "3.8.0") and not found.refused(tested.KERNELS, "2.14.1", "3.8.0")
    block = record.page_block(runs)
    for text in (
        "| 2.9 × 3.4 | 2.13 × 3.7 (contracts pass), any other",
        "2.14 × 3.8 (dynamo_guards, graph hits)",
        "5.16.0 (tests fail)",
    ):
        assert text in block


def test_the_releases_of_the_constraints_were_tested_in_full() -> None:
    """A strict server under them must load, and every test here takes untested releases upon itself."""
    pinned = dict(re.findall(r"^(torch|triton|transformers)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M))
    assert tested.table().doubt(pinned["torch"], pinned["triton"], pinned["transformers"]) == ""


def test_what_is_asked_for() -> None:
    assert Spec.of("2.14") == Spec("2.14") and Spec.of("2.13x3.6") == Spec("2.13", "3.6")
    assert Spec.of("2.13x3.6").text == "2.13x3.6"
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "check_torch"], capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 2 and "--page" in done.stderr
