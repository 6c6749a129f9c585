#!/usr/bin/env python3
"""Build bundles for the CPU, rehearse them with real tensors, and print one JSON record: kind of call → what came of it.

    python tools/bench/rehearse_calls.py [--only calls,models,subclasses] [--also FOLDER] [--out RECORD.json]

`calls` are ordinary users' compiled functions, `models` models of transformers, `subclasses` tensors of other types
(tests/graphs). FOLDER has further modules, each with a `recipe`; those with Triton kernels are built for h200 and only counted.
Exit code 0 when every point of the named ones hit and is close to eager.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from harness import SAMPLES, cli, commit, finish, machine, summary

Json = Any
RECIPES = {
    "calls": "sample_calls:recipe",
    "models": "sample_hf:recipe",
    "subclasses": "sample_subclasses:recipe",
}


def one(recipe: str, target: str, *paths: str) -> Json:
    """Build a recipe in an empty folder; a build for the CPU rehearses."""
    with tempfile.TemporaryDirectory(prefix="rehearse-") as scratch:
        arguments = f"build --model {recipe} --target {target} --store store --json".split()
        built = cli(*arguments, folder=Path(scratch), paths=[*paths, SAMPLES])
    if not built.stdout.startswith("{"):
        return {"exit": built.returncode, "passed": False, "error": built.stderr[-500:]}
    said = json.loads(built.stdout)["bundles"][0]
    record = {"exit": built.returncode, "passed": built.returncode == 0}
    record |= {key: said[key] for key in ("units", "graphs", "declared", "covered", "coverage", "failed")}
    rehearsal = said["rehearsal"]
    return {**record, "cases": [summary(case) for case in rehearsal["cases"]] if rehearsal else []}


def modules(folder: Path) -> Iterator[tuple[str, str]]:
    """(name, target) of the modules with a recipe."""
    for path in sorted(folder.glob("*.py")):
        text = path.read_text()
        if "\nrecipe = " in text:
            yield path.stem, "h200" if re.search(r"^(import|from)\b.*\btriton\b", text, re.M) else "cpu"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(RECIPES))
    parser.add_argument("--also", type=Path)
    parser.add_argument("--out")
    options = parser.parse_args()
    record: Json = {"what": "rehearsals on the CPU", "commit": commit(), "machine": machine(), "bundles": {}}
    for name in options.only.split(","):
        record["bundles"][name] = one(RECIPES[name], "cpu")
    record["claims"] = {name: found["passed"] for name, found in record["bundles"].items()}
    if options.also:
        record["also"] = {
            name: one(f"{name}:recipe", target, str(options.also)) for name, target in modules(options.also)
        }
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
