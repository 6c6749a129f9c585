#!/usr/bin/env python3
"""Check on a real GPU what aot-cache claims of kernels, and print one JSON record.

    python tools/gpu/check_kernels.py --bundle BUNDLE [--points 64] [--out RECORD.json] [--only capture,without,parity,tune]

Every part runs in a fresh process with empty caches. `without` is the same as `capture` without the bundle: it shows what
happens today, and that the check can fail. Exit code 0 when every claim holds.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from harness import Independent, commit, distance, finish, hand_over, machine, run_part, tune

Json = Any
NOT_CAPTURABLE = {"prefill_packed"}
"""Cases whose host code reads a tensor's values (a copy to the host), which no capture allows, with or without aot-cache."""
TOLERANCE = 1e-2  # relative norm, bf16


# --- what every part needs ---------------------------------------------------------------------------------------------


def chosen_points(recipe: Any, count: int) -> list[tuple[Any, dict[str, int]]]:
    """(case, point) for at least `count` points: both ends of every case, and points spread pseudo-randomly between them."""
    from aot_cache.recipes.dimensions import enumerate_points

    out = []
    for case in recipe.cases:
        points = enumerate_points(case.dims).points
        share = max(4, -(-count // len(recipe.cases)))
        picks = {0, len(points) - 1}
        step = 0
        while len(picks) < min(share, len(points)):
            step += 1
            picks.add((step * 2654435761) % len(points))  # spread over odd and even, the same on every run
        out += [(case, points[index]) for index in sorted(picks)]
    return out


def clone_call(call: Any) -> Any:
    """The same call with copies of its tensors."""
    import torch

    from aot_cache import Call

    def copy(value: Any) -> Any:
        return value.clone() if isinstance(value, torch.Tensor) else value

    return Call(call.fn, *[copy(a) for a in call.args], **{k: copy(v) for k, v in call.kwargs.items()})


def capture_first_call(call: Any) -> tuple[Any, Any]:
    """Call for the first time inside a capture. Returns (graph, static outputs)."""
    import torch

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


# --- the parts, each in its own process --------------------------------------------------------------------------------


def part_capture(options: argparse.Namespace) -> Json:
    """Make the first call inside a capture at every chosen point; with `--no-bundle` without aot-cache."""
    independent = Independent(kernels=True)
    import torch

    import aot_cache
    from aot_cache.recipes import declare as recipes
    from aot_cache.runtime import loader

    began = time.perf_counter()
    if options.bundle:
        aot_cache.load(options.bundle, strict=True)
        assert not torch.cuda.is_initialized(), "load initialised CUDA"
    else:
        loader.arm("observe")  # the ledger counts, nothing is installed
    recipe = recipes.load(options.recipe)
    imported = time.perf_counter() - began
    torch.zeros(1, device="cuda")
    from triton.runtime.driver import driver

    _ = driver.active.utils
    independent.watch_driver()
    began = time.perf_counter()
    if options.bundle:
        aot_cache.ready(strict=True)
    load_seconds = time.perf_counter() - began
    during_load = dict(independent.counts)
    independent.counts.clear()
    aot_cache.seal()
    points = chosen_points(recipe, options.points)
    failures, worst, per_point = [], 0.0, []
    for case, point in points:
        before = Counter(independent.counts)
        try:
            off = one_point(case, point)
            worst = max(worst, off)
            error = "" if off < TOLERANCE else f"replay differs from eager by {off:.3g}"
        except Exception as lost:
            error = f"{type(lost).__name__}: {str(lost).splitlines()[0][:160]}"
        seen = dict(independent.counts - before)
        per_point.append({"point": f"{case.name} {point}", "events": seen})
        if error:
            failures.append({"point": f"{case.name} {point}", "error": error})
    stats = aot_cache.stats()
    return {
        "points": len(points),
        "captured_points": sum(1 for c, _ in points if c.name not in NOT_CAPTURABLE),
        "cases": {c.name: sum(1 for k, _ in points if k is c) for c in recipe.cases},
        "import_seconds": round(imported, 3),
        "ready_seconds": round(load_seconds, 4),
        "events_during_load": during_load,
        "independent_events_after_ready": dict(independent.counts),
        "ledger_after_seal": {k: v for k, v in stats["after_seal"].items() if v},
        "ledger_total": {k: v for k, v in stats["total"].items() if v},
        "ledger_in_capture": {k: v for k, v in stats["in_capture"].items() if v},
        "harmful_events_by_name": dict(Counter(f"{e['kind']} {e['name']}" for e in stats["events"] if e["sealed"])),
        "failed_points": failures,
        "points_with_events": sum(1 for p in per_point if p["events"]),
        "worst_relative_norm": worst,
        "bundles": stats["bundles"],
    }


def one_point(case: Any, point: dict[str, int]) -> float:
    """Make the first call at `point` inside a capture, replay it, and compare with eager on copies of the inputs."""
    import torch

    torch.manual_seed(1)
    with case.modes():
        call = case.call(point)
        twin = clone_call(call)
        if case.name in NOT_CAPTURABLE:
            out = call()
        else:
            graph, out = capture_first_call(call)
            graph.replay()
        torch.cuda.synchronize()
        eager = twin()
        inputs, twins = [*call.args, *call.kwargs.values()], [*twin.args, *twin.kwargs.values()]
        return max(distance(out, eager), distance(inputs, twins))  # inputs, too: some kernels write to them


def part_parity(options: argparse.Namespace) -> Json:
    """Compare what the device launches at each point with what the virtual device planned for it."""
    import torch

    import aot_cache
    from aot_cache.artifact.manifest import whole
    from aot_cache.artifact.plan import Plan
    from aot_cache.recipes import declare as recipes
    from aot_cache.recipes import dimensions
    from aot_cache.runtime.record import Recording
    from aot_cache.store import read_bundle

    manifest = whole(read_bundle(options.bundle))
    recipe = recipes.load(manifest.spec)
    recording = Recording("parity")
    aot_cache.load(options.bundle, strict=True)
    torch.zeros(1, device="cuda")
    aot_cache.ready(strict=True)
    _bench_once()
    points = chosen_points(recipe, options.points)
    planned: dict[str, set[str]] = {f"{case.name} {point}": set() for case, point in points}
    covered: dict[str, set[str]] = {}  # many units share their boxes
    for unit in Plan.read(Path(options.bundle).with_suffix(".plan.json")).units:
        for case, boxes in unit.reached.items():
            text = f"{case} {boxes}"
            if text not in covered:
                covered[text] = {f"{case} {point}" for point in dimensions.expand(boxes)} & set(planned)
            for name in covered[text]:
                planned[name].add(unit.id)
    different = []
    launches = 0
    for case, point in points:
        _forget(manifest)
        recording.clear()
        with case.modes():
            case.call(point)()
        torch.cuda.synchronize()
        found = {unit.id for unit in recording.plan().units}
        wanted = planned[f"{case.name} {point}"]
        launches += len(found)
        if found != wanted:
            different.append(
                {"point": f"{case.name} {point}", "only_device": len(found - wanted), "only_plan": len(wanted - found)}
            )
    return {
        "points": len(points),
        "units_compared": launches,
        "different_points": different,
    }


def _forget(manifest: Any) -> None:
    """Make every autotuner choose again."""
    from aot_cache.runtime import loader
    from aot_cache.upstream.hooks import triton_tuning

    for kernels in loader.loaded():
        for tuning in manifest.tunings:
            for function in kernels.functions_of(tuning):
                triton_tuning.forget(function, tuning.tuner, tuning.key)


def _bench_once() -> None:
    """Make tuning launch each candidate once instead of timing it: parity compares launches, not times."""
    from triton.runtime.driver import driver

    def once(call: Any, quantiles: Any = None, **_: Any) -> list[float]:
        call()
        return [1.0, 1.0, 1.0]

    type(driver.active).get_benchmarker = lambda self: once


def part_step_times(options: argparse.Namespace) -> Json:
    """Time captured prefill steps with the choices of a bundle, or with Triton's own tuning.

    `--own-tuning once`: as in a server, each tuner chooses at the first call of its key, and the longest step comes first, as
    in a profile run. `--own-tuning each`: each tuner chooses again for every step. No server can do that, because the number of
    tokens is not in the keys, so this is the lower bound.
    """
    import torch

    import aot_cache
    from aot_cache.artifact.manifest import whole
    from aot_cache.recipes import declare as recipes
    from aot_cache.store import read_bundle

    manifest = whole(read_bundle(options.bundle))
    recipe = recipes.load(manifest.spec)
    torch.zeros(1, device="cuda")
    aot_cache.load(options.bundle, strict=True)
    aot_cache.ready(strict=True)
    cases = {case.name: case for case in recipe.cases}
    wanted = [(name, {"tokens": t}) for name in ("prefill-16", "prefill-48") for t in (1024, 8192)]
    calls = []
    if options.own_tuning == "once":
        wanted.sort(key=lambda step: -step[1]["tokens"])
        _forget(manifest)
    for name, point in wanted:
        case = cases[name]
        with case.modes():
            torch.manual_seed(1)
            call = case.call(point)
            if options.own_tuning == "each":
                _forget(manifest)
            call()
            graph, _ = capture_first_call(call)
        calls.append((f"{name} tokens={point['tokens']}", graph, call))
    times = {}
    for name, graph, _ in calls:
        for _ in range(20):
            graph.replay()
        torch.cuda.synchronize()
        samples = []
        for _ in range(30):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(20):
                graph.replay()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) / 20)
        samples.sort()
        times[name] = {"median_ms": samples[15], "p10_ms": samples[3], "p90_ms": samples[27]}
    return {"times": times, "events": {k: v for k, v in aot_cache.stats()["total"].items() if v}}


