"""The parts of the tests that `tools/check_torch` runs, none of which needs a GPU, and what came of each."""

from __future__ import annotations

import re
import subprocess
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from checked_environments import ROOT, Environment

TESTS = ROOT / "tests"
CONTRACTS, RECIPES = "contracts", "shipped recipes"
PARTS: Mapping[str, tuple[str, ...]] = {
    CONTRACTS: ("-m", "contract"),  # and the files that have such a mark, see `_arguments`
    "virtual device": ("tests/on_target",),
    "graph hits": (
        "tests/graphs/test_graph_hits.py",
        "-k",
        "first_call or next_call or values_are or everything or layers",
    ),
    "odd graphs": ("tests/test_odd_graphs.py",),
    "guards": ("tests/test_dynamo_guards.py", "tests/test_guard.py"),
    RECIPES: ("tests/models",),
}
"""Part → what pytest is told."""
_MARK = re.compile(r"pytest\.mark\.contract\(")


@dataclass
class Outcome:
    """What came of one part.

    Args:
        failed: test → what it said.
        modules: module of upstream/ → its contract tests that passed and failed here.
    """

    passed: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    modules: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def run(part: str, where: Environment) -> Outcome:
    """Run a part of the tests in an environment."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="aot-cache-check-") as scratch:
        report = Path(scratch, "report.xml")
        variables = {"AOT_TESTS_ON_TARGET": "h200"} if part == "virtual device" else {}
        command = [str(where.python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        done = subprocess.run(
            [*command, f"--basetemp={scratch}/tests", *_arguments(part)],
            env=where.variables(**variables),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        found = read(report.read_text() if report.exists() else "")
    if done.returncode and not found.failed:
        found.failed[part] = done.stdout.strip()[-600:] or f"pytest ended with {done.returncode}"
    found.seconds = round(time.perf_counter() - began, 1)
    return found


def _arguments(part: str) -> list[str]:
    files = (path for path in sorted(TESTS.glob("test_*.py")) if _MARK.search(path.read_text()))
    return [*PARTS[part], *(str(path.relative_to(ROOT)) for path in files if part == CONTRACTS)]


def read(report: str) -> Outcome:
    """The outcome in a report of pytest's, in JUnit's XML; nothing passed where there is none."""
    found = Outcome()
    for case in ElementTree.fromstring(report).iter("testcase") if report else ():
        name = f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"
        problem = next((part for part in case if part.tag in ("failure", "error")), None)
        skipped = case.find("skipped") is not None
        if problem is not None:
            found.failed[name] = _one_line(problem.get("message") or problem.text or "")
        elif skipped:
            found.skipped += 1
        else:
            found.passed += 1
        for owner in case.iter("property"):
            if owner.get("name") == "contract" and not skipped:
                row = found.modules.setdefault(str(owner.get("value")), {"passed": 0, "failed": 0})
                row["passed" if problem is None else "failed"] += 1
    return found


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
