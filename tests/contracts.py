"""What the contract tests share: a failure says which sentence about torch or triton is no longer true."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton
from limits import HANGS

ROOT = Path(__file__).parents[1]
UPSTREAM = {path.stem: path for path in sorted((ROOT / "aot_cache" / "upstream").rglob("*.py"))}
"""Name of a module of aot_cache/upstream/ → its file, in whichever of its folders; a name stands in one only."""


def need(holds: object, sentence: str) -> None:
    """Fail with a sentence and the versions that it is no longer true of."""
    assert holds, f"upstream moved (torch {torch.__version__}, triton {triton.__version__}): {sentence}"


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def python(code: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process of its own: it replaces what cannot be put back."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
