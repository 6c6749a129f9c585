#!/usr/bin/env python3
"""From "model built" to "first captured graph replayed": aot-cache beside its peers, each in fresh processes.

    python tools/bench/bench_cold_start.py [--device cuda|cpu] [--rounds 5] [--bundle BUNDLE] [--out RECORD.json]

The model is `net.py`'s. Modes: `eager` (the floor), `cold` (torch.compile with empty caches), `inductor` (its disk cache is
warm), `mega` (torch.compiler.load_cache_artifacts), `precompile` (the same with Dynamo's caching_precompile) and `aot`. Every
mode is measured twice: with all imports after the model is built counted (`all`), and with torch._dynamo and
torch._inductor imported before (`imported`). Peers make a first call outside a capture, which they need; aot-cache's first
call is the captured one. On the CPU nothing is captured: the time is to the end of the first call.
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

from harness import PATH, cli, commit, distance, empty_caches, finish

Json = Any
MODES = ("eager", "cold", "inductor", "mega", "precompile", "aot")
SIZES = (512, 64, 8)
REPLAYS = 200


def serve(options: argparse.Namespace) -> Json:
    """One measured process: `options.mode`, `options.imports`."""
    import torch

    from aot_cache.recipes.declare import set_device

    set_device(options.device)
    import net

    mode = options.mode
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
    began = time.perf_counter()
    if mode in ("mega", "precompile"):
        if mode == "precompile":
            torch._dynamo.config.caching_precompile = True  # noqa: SLF001
        torch.compiler.load_cache_artifacts(Path(options.artifacts, mode).read_bytes())
    run = model if mode == "eager" else torch.compile(model, dynamic=True)
    with torch.no_grad():
        if mode == "aot":
            aot_cache.ready(strict=True)
        times, replay = _first_calls(run, inputs, options.device, warm=mode != "aot", began=began)
        with torch.compiler.set_stance("force_eager"):
            wanted = model(inputs[0])
        found = run(inputs[0])
    answer = {"first": times[0], "all_sizes": times[-1], "replay_us": replay}
    answer["error"] = distance(found, wanted)
    if mode == "aot":
        answer["events"] = {k: v for k, v in aot_cache.stats()["total"].items() if v}
    if options.save:
        saved = torch.compiler.save_cache_artifacts()
        Path(options.artifacts, options.save).write_bytes(saved[0] if saved else b"")
    return answer


def _first_calls(run: Any, inputs: Any, device: str, warm: bool, began: float) -> tuple[list[float], float]:
    """Seconds until each size has been replayed (or called) once, and a replay of the first size in microseconds."""
    import torch

    times: list[float] = []
    if device == "cpu":
        for x in inputs:
            run(x)
            times.append(time.perf_counter() - began)
        return times, 0.0
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
        with torch.cuda.graph(graph):
            run(x)
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
    return times, statistics.median(spans)


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
        raise SystemExit(f"{mode} failed:\n{done.stderr[-3000:]}")
    found: Json = json.loads(answer.read_text())
    answer.unlink()
    return found


def measure(options: argparse.Namespace) -> Json:
    """All modes, interleaved."""
    with tempfile.TemporaryDirectory() as base:
        if not options.bundle:
            options.bundle = _build(options, Path(base, "store"))
            if options.keep:
                Path(options.keep).write_bytes(Path(options.bundle).read_bytes())
        warm = Path(base, "warm")
        warm.mkdir()
        run(
            options, "cold", "imported", str(warm), base, save="mega"
        )  # fills the disk cache, and the mega-cache's file
        with tempfile.TemporaryDirectory() as folder:
            run(options, "cold", "imported", folder, base, save="precompile")
        rows: dict[str, dict[str, list[Json]]] = {mode: {"all": [], "imported": []} for mode in options.modes}
        for number in range(options.rounds):
            for mode in options.modes:
                if mode == "cold" and number >= 2:
                    continue  # takes as long as all others together, and does not scatter
                for imports in rows[mode]:
                    with tempfile.TemporaryDirectory() as folder:
                        place = str(warm) if mode == "inductor" else folder
                        found = run(options, mode, imports, place, base)
                    rows[mode][imports].append(found)
                    print(f"round {number + 1}, {mode}, {imports}: {found['first']:.3f} s", file=sys.stderr, flush=True)
    return rows


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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--modes", type=lambda text: text.split(","), default=list(MODES))
    parser.add_argument("--bundle", default="")
    parser.add_argument("--keep", help="where to leave the bundle that was built")
    parser.add_argument("--out")
    for hidden in ("--mode", "--imports", "--artifacts", "--save"):
        parser.add_argument(hidden, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.mode:
        Path(os.environ["ANSWER"]).write_text(json.dumps(serve(options)))
        return 0
    import torch

    rows = measure(options)
    record = {
        "what": "cold start: model built to first captured graph replayed",
        "commit": commit(),
        "machine": torch.cuda.get_device_name(0) if options.device == "cuda" else f"cpu, {os.cpu_count()} cores",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0]},
        "summary": summary(rows),
    }
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
