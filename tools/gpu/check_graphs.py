#!/usr/bin/env python3
"""Check on a real GPU what aot-cache claims of compiled graphs, and print one JSON record.

    python tools/gpu/check_graphs.py [--recipe layers:recipe] [--bundle BUNDLE] [--target h200] [--every 1] [--out RECORD.json]

Without `--bundle` it is built first, with the GPU and its driver library hidden, on two cores. Then, each in a fresh
process with empty caches: `serve` makes every declared point's first call inside a capture; `plain` is the same with
ordinary `torch.compile`, for the numerics that ours are held against. Exit code 0 when every claim holds.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import NO_COMPILER, Independent, build, commit, distance, eager, finish, hand_over, run_part, versions

from aot_cache.runtime.ledger import HARMFUL

Json = Any
COMPARED = 8
"""Number of points of each case at which numerics are compared with ordinary `torch.compile`."""


def compared(points: list[dict[str, int]]) -> list[int]:
    """Indices of evenly spread points with both ends, the same on every run."""
    last = len(points) - 1
    return sorted({round(last * n / (COMPARED - 1)) for n in range(COMPARED)})


def make_weights(recipe: Any) -> None:
    """Create the modules of each case, which caches them, so that every part has the same weights."""
    import torch

    from aot_cache.recipes.dimensions import enumerate_points

    for case in recipe.cases:
        torch.manual_seed(0)
        with case.modes():
            eager(case.call(enumerate_points(case.dims).points[0]))


def prime_libraries() -> None:
    """Use cuBLAS and cuDNN once: they create their handles at first use, which no capture allows, with or without aot-cache."""
    import torch

    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream), torch.no_grad():
            for dtype in (torch.bfloat16, torch.float32):
                w = torch.randn(64, 64, device="cuda", dtype=dtype)
                w @ w, torch.bmm(w[None], w[None]), torch.baddbmm(w[None], w[None], w[None])
                torch.nn.functional.conv1d(w[None], torch.randn(64, 1, 4, device="cuda", dtype=dtype), groups=64)
    torch.cuda.synchronize()


def part_serve(options: argparse.Namespace) -> Json:
    """With the bundle: make every point's first call inside a capture."""
    began = time.perf_counter()
    import torch

    import aot_cache
    from aot_cache.recipes import declare as recipes
    from aot_cache.recipes.dimensions import enumerate_points

    aot_cache.load(options.bundle, strict=True)
    recipe = recipes.load(options.recipe)
    import torch._dynamo

    independent = Independent()
    imported = time.perf_counter() - began
    torch.zeros(1, device="cuda")
    prime_libraries()
    independent.watch_driver()
    independent.counts.clear()
    began = time.perf_counter()
    aot_cache.ready(strict=True)
    ready_seconds = time.perf_counter() - began
    while_loading = dict(independent.counts)
    independent.counts.clear()
    aot_cache.seal()
    make_weights(recipe)
    errors: dict[str, dict[str, float]] = {}
    failed, captured, slowest, stream = [], 0, 0.0, torch.cuda.Stream()
    for case in recipe.cases:
        points = enumerate_points(case.dims).points
        check = set(compared(points))
        for number in sorted({*range(0, len(points), options.every), *check}):
            name = ", ".join(f"{k}={v}" for k, v in points[number].items())
            try:
                with case.modes():
                    torch.manual_seed(number)
                    call = case.call(points[number])
                    graph = torch.cuda.CUDAGraph()
                    torch.cuda.synchronize()
                    began = time.perf_counter()
                    with torch.cuda.graph(graph, stream=stream):
                        out = call()
                    slowest = max(slowest, time.perf_counter() - began)
                    graph.replay()
                    torch.cuda.synchronize()
                    captured += 1
                    if number in check:
                        errors.setdefault(case.name, {})[name] = distance(out, eager(call))
            except Exception as lost:
                failed.append(f"{case.name} {name}: {type(lost).__name__}: {str(lost).splitlines()[0][:200]}")
                with contextlib.suppress(Exception), case.modes():
                    failed.append(str(aot_cache.explain(call))[:1500])
                if len(failed) > 20:
                    break
    stats = aot_cache.stats()
    return {
        "captured": captured,
        "failed": failed,
        "import_seconds": round(imported, 2),
        "ready_seconds": round(ready_seconds, 3),
        "slowest_first_call_seconds": round(slowest, 4),
        "events_while_loading": while_loading,
        "independent_after_ready": dict(independent.counts),
        "ledger_after_seal": {k: v for k, v in stats["after_seal"].items() if v},
        "events": dict(Counter(f"{e['kind']} {e['name']}" for e in stats["events"] if e["sealed"])),
        "graphs": stats["graphs"],
        "errors": errors,
    }


