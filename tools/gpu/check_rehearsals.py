#!/usr/bin/env python3
"""Build bundles with the GPU hidden, rehearse them on it inside CUDA graph captures, and print one JSON record.

    python tools/gpu/check_rehearsals.py [--only calls,models,qwen] [--points 16] [--out RECORD.json]

`calls` are ordinary users' compiled functions and `models` models of transformers (tests/graphs); `qwen` is Qwen3.5 0.8B
with its drafts. Exit code 0 when every chosen point hit, inside a capture, and is close to eager.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import SAMPLES, cli, commit, finish, machine, summary

Json = Any
RECIPE = "aot_cache.models.qwen3_5.recipe:recipe"  # its short name needs an installed aot-cache
QWEN = f"--model {RECIPE} --spec mtp --max-batch 4 --option prefill_chunk=32".split()
BUNDLES: dict[str, tuple[list[str], list[str]]] = {
    "calls": (["--model", "sample_calls:captured"], []),
    "models": (["--model", "sample_hf:captured"], []),
    "qwen": (QWEN, []),
}
"""Name → (arguments of `build`, further arguments of `rehearse`)."""


def one(name: str, points: int) -> Json:
    """Build and rehearse a bundle in an empty folder."""
    build, more = BUNDLES[name]
    with tempfile.TemporaryDirectory(prefix="rehearse-") as scratch:
        folder, began = Path(scratch), time.perf_counter()
        built = cli("build", *build, "--target", "native", "--store", "store", "--json", folder=folder, paths=[SAMPLES])
        record: Json = {"build": " ".join(build), "build_s": round(time.perf_counter() - began, 1), "passed": False}
        if not built.stdout.startswith("{"):
            return {**record, "error": built.stderr[-1500:]}
        said = json.loads(built.stdout)["bundles"][0]
        record |= {key: said[key] for key in ("units", "graphs", "declared", "covered", "coverage", "failed")}
        began, told = time.perf_counter(), ["--points", str(points), "--stamp", "--json"]
        run = cli("rehearse", said["path"], *told, *more, folder=folder, paths=[SAMPLES])
        record["rehearse_s"] = round(time.perf_counter() - began, 1)
        if not run.stdout.startswith("{"):
            return {**record, "error": run.stderr[-1500:]}
        found = json.loads(run.stdout)
        inspected = cli("inspect", said["path"], "--json", folder=folder, paths=[SAMPLES])
        record["shown"] = json.loads(inspected.stdout)["coverage"] if inspected.stdout.startswith("{") else ""
    record["cases"] = [summary(case) for case in found["cases"]]
    captured = all(not case["not_captured"] for case in record["cases"])
    return {**record, "passed": run.returncode == 0 and not said["failed"], "all_inside_captures": captured}


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
        if options.out:  # keep the results so far, in case the next one takes too long
            Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
