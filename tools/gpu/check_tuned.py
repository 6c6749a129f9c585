#!/usr/bin/env python3
"""Check on a real GPU how configs of Inductor's kernels are chosen, and print one JSON record.

    python tools/gpu/check_tuned.py [--out RECORD.json]

The bundle of `tuned.py` is built with the GPU hidden. Then, each in a fresh process with empty caches: `untuned` serves it
as it is, `ready` tunes at start-up, `tuned` serves what `aot-cache tune` wrote, `plain` is ordinary `torch.compile`, which
measures at first calls. Each captures calls and times replays at the largest point. Exit code 0 when every claim holds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from harness import (
    NO_COMPILER,
    Independent,
    build,
    commit,
    distance,
    eager,
    finish,
    hand_over,
    run_part,
    tune,
    versions,
)

from aot_cache.runtime.ledger import HARMFUL

POINTS = (2, 3, 64, 1000, 1024)
ROUNDS = 3
Json = Any


def part(name: str, bundle: str) -> Json:
    """Capture every case at `POINTS`. Returns microseconds of a replay at the last, relative norms against eager, and events."""
    import torch
    import torch._dynamo

    import aot_cache
    from aot_cache.recipes import declare as recipes

    ours = name != "plain"
    if ours:
        aot_cache.load(bundle, strict=True)
    recipe = recipes.load("tuned:recipe")
    torch.zeros(1, device="cuda")
    independent = Independent()
    if ours:
        aot_cache.ready(strict=True)
        if name == "ready":
            aot_cache.ready(tune=True)
        aot_cache.seal()
    before, out = dict(independent.counts), {}
    independent.counts.clear()
    for case in recipe.cases:
        errors = {}
        for n in POINTS:
            with case.modes():
                call = case.call({"n": n})
                if not ours:
                    call()  # compiles and measures
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    found = call()
                graph.replay()
                errors[n] = distance(found, eager(call))
        out[case.name] = {"errors": errors, "replay_us": time_of(graph)}
    after = {k: v for k, v in independent.counts.items() if v}
    ledger = {k: v for k, v in aot_cache.stats()["after_seal"].items() if v}
    tuned = Counter(f"{event['kind']} {event['name']}" for event in aot_cache.stats()["events"])
    return {"cases": out, "events": dict(tuned), "before": before, "after": after, "ledger_after_seal": ledger}


def time_of(graph: Any) -> float:
    """Microseconds of a replay: the median of 9 measurements of 200 replays."""
    import torch

    times = []
    for _ in range(9):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(200):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 200)
    return statistics.median(times)


def run(name: str, bundle: str) -> Json:
    """Run one part in a fresh process with empty caches; parts with a bundle run without a C compiler."""
    return run_part(__file__, name, ["--bundle", bundle], 300, **({} if name == "plain" else NO_COMPILER))


def claims(record: Json) -> dict[str, bool]:
    """Claim → whether the record shows it."""
    parts = {name: record[name][0] for name in ("untuned", "ready", "tuned", "plain")}
    broken = [name for name, found in parts.items() if "error" in found] + ["tune"] * ("error" in record["tune"])
    if broken:
        return {f"{', '.join(broken)} ran": False}
    served = [parts[name] for name in ("untuned", "ready", "tuned")]
    errors = [e for found in served for case in found["cases"].values() for e in case["errors"].values()]
    fastest = {
        name: {case: min(r["cases"][case]["replay_us"] for r in record[name]) for case in parts["plain"]["cases"]}
        for name in parts
    }
    record["replay_us"] = fastest
    record["over_plain"] = {n: {c: t / fastest["plain"][c] for c, t in f.items()} for n, f in fastest.items()}
    return {
        "no event after ready, in the ledger": not any(
            set(HARMFUL) & set(found["ledger_after_seal"]) for found in served
        ),
        "no event after ready, by independent hooks": not any(found["after"] for found in served),
        "as eager computes it, to bfloat16's rounding": max(errors) < 1e-2,
        "ready(tune=True) measured": parts["ready"]["before"].get("benchmark", 0) > 1,
        "without it nothing is measured": not parts["untuned"]["before"].get("benchmark"),
        "aot-cache tune chose": record["tune"]["measured_in_graphs"] >= 2,
        "what it chose is not measured again": not parts["tuned"]["before"].get("benchmark"),
    }


def check(folder: Path) -> Json:
    """Run all parts; returns the record."""
    import torch

    record: Json = {
        "what": "configs of Inductor's kernels: chosen ahead, tuned, or measured by ordinary torch.compile",
        "commit": commit(),
        "machine": torch.cuda.get_device_name(0),
        "versions": versions(),
        "build": build("tuned:recipe", "h200", folder),
    }
    if "error" in record["build"]:
        return {**record, "claims": {"the bundle was built": False}}
    bundle, chosen = record["build"].pop("path"), folder / "chosen.safetensors"
    record["tune"] = tune(bundle, chosen)
    for _ in range(ROUNDS):
        for name in ("untuned", "ready", "tuned", "plain"):
            record.setdefault(name, []).append(run(name, str(chosen) if name == "tuned" else bundle))
    record["claims"] = claims(record)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part")
    parser.add_argument("--bundle", default="")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.part:
        return hand_over(part(options.part, options.bundle))
    with tempfile.TemporaryDirectory() as folder:
        record = check(Path(folder))
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
