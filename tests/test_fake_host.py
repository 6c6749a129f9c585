"""Host code around graphs, on fake tensors: what it makes is what it makes on a CPU. One process for each kind of target."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


@cache
def said(target: str) -> dict[str, dict[str, str]]:
    done = subprocess.run(
        [sys.executable, "fake_host.py", target],
        cwd=TESTS,
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    out: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    return out


@pytest.mark.contract("torch_fake", "torch_factories", "torch_modules", "torch_random", "torch_streams")
@pytest.mark.parametrize("mode", ["inference", "no_grad", "grad"])
@pytest.mark.parametrize("target", ["cpu", "h200", "mi300x"])
def test_host_code_runs(target: str, mode: str) -> None:
    kinds = said(target)[mode]
    assert len(kinds) > 60
    assert {kind: why for kind, why in kinds.items() if why} == {}