# --- putting it together -----------------------------------------------------------------------------------------------


def check(options: argparse.Namespace) -> Json:
    only = set(options.only.split(","))
    record: Json = {"tool": "gpu_check", "commit": commit(), "machine": machine(), "bundle": Path(options.bundle).name}
    common = ["--bundle", options.bundle, "--points", str(options.points), "--recipe", options.recipe]
    if "capture" in only:
        # With a missing C compiler, to show that none is needed.
        record["capture"] = run_part(__file__, "capture", common, CC="/no/compiler/here")
    if "without" in only:
        few = ["--no-bundle", "--points", str(options.points_without), "--recipe", options.recipe]
        record["without"] = run_part(__file__, "capture", few)
    if "parity" in only:
        record["parity"] = run_part(__file__, "parity", common)
    if "tune" in only:
        record["tune"] = tuned(options, common)
    record["claims"] = claims(record)
    return record


def tuned(options: argparse.Namespace, common: list[str]) -> Json:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "tuned.safetensors")
        began = time.perf_counter()
        said = tune(options.bundle, out, "--prune", "--points", "2", TRITON_CACHE_DIR=f"{folder}/triton")
        if "error" in said:
            return said
        record: Json = {"tune": {**said, "bundle": out.name}, "tune_seconds": round(time.perf_counter() - began, 1)}
        record["tuned"] = run_part(__file__, "step_times", ["--bundle", str(out), "--recipe", options.recipe])
        record["untuned"] = run_part(__file__, "step_times", common)
        record["own"] = run_part(__file__, "step_times", [*common, "--own-tuning", "once"])
        record["own_for_each_step"] = run_part(__file__, "step_times", [*common, "--own-tuning", "each"])
        if options.keep_tuned:
            Path(options.keep_tuned).write_bytes(out.read_bytes())
    for kind, peer in itertools.product(("tuned", "untuned"), ("own", "own_for_each_step")):
        if "times" in record[kind] and "times" in record[peer]:
            record[f"{kind}_over_{peer}"] = {
                name: round(t["median_ms"] / record[peer]["times"][name]["median_ms"], 4)
                for name, t in record[kind]["times"].items()
            }
    return record


