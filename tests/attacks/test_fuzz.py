"""A minute of `tools/fuzz_bundle`: what reads bundles and records finds nothing to fall over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS

ROOT = Path(__file__).parents[2]


def test_a_minute_of_fuzzing(tmp_path: Path) -> None:
    pytest.importorskip("atheris")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "fuzz_bundle"), "--seconds", "60"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    record = json.loads(done.stdout)
    assert record["findings"] == 0 and record["inputs"] > record["seeds"]
