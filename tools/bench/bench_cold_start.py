#!/usr/bin/env python3
"""From "model built" to "first captured graph replayed": aot-cache beside its peers, each in fresh processes.

    python tools/bench/bench_cold_start.py [--device cuda|cpu] [--rounds 5] [--bundle BUNDLE] [--out RECORD.json]

The model is `net.py`'s. Modes: `eager` (the floor), `cold` (torch.compile with empty caches), `inductor` (its disk cache is
warm), `mega` (torch.compiler.load_cache_artifacts), `precompile` (the same with Dynamo's caching_precompile), `aoti` (a package
of AOTInductor, which has the weights, too) and `aot`. Every mode is measured twice: with all imports after the model is built
counted (`all`), and with torch._dynamo and torch._inductor imported before (`imported`). Peers make a first call outside a
capture, which they need; aot-cache's first call is the captured one. On the CPU nothing is captured: the time is to the end of
the first call.
`prepared` is what each mode needs to have been made before: seconds of that process, and bytes. A process more for each mode
counts, with hooks of its own, what is compiled, traced or loaded in captures, or in first calls on the CPU (`events`).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from harness import PATH, Independent, cli, commit, distance, empty_caches, finish, hand_over

Json = Any


class Failed(SystemExit):
    """A measured process of a mode failed. Nobody has to catch it: it ends with its text, and not with a traceback."""


MODES = ("eager", "cold", "inductor", "mega", "precompile", "aoti", "aot")
SIZES = (512, 64, 8)
REPLAYS = 200
PACKAGE = "net.pt2"


def serve(options: argparse.Namespace) -> Json:
    """One measured process: `options.mode`, `options.imports`."""
    import torch

    from aot_cache.recipes.declare import set_device

    set_device(options.device)
    import net

    mode, watched = options.mode, Independent() if options.imports == "watched" else None
    torch.manual_seed(0)  # a package has the weights in it
    if mode == "aot":
        import aot_cache

        aot_cache.load(options.bundle, strict=True)
    model = net.make()
    inputs = [torch.randn(size, 1024, dtype=torch.bfloat16, device=options.device) for size in SIZES]
    if options.imports == "imported":
        import torch._dynamo
        import torch._inductor.compile_fx
    if options.device == "cuda":
        torch.cuda.synchronize()
        if watched is not None:
            watched.watch_driver()
    began = time.perf_counter()
    if mode in ("mega", "precompile"):
        if mode == "precompile":
            torch._dynamo.config.caching_precompile = True  # noqa: SLF001
        torch.compiler.load_cache_artifacts(Path(options.artifacts, mode).read_bytes())
    if mode == "aoti":
        from torch._inductor import aoti_load_package

        run: Any = aoti_load_package(str(Path(options.artifacts, PACKAGE)))
    else:
        run = model if mode == "eager" else torch.compile(model, dynamic=True)
    with torch.no_grad():
        if mode == "aot":
            aot_cache.ready(strict=True)
        times, replay, events = _first_calls(run, inputs, options.device, mode != "aot", began, watched)
        with torch.compiler.set_stance("force_eager"):
            wanted = model(inputs[0])
        found = run(inputs[0])
    answer: Json = {"first": times[0], "all_sizes": times[-1], "replay_us": replay, "in_captures": events}
    answer["error"] = distance(found, wanted)
    answer["process_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    answer["gpu_mib"] = torch.cuda.max_memory_allocated() >> 20 if options.device == "cuda" else 0
    if mode == "aot":
        answer["events"] = {k: v for k, v in aot_cache.stats()["total"].items() if v}
    if options.save:
        saved = torch.compiler.save_cache_artifacts()
        Path(options.artifacts, options.save).write_bytes(saved[0] if saved else b"")
    return answer


def package() -> None:
    """Export the net and compile it into a package for AOTInductor."""
    import net
    import torch
    from torch._inductor import aoti_compile_and_package

    from aot_cache.recipes.declare import set_device

    options = parsed()
    set_device(options.device)
    torch.manual_seed(0)
    model = net.make()
    example = (torch.randn(SIZES[0], 1024, dtype=torch.bfloat16, device=options.device),)
    with torch.no_grad():
        batch = torch.export.Dim("batch", min=2, max=net.MOST)
        program = torch.export.export(model, example, dynamic_shapes=({0: batch},))
        aoti_compile_and_package(program, package_path=str(Path(options.artifacts, PACKAGE)))


def _first_calls(
    run: Any, inputs: Any, device: str, warm: bool, began: float, watched: Independent | None
) -> tuple[list[float], float, dict[str, int]]:
    """(seconds until each size has been replayed or called once, microseconds of a replay of the first size, what `watched` saw
    in captures, or in the calls on the CPU)."""
    import torch

    times: list[float] = []
    seen: Counter[str] = Counter()
    if watched is not None:
        watched.counts.clear()
    if device == "cpu":
        for x in inputs:
            run(x)
            times.append(time.perf_counter() - began)
        return times, 0.0, dict(watched.counts) if watched is not None else {}
    graphs = []
    for x in inputs:
        if warm:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                run(x)
            torch.cuda.current_stream().wait_stream(side)
        else:
            _prime_cublas()
        graph = torch.cuda.CUDAGraph()
        if watched is not None:
            watched.counts.clear()
        with torch.cuda.graph(graph):
            run(x)
        if watched is not None:
            seen.update(watched.counts)
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        graphs.append(graph)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    spans = []
    for _ in range(9):
        start.record()
        for _ in range(REPLAYS):
            graphs[0].replay()
        end.record()
        torch.cuda.synchronize()
        spans.append(start.elapsed_time(end) / REPLAYS * 1000)
    return times, statistics.median(spans), dict(seen)


def _prime_cublas() -> None:
    """cuBLAS makes its handle at first use, which no capture allows: counted in our time."""
    import torch

    w = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.mm(w, w)
    torch.cuda.current_stream().wait_stream(side)


# --- the parent -----------------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace, mode: str, imports: str, folder: str, artifacts: str, save: str = "") -> Json:
    """One process with the caches in `folder`."""
    answer = Path(folder, "answer.json")
    environment = {
        **os.environ,
        **empty_caches(folder),
        "PYTHONPATH": PATH,
        "ANSWER": str(answer),
        "PYTHONFAULTHANDLER": "1",
    }
    if mode == "cold-same":  # ordinary compile under the settings that a bundle is built with
        mode = "cold"
        environment["TORCHINDUCTOR_AUTOTUNE_POINTWISE"] = "0"
    command = [sys.executable, __file__, "--mode", mode, "--imports", imports, "--artifacts", artifacts]
    command += ["--device", options.device, "--bundle", options.bundle, "--save", save]
    if mode == "precompile" and save:
        environment["TORCH_CACHING_PRECOMPILE"] = "1"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    if done.returncode or not answer.exists():
        raise Failed(f"{mode} failed with exit code {done.returncode}:\n{done.stderr[-3000:]}")
    found: Json = json.loads(answer.read_text())
    answer.unlink()
    return found


def measure(options: argparse.Namespace) -> tuple[Json, Json, Json, dict[str, str]]:
    """(all modes, interleaved; what was made for them before; what happens in their captures; peers that failed, and how).

    Raises:
        Failed: our own mode failed.
    """
    rows: dict[str, dict[str, list[Json]]] = {mode: {"all": [], "imported": []} for mode in options.modes}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as base:
        warm = Path(base, "warm")
        warm.mkdir()
        prepared = _prepare(options, Path(base), warm)

        def once(mode: str, imports: str) -> Json:
            with tempfile.TemporaryDirectory() as folder:
                return run(options, mode, imports, str(warm) if mode == "inductor" else folder, base)

        events = {}
        for mode in options.modes:
            try:
                events[mode] = once(mode, "watched")["in_captures"]
            except Failed as error:
                if mode == "aot":
                    raise
                failed[mode] = str(error)
                del rows[mode]
                print(error, file=sys.stderr, flush=True)
        slowest = 0.0
        for number in range(options.rounds):
            began = time.monotonic()
            if number and began + slowest > options.started + options.seconds:
                print(f"no time for round {number + 1}", file=sys.stderr, flush=True)
                break
            for mode in rows:
                if mode == "cold" and number >= 2:
                    continue  # takes as long as all others together, and does not scatter
                for imports in rows[mode]:
                    found = once(mode, imports)
                    rows[mode][imports].append(found)
                    print(f"round {number + 1}, {mode}, {imports}: {found['first']:.3f} s", file=sys.stderr, flush=True)
            slowest = max(slowest, time.monotonic() - began)
    return rows, prepared, events, failed


def _prepare(options: argparse.Namespace, base: Path, warm: Path) -> Json:
    """Make what each mode starts from: seconds of the process that makes it, and bytes of what it leaves."""
    out: Json = {}

    def timed(mode: str, make: Callable[[], Path]) -> None:
        began = time.perf_counter()
        made = make()
        files = [path for path in made.rglob("*") if path.is_file()] if made.is_dir() else [made]
        out[mode] = {
            "seconds": round(time.perf_counter() - began, 2),
            "bytes": sum(file.stat().st_size for file in files),
        }

    def saved(name: str, folder: Path) -> Path:
        run(options, "cold", "imported", str(folder), str(base), save=name)
        return base / name

    if "aot" in options.modes and not options.bundle:

        def build() -> Path:
            options.bundle = _build(options, base / "store")
            return Path(options.bundle)

        timed("aot", build)
        if options.keep:
            Path(options.keep).write_bytes(Path(options.bundle).read_bytes())
    if {"mega", "inductor"} & set(options.modes):
        timed("mega", lambda: saved("mega", warm))  # it fills the disk cache, too
        timed("inductor", lambda: warm)
        out["inductor"]["seconds"] = out["mega"]["seconds"]
    if "precompile" in options.modes:
        with tempfile.TemporaryDirectory() as folder:
            timed("precompile", lambda: saved("precompile", Path(folder)))
    if "aoti" in options.modes:
        with tempfile.TemporaryDirectory() as folder:
            timed("aoti", lambda: _package(options, base, folder))
    return out


def _package(options: argparse.Namespace, base: Path, folder: str) -> Path:
    command = [sys.executable, __file__, "--mode", "package", "--artifacts", str(base), "--device", options.device]
    environment = {**os.environ, **empty_caches(folder), "PYTHONPATH": PATH}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=500)
    if done.returncode:
        raise SystemExit(f"the package failed:\n{done.stderr[-3000:]}")
    return base / PACKAGE


def _build(options: argparse.Namespace, store: Path) -> str:
    target = "cpu" if options.device == "cpu" else options.target
    command = ["build", "--model", "net:recipe", "--target", target, "--store", str(store), "--json"]
    done = cli(*command, CUDA_VISIBLE_DEVICES="")
    if done.returncode:
        raise SystemExit(f"the build failed:\n{done.stderr[-3000:]}")
    path: str = json.loads(done.stdout)["bundles"][0]["path"]
    return path


def summary(rows: Json) -> Json:
    """Medians, and ours over each peer's."""
    out: Json = {}
    for mode, kinds in rows.items():
        out[mode] = {
            imports: {
                "rounds": len(found),
                "first_s": round(statistics.median(r["first"] for r in found), 3),
                "all_sizes_s": round(statistics.median(r["all_sizes"] for r in found), 3),
                "spread_s": [round(min(r["first"] for r in found), 3), round(max(r["first"] for r in found), 3)],
                "replay_us": round(statistics.median(r["replay_us"] for r in found), 2),
                "process_mib": max(r["process_mib"] for r in found),
                "gpu_mib": max(r["gpu_mib"] for r in found),
                "error": max(r["error"] for r in found),
            }
            for imports, found in kinds.items()
            if found
        }
    ours = out.get("aot", {})
    out["ours_over"] = {
        mode: {i: round(ours[i]["first_s"] / out[mode][i]["first_s"], 4) for i in ours if i in out[mode]}
        for mode in rows
        if mode != "aot" and ours
    }
    out["aot_events"] = rows["aot"]["all"][0]["events"] if "aot" in rows else {}
    return out


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3600.0, help="no round is begun that would end after so many")
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--bundle", default="")
    parser.add_argument("--keep", help="where to leave the bundle that was built")
    parser.add_argument("--out")
    for hidden in ("--mode", "--imports", "--artifacts", "--save"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.started = time.monotonic()
    return options


def main() -> int:
    options = parsed()
    if options.mode == "package":
        package()
        return 0
    if options.mode:
        return hand_over(serve(options))
    import torch

    rows, prepared, events, failed = measure(options)
    record = {
        "what": "cold start: model built to first captured graph replayed",
        "commit": commit(),
        "machine": torch.cuda.get_device_name(0) if options.device == "cuda" else f"cpu, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "summary": summary(rows),
        "prepared": prepared,
        "events": events,
        "failed": failed,
        "claims": {"nothing happens in our captures": not events["aot"]} if "aot" in events else {},
    }
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
