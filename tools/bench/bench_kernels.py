#!/usr/bin/env python3
"""Measure building, loading and size of kernel bundles against their floors and peers.

    python tools/bench/bench_kernels.py build [--target h200] [--model gated-delta]   # (a), (b), (d): any machine
    python tools/bench/bench_kernels.py load --bundle BUNDLE [--runs 5]               # (c): on the GPU

build  wall time of `build` in an empty store (imports, tracing, worker start and C modules counted) over plain
       `triton.compile` of the same specializations one after another in one process (its imports not counted);
       a build with nothing to do; the bundle's size over Triton's own cache folder.
load   `aot_cache.load` (read, hash, install, load modules) over `cuModuleLoadData` + `cuModuleGetFunction` of the same
       cubins (`raw`: one for each specialization, as Triton loads them; `raw_distinct`: equal binaries once, as we do),
       and over letting Triton load them from a warm disk cache; a fresh process for each, imports apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from harness import PATH, commit, finish, machine

Json = Any


# --- (a) (b) (d) -------------------------------------------------------------------------------------------------------


def bench_build(options: argparse.Namespace) -> Json:
    from aot_cache.artifact import target as targets
    from aot_cache.artifact.plan import Plan
    from aot_cache.builder.pipeline import Request, build

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        request = Request(target=targets.get(options.target), store=Path(folder, "store"), model=options.model)
        stages: dict[str, float] = {}
        began = time.perf_counter()

        def progress(stage: str, done: int, total: int) -> None:
            stages[f"{stage} {'start' if done == 0 else 'last'}"] = round(time.perf_counter() - began, 2)

        built = build(request, progress)
        again = [build(request).seconds for _ in range(3)]
        plan = built.path.with_suffix(".plan.json")
        print(f"built {built.units} units in {built.seconds:.1f} s; now plain triton.compile", file=sys.stderr)
        plain = child(
            "plain_compile", ["--plan", str(plan), "--target", options.target], {"TRITON_CACHE_DIR": f"{folder}/triton"}
        )
        return {
            "target": options.target,
            "units": built.units,
            "points": sum(case.points for case in Plan.read(plan).cases),
            "failed": len(built.failed),
            "build_seconds": round(built.seconds, 2),
            "stages": stages,
            "plain_compile_seconds": plain["seconds"],
            "build_over_plain": round(built.seconds / plain["seconds"], 3),
            "nothing_to_do_seconds": [round(s, 3) for s in again],
            "bundle_bytes": built.size,
            "triton_folder_bytes": plain["folder_bytes"],
            "bundle_over_folder": round(built.size / plain["folder_bytes"], 3),
        }


def part_plain_compile(options: argparse.Namespace) -> Json:
    """One process, one specialization after another, Triton's defaults."""
    from aot_cache.artifact import target as targets
    from aot_cache.artifact.plan import Plan
    from aot_cache.builder import virtual_gpu

    target = targets.get(options.target)
    virtual_gpu.become(target)
    from aot_cache.upstream.codec import triton_jit
    from aot_cache.upstream.virtual import triton_compile

    plan = Plan.read(Path(options.plan))
    jobs = []
    for unit in plan.units:
        function = triton_jit.unwrap(triton_jit.find(unit.kernel))
        kwargs = {k: triton_jit.decode(v) for k, v in unit.options.items()}
        jobs.append((function, [triton_jit.decode_pair(p) for p in unit.specialization], kwargs))
    began = time.perf_counter()
    for function, specialization, kwargs in jobs:
        triton_compile.compile_specialization(function, specialization, kwargs, target)
    seconds = time.perf_counter() - began
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    return {
        "seconds": round(seconds, 2),
        "folder_bytes": sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()),
    }


# --- (c) ---------------------------------------------------------------------------------------------------------------


def bench_load(options: argparse.Namespace) -> Json:
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        environment = {"TRITON_CACHE_DIR": f"{folder}/triton"}
        arguments = ["--bundle", options.bundle]
        child("warm_disk", [*arguments, "--fill"], environment)
        record: Json = {"bundle": Path(options.bundle).name, "runs": options.runs}
        samples: dict[str, list[Json]] = {
            name: [] for name in ("raw", "raw_distinct", "raw_eager", "ours", "warm_disk")
        }
        for _ in range(options.runs):  # in turn, so that what drifts meets all of them
            samples["raw"].append(child("raw", arguments, environment))
            samples["raw_distinct"].append(child("raw", [*arguments, "--distinct"], environment))
            samples["raw_eager"].append(child("raw", arguments, {**environment, "CUDA_MODULE_LOADING": "EAGER"}))
            samples["ours"].append(child("ours", arguments, {"TRITON_CACHE_DIR": f"{folder}/empty"}))
            samples["warm_disk"].append(child("warm_disk", arguments, environment))
        for name, runs in samples.items():
            record[name] = {
                "modules": runs[0]["modules"],
                "median_ms": round(1e3 * statistics.median(r["seconds"] for r in runs), 2),
                "all_ms": [round(1e3 * r["seconds"], 2) for r in runs],
            }
        record["ours_parts_ms"] = samples["ours"][-1].get("parts")
        record["import_seconds"] = samples["ours"][-1].get("import_seconds")
        for floor in ("raw", "raw_distinct", "raw_eager", "warm_disk"):
            record[f"ours_over_{floor}"] = round(record["ours"]["median_ms"] / record[floor]["median_ms"], 3)
        return record


