#!/usr/bin/env python3
"""Build other packages' kernels by the recipes of tests/third_party, each in a process of its own, without a GPU.

    python tools/bench/build_third_party.py --paths FOLDER:FOLDER [--targets h200,mi300x] [--only liger,…] [--out RECORD.json]

Prints a table, and writes one JSON record. In the folders are the packages as their authors publish them. A record that is
there is added to: what was built before and is not named now stays. Exit code 0 when nothing failed that is ours.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from harness import ROOT, commit, machine
from third_party_packages import FOLDER, PACKAGES

Json = Any
PATIENCE = 1500.0
"""Seconds for one build: for hangs only."""


RULES: tuple[tuple[str, str], ...] = (
    (
        r"no CUDA kernel, only CPU",
        "theirs",
    ),  # its library found no GPU of its kind, and registered its operator for the CPU
    (r"no module named 'amdsmi'|No module named 'amdsmi'", "theirs"),
    (r"CompilationError|PassManager|MLIR|triton/(language|compiler|backends)|does not compile", "upstream (Triton)"),
    (r"type fp8e4nv not supported", "upstream (Triton)"),
)
"""What a reason says → whose it is. What no rule names is ours."""


def whose(reason: str) -> str:
    return next((owner for pattern, owner in RULES if re.search(pattern, reason)), "ours")


def version(distribution: str, paths: list[str]) -> str:
    found = importlib.metadata.distributions(name=distribution, path=[*paths, *sys.path])
    return next((one.version for one in found), "") or _version_in_source(distribution, paths)


def _version_in_source(distribution: str, paths: list[str]) -> str:
    """Of a package that is there as its repository, without metadata."""
    for source in (Path(path, distribution, "__init__.py") for path in paths):
        said = re.search(r'^__version__ *= *"(.+?)"', source.read_text(), re.M) if source.exists() else None
        if said:
            return said[1]
    return ""


def lines(recipe: str) -> int:
    """Lines of code of a recipe: imports, blank lines and words for people are none."""
    text = re.sub(r'^""".*?"""', "", (FOLDER / f"{recipe}.py").read_text(), flags=re.S)
    return sum(not re.match(r"\s*(#|import |from |$)", line) for line in text.splitlines())


def build(recipe: str, target: str, paths: list[str], store: str) -> Json:
    """One build in an empty folder, with its own empty store unless one is named."""
    with tempfile.TemporaryDirectory(prefix="third-party-") as scratch:
        command = ["--model", f"{recipe}:recipe", "--target", target, "--out", f"{scratch}/x.safetensors", "--json"]
        began = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-m", "aot_cache", "build", *command, "--store", store or f"{scratch}/store"],
                env={
                    **os.environ,
                    "CUDA_VISIBLE_DEVICES": "",
                    "AOT_CACHE_UNTESTED": "1",
                    "PYTHONPATH": os.pathsep.join([str(ROOT), str(FOLDER), *paths]),
                },
                cwd=scratch,
                capture_output=True,
                text=True,
                check=False,
                timeout=PATIENCE,
            )
        except subprocess.TimeoutExpired:
            return {"imports": False, **_nothing("it did not end", paths), "seconds": PATIENCE}
        seconds = round(time.perf_counter() - began, 1)
        plan = Path(scratch, "x.plan.json")
        if '"bundles"' not in done.stdout:
            last = next((line for line in done.stderr.splitlines() if line.startswith("error:")), done.stderr[-500:])
            imports = "error: cannot import" not in last
            return {"imports": imports, **_nothing(last, paths), "seconds": seconds, "exit": done.returncode}
        said = json.loads(done.stdout)["bundles"][0]
        kernels = sorted({unit["kernel"] for unit in json.loads(plan.read_text())["units"]})
    return {
        "imports": True,
        "specializations": said["units"],
        "graphs": said["graphs"],
        "kernels": [kernel.rpartition(":")[2] for kernel in kernels],
        "points": said["covered"],
        "compiled": said["compiled"],
        "failures": [_failure(json.dumps(failed), paths) for failed in said["failed"]],
        "seconds": seconds,
        "exit": done.returncode,
    }


def _nothing(reason: str, paths: list[str]) -> Json:
    nothing: Json = {"specializations": 0, "graphs": 0, "kernels": [], "points": 0, "compiled": 0}
    return {**nothing, "failures": [_failure(reason, paths)]}


def _failure(reason: str, paths: list[str]) -> Json:
    for path in sorted([*paths, str(ROOT)], key=len, reverse=True):  # a record names no folder of its machine
        reason = reason.replace(f"{path.rstrip('/')}/", "")
    reason = re.sub(r"(/[\w.+-]+)+/site-packages/", "", reason)
    return {"reason": reason[:600], "whose": whose(reason)}


def table(builds: list[Json]) -> Iterator[str]:
    """Markdown: a row for each recipe and target."""
    yield "| package | function | target | imports | specializations | kernels | points | failures, and whose | seconds |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for one in builds:
        failures = "; ".join(f"**{failed['whose']}**: {failed['reason'][:160]}" for failed in one["failures"]) or "none"
        cells = [
            f"{one['package']} {one['version']}",
            f"`{one['function']}`",
            one["target"],
            "yes" if one["imports"] else "no",
            str(one["specializations"]),
            str(len(one["kernels"])),
            str(one["points"]),
            failures.replace("|", "\\|").replace("\n", " "),
            f"{one['seconds']:.0f}",
        ]
        yield f"| {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--paths", default="", help="folders to import from, separated as in PYTHONPATH")
    parser.add_argument("--targets", default="h200,mi300x")
    parser.add_argument("--only", default=",".join(PACKAGES))
    parser.add_argument("--store", default="", help="a store that is kept: what is in it is not compiled again")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    paths = [path for path in options.paths.split(os.pathsep) if path]
    wanted = [(recipe, target) for recipe in options.only.split(",") for target in options.targets.split(",")]
    record: Json = {"what": "functions of other packages, built without a GPU", "builds": []}
    if options.out and options.out.exists():
        record = json.loads(options.out.read_text())
    record |= {"commit": commit(), "machine": machine()}
    for recipe, target in wanted:
        package = PACKAGES[recipe]
        about: Json = {
            "recipe": recipe,
            "package": package.distribution,
            "version": version(package.distribution, paths),
        }
        about |= {"function": package.functions, "target": target, "lines": lines(recipe), "note": package.note}
        kept = [one for one in record["builds"] if (one["recipe"], one["target"]) != (recipe, target)]
        record["builds"] = sorted([*kept, {**about, **build(recipe, target, paths, options.store)}], key=_order)
        if options.out:  # what is there is kept, should the next one take too long
            options.out.write_text(json.dumps(record, indent=1) + "\n")
    print("\n".join(table(record["builds"])))
    return int(any(failed["whose"] == "ours" for one in record["builds"] for failed in one["failures"]))


def _order(one: Json) -> tuple[int, str]:
    return list(PACKAGES).index(one["recipe"]), one["target"]


if __name__ == "__main__":
    sys.exit(main())
