#!/usr/bin/env python3
"""Build other packages' kernels with the GPU hidden, make their first calls inside CUDA graph captures, and write one record.

    PYTHONPATH=FOLDER:FOLDER python tools/gpu/check_third_party.py [--only liger,gemlite_gemm] [--points 16] [--out RECORD.json]

The recipes are those of tests/third_party; the packages are in the folders, as their authors publish them. Where a bundle
has choices to make, `aot-cache tune` makes them on the GPU first. A package that cannot be imported there is named, and is no
failure. Exit code 0 when in every case of the others all points hit inside captures (but for functions that read from the
GPU: no capture can have them), and results are close to eager.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import cli, commit, finish, machine, summary
from third_party_packages import FOLDER, PACKAGES

from aot_cache.artifact.manifest import whole
from aot_cache.store import read_bundle

Json = Any
FIRST = (
    "liger",
    "torchao_intmm",
    "bitsandbytes_4bit",
    "xformers_rope",
    "xformers_splitk",
    "sglang_attention",
    "fla_delta",
    "gemlite_gemm",
)
ORDER = [*FIRST, *(name for name in PACKAGES if name not in FIRST)]
"""Quick builds first, because the time on the GPU may end before the last one."""


def importable(recipe: str) -> str:
    """Why a recipe cannot be imported with the GPU visible; empty if it can."""
    code = f"import sys; sys.path[:0] = [{str(FOLDER)!r}, {str(FOLDER.parents[1])!r}]; import {recipe}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1][:300]


def one(recipe: str, target: str, points: int) -> Json:
    """Build a bundle in an empty folder; with target `native` also tune it if it has choices, and rehearse it."""
    package = PACKAGES[recipe]
    record: Json = {"package": package.distribution, "function": package.functions, "passed": False}
    try:
        record["version"] = importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        record["version"] = ""  # copied here without its metadata
    if target == "native" and (why := importable(recipe)):
        return {**record, "imports": why}
    with tempfile.TemporaryDirectory(prefix="third-party-") as scratch:
        folder, paths, began = Path(scratch), [str(FOLDER)], time.perf_counter()
        told = ["--model", f"{recipe}:recipe", "--target", target, "--store", "store", "--json"]
        built = cli("build", *told, folder=folder, paths=paths)
        record["build_s"] = round(time.perf_counter() - began, 1)
        if not built.stdout.startswith("{"):
            return {**record, "error": built.stderr[-1500:]}
        said = json.loads(built.stdout)["bundles"][0]
        record |= {key: said[key] for key in ("units", "graphs", "declared", "covered", "coverage", "failed")}
        if target != "native":
            return {**record, "passed": built.returncode == 0}
        path = said["path"]
        if whole(read_bundle(Path(path))).tunings:
            began, path = time.perf_counter(), str(folder / "tuned.safetensors")
            told = ["--out", path, "--points", "1", "--json"]
            tuned = cli("tune", said["path"], *told, folder=folder, paths=paths)
            record["tune_s"] = round(time.perf_counter() - began, 1)
            if tuned.returncode:
                return {**record, "error": tuned.stderr[-1500:]}
        began = time.perf_counter()
        run = cli("rehearse", path, "--points", str(points), "--json", folder=folder, paths=paths)
        record["rehearse_s"] = round(time.perf_counter() - began, 1)
        if not run.stdout.startswith("{"):
            return {**record, "error": run.stderr[-1500:]}
        cases = [summary(case) for case in json.loads(run.stdout)["cases"]]
    outside = [case["name"] for case in cases if case["not_captured"]]
    captured = set(outside) <= set(package.uncapturable)
    passed = run.returncode == 0 and not said["failed"] and captured
    return {**record, "cases": cases, "passed": passed, "outside_captures": outside}


def proved(record: Json) -> list[str]:
    """The functions whose points all hit inside captures, without an event, and close to eager."""
    return [
        f"{found['package']}:{case['name']}"
        for found in record["bundles"].values()
        for case in found.get("cases", [])
        if case["hits"] == case["run"] and not case["events"] and not case["not_captured"] and not case["why"]
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(ORDER))
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--target", default="native", help="another one is only built, which needs no GPU")
    parser.add_argument("--out")
    options = parser.parse_args()
    record: Json = {"what": "functions of other packages, rehearsed on a GPU", "commit": commit(), "machine": machine()}
    record |= {"bundles": {}, "claims": {}, "first_calls_inside_captures": []}
    for recipe in options.only.split(","):
        found = record["bundles"][recipe] = one(recipe, options.target, options.points)
        if not found.get("imports"):
            record["claims"][recipe] = found["passed"]
        record["first_calls_inside_captures"] = proved(record)
        if options.out:  # keep the results so far, in case the next one takes too long
            Path(options.out).write_text(json.dumps(record, indent=1) + "\n")
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
