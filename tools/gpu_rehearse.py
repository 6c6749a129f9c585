#!/usr/bin/env python3
"""Build bundles with the GPU hidden, rehearse them on it inside CUDA graph captures, and print one JSON record.

    python tools/gpu_rehearse.py [--only calls,models,qwen] [--points 16] [--out RECORD.json]

`calls` are ordinary users' compiled functions and `models` models of transformers (tests/graphs); `qwen` is Qwen3.5 0.8B
with its drafts. Exit code 0 when every chosen point hit, inside a capture, and is close to eager.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu_check import commit, finish, machine

ROOT = Path(__file__).resolve().parent.parent
Json = Any
RECIPE = "aot_cache.models.qwen3_5.recipe:recipe"  # its short name is known where aot-cache is installed
QWEN = f"--model {RECIPE} --spec mtp --max-batch 4 --option prefill_chunk=32".split()
BUNDLES: dict[str, tuple[list[str], list[str]]] = {
    "calls": (["--model", "sample_calls:captured"], []),
    "models": (["--model", "sample_hf:captured"], []),
    "qwen": (QWEN, []),
}
"""Name → what `build` is told, and what `rehearse` is told besides."""


def cli(folder: Path, *arguments: str, paths: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run aot-cache in `folder`, with the tests' samples and `paths` to import from."""
    paths = [*paths, str(ROOT), str(ROOT / "tests" / "graphs"), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "aot_cache", *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )


def one(name: str, points: int) -> Json:
    """Build and rehearse a bundle in an empty folder."""
    build, more = BUNDLES[name]
    with tempfile.TemporaryDirectory(prefix="rehearse-") as scratch:
        folder, began = Path(scratch), time.perf_counter()
        built = cli(folder, "build", *build, "--target", "native", "--store", "store", "--json")
        record: Json = {"build": " ".join(build), "build_s": round(time.perf_counter() - began, 1), "passed": False}
        if not built.stdout.startswith("{"):
            return {**record, "error": built.stderr[-1500:]}
        said = json.loads(built.stdout)["bundles"][0]
        record |= {key: said[key] for key in ("units", "graphs", "declared", "covered", "coverage", "failed")}
        began = time.perf_counter()
        run = cli(folder, "rehearse", said["path"], "--points", str(points), "--stamp", "--json", *more)
        record["rehearse_s"] = round(time.perf_counter() - began, 1)
        if not run.stdout.startswith("{"):
            return {**record, "error": run.stderr[-1500:]}
        found = json.loads(run.stdout)
        inspected = cli(folder, "inspect", said["path"], "--json")
        record["shown"] = json.loads(inspected.stdout)["coverage"] if inspected.stdout.startswith("{") else ""
    record["cases"] = [summary(case) for case in found["cases"]]
    captured = all(not case["not_captured"] for case in record["cases"])
    return {**record, "passed": run.returncode == 0 and not said["failed"], "all_inside_captures": captured}


def summary(case: Json) -> Json:
    """What a record says of a case: numbers, and the reasons of what did not hit."""
    why = {f"{point['status']}: {point['why'][:300]}" for point in case["points"] if point["status"] != "hit"}
    names = ("name", "declared", "run", "hits", "events", "distance", "not_captured")
    return {**{key: case[key] for key in names}, "why": sorted(why)[:4]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BUNDLES))
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--out")
    options = parser.parse_args()
    record: Json = {"what": "rehearsals on a GPU", "commit": commit(), "machine": machine(), "bundles": {}}
    for name in options.only.split(","):
        record["bundles"][name] = one(name, options.points)
        record["claims"] = {key: found["passed"] for key, found in record["bundles"].items()}
        if options.out:  # what is there is kept, should the next one take too long
            Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
