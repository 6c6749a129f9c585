"""Runs tests/on_target in a process of its own, which becomes an H200 for good."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_on_an_h200(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "tests/on_target",
            "-q",
            "-p",
            "no:cacheprovider",
            "--basetemp",
            str(tmp_path / "on_target"),
        ],
        cwd=ROOT,
        env={**os.environ, "AOT_TESTS_ON_TARGET": "h200", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    passed = re.search(r"\b(\d+) passed", done.stdout)
    assert done.returncode == 0, f"tests/on_target failed:\n{done.stdout}"
    assert passed and int(passed[1]) > 0, f"tests/on_target ran nothing:\n{done.stdout}"