def part_plain(options: argparse.Namespace) -> Json:
    """Ordinary `torch.compile` at the compared points: numerics, and events."""
    import torch
    from torch._dynamo import config

    from aot_cache.recipes import declare as recipes
    from aot_cache.recipes.dimensions import enumerate_points

    config.assume_static_by_default = False  # dynamic from the first call, as the bundle's graphs are
    recipe = recipes.load(options.recipe)
    independent = Independent()
    make_weights(recipe)
    errors: dict[str, dict[str, float]] = {}
    for case in recipe.cases:
        points = enumerate_points(case.dims).points
        for number in compared(points)[::-1]:
            name = ", ".join(f"{k}={v}" for k, v in points[number].items())
            with case.modes():
                torch.manual_seed(number)
                call = case.call(points[number])
                errors.setdefault(case.name, {})[name] = distance(call(), eager(call))
    return {"errors": errors, "events": dict(independent.counts)}


# --- putting it together -----------------------------------------------------------------------------------------------


def typical(errors: dict[str, dict[str, float]]) -> dict[str, float]:
    """Root mean square of each case's relative norms, because that of a single small tensor varies by 10 %."""
    return {case: (sum(e * e for e in found.values()) / len(found)) ** 0.5 for case, found in errors.items()}


def claims(record: Json) -> dict[str, bool]:
    """Claim → whether the record shows it."""
    serve, plain = record["serve"], record["plain"]
    if "error" in serve or "error" in plain:
        return {"both parts ran": False}
    ours, theirs = typical(serve["errors"]), typical(plain["errors"])
    record["relative_norms"] = {case: [ours[case], theirs[case]] for case in theirs}
    worst = max((ours[c] / theirs[c] for c in theirs if theirs[c] > 0), default=0.0)
    record["worst_ratio"] = worst
    return {
        "every declared point captured at its first call": serve["captured"] > 0 and not serve["failed"],
        "ledger: zero events after ready": not set(HARMFUL) & set(serve["ledger_after_seal"]),
        "independent hooks: zero events after ready": not serve["independent_after_ready"],
        "numerics no worse than ordinary torch.compile's times 1.05": worst <= 1.05,
        "without the bundle the same calls compile": plain["events"].get("frame", 0) > 0,
    }


def check(options: argparse.Namespace) -> Json:
    """Run all parts; returns the record."""
    import torch

    with contextlib.ExitStack() as stack:
        store = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        record: Json = {
            "what": "compiled graphs: first call inside a capture",
            "commit": commit(),
            "recipe": options.recipe,
            "machine": torch.cuda.get_device_name(0),
            "versions": versions(),
        }
        bundle = options.bundle
        if not bundle:
            record["build"] = build(options.recipe, options.target, store, cores=options.cores)
            if "error" in record["build"]:
                return {**record, "claims": {"the bundle was built": False}}
            bundle = record["build"].pop("path")
            if options.keep:
                Path(options.keep).write_bytes(Path(bundle).read_bytes())
        told = ["--recipe", options.recipe, "--every", str(options.every), "--bundle", bundle]
        record["serve"] = run_part(__file__, "serve", told, **NO_COMPILER)
        record["plain"] = run_part(__file__, "plain", told)
        record["claims"] = claims(record)
    return record


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="layers:recipe")
    parser.add_argument("--bundle")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--cores", default="0,1", help="that the build may use")
    parser.add_argument("--every", type=int, default=1, help="of the declared points, capture each n-th")
    parser.add_argument("--keep", help="where to leave the bundle that was built")
    parser.add_argument("--part")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.part:
        return hand_over(globals()[f"part_{options.part}"](options))
    return finish(check(options), options.out)


if __name__ == "__main__":
    sys.exit(main())