def _cubins(bundle: str) -> list[tuple[str, bytes]]:
    from aot_cache.artifact.manifest import whole
    from aot_cache.store import read_bundle

    found = read_bundle(bundle)
    manifest = whole(found)
    return [({**manifest.metadata, **unit.metadata}["name"], found.object(unit.object)) for unit in manifest.units]


def part_raw(options: argparse.Namespace) -> Json:
    """The floor: the driver's own two calls for each cubin."""
    import ctypes

    import torch

    torch.zeros(1, device="cuda")
    cubins = _cubins(options.bundle)
    if options.distinct:
        cubins = list(dict.fromkeys(cubins))
    cuda = ctypes.CDLL("libcuda.so.1")
    handles = []
    began = time.perf_counter()
    for name, binary in cubins:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        if cuda.cuModuleLoadData(ctypes.byref(module), binary):
            raise RuntimeError("cuModuleLoadData failed")
        if cuda.cuModuleGetFunction(ctypes.byref(function), module, name.encode()):
            raise RuntimeError("cuModuleGetFunction failed")
        handles.append((module, function))
    return {"seconds": time.perf_counter() - began, "modules": len(handles)}


def part_ours(options: argparse.Namespace) -> Json:
    """`aot_cache.load` with CUDA up, in a process that has imported what a server imports."""
    import torch

    import aot_cache
    from aot_cache.artifact.manifest import served
    from aot_cache.recipes import declare as recipes
    from aot_cache.store import read_bundle

    spec = served(read_bundle(options.bundle)).spec
    began = time.perf_counter()
    recipes.load(spec)
    from aot_cache.upstream.hooks import triton_launcher  # noqa: F401

    imported = time.perf_counter() - began
    torch.zeros(1, device="cuda")
    from triton.runtime.driver import driver

    _ = driver.active.utils
    if options.profile:
        import cProfile
        import pstats

        profile = cProfile.Profile()
        profile.runcall(aot_cache.load, options.bundle, strict=True)
        pstats.Stats(profile, stream=sys.stderr).sort_stats("tottime").print_stats(30)
    began = time.perf_counter()
    report = aot_cache.load(options.bundle, strict=True)
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "modules": report.primed, "import_seconds": round(imported, 2)}


def part_warm_disk(options: argparse.Namespace) -> Json:
    """Triton's own way: compile from a warm disk cache, then load. `--fill` makes it warm."""
    import torch

    from aot_cache.artifact.manifest import whole
    from aot_cache.recipes import declare as recipes
    from aot_cache.store import read_bundle

    manifest = whole(read_bundle(options.bundle))
    recipes.load(manifest.spec)
    torch.zeros(1, device="cuda")
    import triton
    from triton.runtime.driver import driver

    from aot_cache.upstream.codec import triton_jit, triton_kernel

    place = driver.active.get_current_target()
    jobs = []
    for unit in manifest.units:
        function = triton_jit.unwrap(triton_jit.find(manifest.kernels[unit.kernel].name))
        kwargs = {k: triton_jit.decode(unit.options[k]) for k in unit.option_order}
        specialization = [triton_jit.decode_pair(p) for p in unit.specialization]
        _ = function.device_caches[0]
        jobs.append((function, *triton_jit.pack(function, specialization, kwargs, place)))
    if options.fill:  # in parallel: what is measured is reading it back
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda job: _compile(triton, job, place), jobs))
    began = time.perf_counter()
    for job in jobs:
        triton_kernel.load_as_triton_does(_compile(triton, job, place))
    return {"seconds": time.perf_counter() - began, "modules": len(jobs)}


def _compile(triton: Any, job: Any, place: Any) -> Any:
    function, options, signature, constexprs, attrs = job
    source = function.ASTSource(function, signature, constexprs, attrs)
    return triton.compile(source, target=place, options=options.__dict__)


# --- running -----------------------------------------------------------------------------------------------------------


def child(part: str, arguments: list[str], environment: dict[str, str]) -> Json:
    """Run one part in a fresh process and return its record."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        command = [sys.executable, __file__, part, *arguments, "--answer", str(answer)]
        told = {**os.environ, "PYTHONPATH": PATH, **environment}
        done = subprocess.run(command, env=told, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{part} failed: {done.stderr.strip()[-2000:]}")
        return json.loads(answer.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--model", default="gated-delta")
    parser.add_argument("--bundle")
    parser.add_argument("--plan")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--distinct", action="store_true")
    parser.add_argument("--fill", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--answer")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.what in ("build", "load"):
        result = bench_build(options) if options.what == "build" else bench_load(options)
        record = {"tool": f"bench_kernels {options.what}", "commit": commit(), "machine": machine(), **result}
        return finish(record, options.out)
    answer = globals()[f"part_{options.what}"](options)
    Path(options.answer).write_text(json.dumps(answer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