def claims(record: Json) -> dict[str, bool]:
    out: dict[str, bool] = {}
    capture = record.get("capture")
    if capture is not None:
        bad = {"compile", "disk_hit", "tuning", "benchmark", "module_load", "gcc"}
        ok = "error" not in capture
        out["at least 60 points, first call in a capture"] = (
            ok and capture["captured_points"] >= 60 and not capture["failed_points"]
        )
        out["ledger: zero events after ready"] = ok and not bad & set(capture["ledger_after_seal"])
        out["independent hooks: zero events after ready"] = ok and not capture["independent_events_after_ready"]
        out["no gcc run at all, load included"] = ok and not capture["events_during_load"].get("gcc")
        out["replay equals eager"] = ok and capture["worst_relative_norm"] < TOLERANCE
    without = record.get("without")
    if without is not None:
        out["without the bundle the same check fails"] = "error" not in without and bool(
            without["failed_points"] or without["independent_events_after_ready"]
        )
    parity = record.get("parity")
    if parity is not None:
        out["virtual plan equals what the device launches, at every point"] = (
            "error" not in parity and parity["points"] >= 60 and not parity["different_points"]
        )
    tune = record.get("tune")
    if tune is not None:
        ratios = tune.get("tuned_over_own", {})
        out["tuned bundle within 1.02 of Triton's own tuning"] = bool(ratios) and max(ratios.values()) <= 1.02
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle")
    parser.add_argument("--no-bundle", action="store_true")
    parser.add_argument("--recipe", default="aot_cache.models.gated_delta:recipe")
    parser.add_argument("--points", type=int, default=64)
    parser.add_argument("--points-without", type=int, default=16)
    parser.add_argument("--only", default="capture,without,parity,tune")
    parser.add_argument("--own-tuning", choices=["once", "each"])
    parser.add_argument("--keep-tuned")
    parser.add_argument("--part")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.part:
        return hand_over(globals()[f"part_{options.part}"](options))
    return finish(check(options), options.out)


if __name__ == "__main__":
    sys.exit(main())
