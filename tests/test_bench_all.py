"""tools/bench_all: what is made of the figures. A peer that is better must be named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS

SCRIPT = Path(__file__).parents[1] / "tools" / "bench_all"


@pytest.fixture(scope="module")
def bench() -> Any:
    name = "bench_all"
    found = module_from_spec(spec_from_loader(name, SourceFileLoader(name, str(SCRIPT))))  # type: ignore[arg-type]
    sys.modules[name] = found
    found.__loader__.exec_module(found)  # type: ignore[union-attr]
    return found


def record(bench: Any) -> dict[str, Any]:
    rows = [
        bench.Row(subject="a net", mode="eager", start_s=0.1, step_us=9.0),
        bench.Row(subject="a net", mode="mega", start_s=3.0, imported_s=1.2, artifact_mb=1.0, step_us=8.0),
        bench.Row(
            subject="a net", mode="aot", start_s=2.0, imported_s=0.3, artifact_mb=2.0, step_us=8.1, in_captures=0
        ),
        bench.Row(subject="kernels", mode="driver alone", start_s=0.03),
        bench.Row(subject="kernels", mode="aot", start_s=0.04),
    ]
    machine = {"gpu": "", "cores": 2, "versions": {"torch": "2.13.0"}}
    return {"rows": [asdict(row) for row in rows], "machine": machine, "commit": "abcdef0123"}


def test_a_peer_that_is_better_is_named(bench: Any) -> None:
    """Eager and the driver alone are no peers, and 1 % is noise."""
    found = record(bench)
    assert bench.losses([bench.Row(**row) for row in found["rows"]]) == ["a net: mega has artifact_mb 1.0, ours 2.0"]
    text = bench.table(found)
    assert "no GPU, 2 cores, torch 2.13.0, commit abcdef0" in text
    assert "| a net | aot |  | 2 | 2 | 0.3 | 0 | 8.1 |  |  |" in text
    assert text.endswith("Where a peer is better:\n\n- a net: mega has artifact_mb 1.0, ours 2.0\n")


def test_a_peer_that_failed_is_named(bench: Any) -> None:
    found = {
        **record(bench),
        "records": {"mlps": {"failed": {"aoti": "aoti failed with exit code -11:\nFatal Python"}}},
    }
    assert bench.table(found).endswith(
        "What failed, and has no figures:\n\n- mlps, aoti: aoti failed with exit code -11:\n"
    )


def test_a_record_is_drawn_on_another_machine(bench: Any, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "record.json"
    file.write_text(json.dumps(record(bench)))
    subprocess.run([sys.executable, str(SCRIPT), "--draw", str(file)], check=True, timeout=HANGS)
    assert (
        file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
        and "| kernels |" in file.with_suffix(".md").read_text()
    )


def test_an_unknown_subject_is_an_error() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--only", "all"], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "error: expected mlps, kernels, start, found all\n"
