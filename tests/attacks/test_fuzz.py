"""`tools/fuzz_bundle`: what reads bundles and records finds nothing to fall over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS

ROOT = Path(__file__).parents[2]
FUZZ = ROOT / "tools" / "fuzz_bundle"

ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "utf-8-sig")
"""All that `json.loads` guesses when it is given bytes; it imports what decodes them."""


def _ran(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("atheris")
    done = subprocess.run(
        [sys.executable, str(FUZZ), *arguments], cwd=folder, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]  # the exception is in the former
    return done


def test_a_minute_of_fuzzing(tmp_path: Path) -> None:
    record = json.loads(_ran(tmp_path, "--seconds", "60").stdout)
    assert record["findings"] == 0 and record["inputs"] > record["seeds"]


def test_no_reader_imports_what_decodes_another_encoding_than_utf_8(tmp_path: Path) -> None:
    """A minute of random bytes finds these once in many runs."""
    inputs = []
    for kind in "bmdr":
        for encoding in ENCODINGS:
            inputs.append(tmp_path / f"{kind}-{encoding}")
            inputs[-1].write_bytes(kind.encode() + '{"a": 1}'.encode(encoding))
    done = _ran(tmp_path, "--worker", str(tmp_path), *map(str, inputs))
    assert done.stderr.count("Executed ") == len(inputs)
