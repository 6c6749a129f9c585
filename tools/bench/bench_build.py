#!/usr/bin/env python3
"""Build time of ten graphs (`ten_graphs.py`), in fresh processes with empty caches and stores; any machine, no GPU.

    python tools/bench/bench_build.py [--target h200] [--rounds 3] [--workers 2] [--json RECORD.json]

aot      `aot-cache build`, the whole command: every declared point is run, each graph is compiled in a forked child.
one      the same with one worker: what is compiled at the same time is worth.
few      the same as `aot` at 2 to 16 tokens in place of 2 to 256: what is left when there are few points to prove.
plain    one process that becomes the target and compiles the same functions one after another with torch.compile and
         Inductor's `compile_threads=1`, at one size each: nothing is proved about the others, and nothing is written.
nothing  `aot-cache build` again, with nothing changed.
imports  a process that only imports what `nothing` had imported when it was done.

Wall time of whole processes, and their processor time beside it: where others use the machine, the two part.
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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from harness import FOLDERS, commit, empty_caches, machine

Json = Any
MODES = ("aot", "one", "few", "plain", "nothing", "imports")
FEW = "n=2..16"
AIMS = {"aot_over_plain": 0.7, "nothing_less_imports_s": 3.0}

IMPORTS = """
import contextlib, importlib, sys
for name in sys.argv[1].split(","):
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
"""
LOADED = """
import json, os, sys
from aot_cache.cli.main import main
before = os.dup(1); os.dup2(2, 1)
assert main(sys.argv[1:]) == 0
os.write(before, json.dumps([name for name in sys.modules if name != "__main__"]).encode())
"""


# --- the peer -------------------------------------------------------------------------------------------------------------


def plain(target: str) -> Json:
    """Compile the ten functions in this process, as a user could who has the virtual device."""
    began = time.perf_counter()
    from aot_cache.artifact import target as targets
    from aot_cache.upstream.virtual import inductor_target

    inductor_target.become(targets.get(target))
    import torch
    from ten_graphs import ARGUMENTS, TOKENS, compiled
    from torch._inductor import config

    from aot_cache.upstream.hooks import inductor_artifact
    from aot_cache.upstream.virtual.torch_fake import HostMode

    if config.compile_threads != 1:
        raise SystemExit("compile_threads is not 1")
    made: list[float] = []
    host = HostMode("cuda")
    most = TOKENS.values[-1]

    def compile_only(_wrapper: Any, backend: Any, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        backend(graph, inputs, **kwargs)
        made.append(round(time.perf_counter() - began, 2))
        return graph.forward  # nothing runs on a device that is not there

    with inductor_artifact.instead(compile_only):
        for name, arguments in ARGUMENTS.items():
            with host, torch.no_grad():
                args = arguments(most)
                _mark(args, TOKENS.values[0], most)
                compiled(name)(*args)
    return {"graphs": len(made), "at_s": made}


def _mark(value: Any, low: int, high: int) -> None:
    """Say of each tensor's first dimension that it is the tokens', where it is."""
    from torch._dynamo import mark_dynamic

    if isinstance(value, tuple):
        for item in value:
            _mark(item, low, high)
    elif value.dim() and value.shape[0] == high:
        mark_dynamic(value, 0, min=low, max=high)


# --- the parent -----------------------------------------------------------------------------------------------------------


def timed(command: list[str], folder: str, answer: bool = True) -> Json:
    """Run a process with the caches in `folder`; what it says on stdout is JSON."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("AOT_CACHE", "TORCH_COMPILE"))},
        "PYTHONPATH": os.pathsep.join(FOLDERS),
        "CUDA_VISIBLE_DEVICES": "",
        **empty_caches(folder),
    }
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, *command], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{command[:3]} failed:\n{done.stderr[-3000:]}")
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    said = json.loads(done.stdout) if answer else None
    return {"seconds": round(seconds, 3), "processor_s": round(used, 2), "said": said}


def one_round(options: argparse.Namespace) -> Json:
    """Every mode once."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        arguments = ["build", "--model", "ten_graphs:recipe", "--target", options.target, "--store", f"{folder}/store"]
        arguments += ["--workers", str(options.workers), "--json"]
        build = ["-m", "aot_cache", *arguments]
        loads = {"load": [round(x, 2) for x in os.getloadavg()][:1]}
        out = {"aot": timed(build, folder), "nothing": timed(build, folder)}
        names = timed(["-c", LOADED, *arguments], folder)["said"]
        out["imports"] = timed(["-c", IMPORTS, ",".join(names)], folder, answer=False)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out["one"] = timed([*build, "--workers", "1", "--store", f"{folder}/store"], folder)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        few = [*build, "--range", FEW, "--store", f"{folder}/store"]  # the last --store counts
        out["few"] = timed(few, folder)
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        out["plain"] = timed([__file__, "--plain", "--target", options.target], folder)
    said = {mode: facts.pop("said") for mode, facts in out.items()}
    (built,), (few,), (again,) = (said[mode]["bundles"] for mode in ("aot", "few", "nothing"))
    made = said["plain"]
    same = built["graphs"] == few["graphs"] == made["graphs"]
    if built["failed"] or few["failed"] or not same or not again["nothing_to_do"]:
        raise SystemExit(f"not the same work: {built['graphs']} and {made['graphs']} graphs, {built['failed']}")
    return {**loads, **out, "graphs": built["graphs"], "points": built["points"], "few_points": few["points"]}


def summary(rounds: list[Json]) -> Json:
    """Medians, and the ratios that the aims are about."""
    out: Json = {
        mode: {
            "median_s": round(statistics.median(r[mode]["seconds"] for r in rounds), 3),
            "all_s": [r[mode]["seconds"] for r in rounds],
            "processor_s": round(statistics.median(r[mode]["processor_s"] for r in rounds), 2),
        }
        for mode in MODES
    }
    ratios = [r["aot"]["seconds"] / r["plain"]["seconds"] for r in rounds]
    beyond = [r["nothing"]["seconds"] - r["imports"]["seconds"] for r in rounds]
    out["aot_over_plain"] = round(statistics.median(ratios), 3)
    out["few_over_plain"] = round(statistics.median(r["few"]["seconds"] / r["plain"]["seconds"] for r in rounds), 3)
    out["aot_over_one"] = round(statistics.median(r["aot"]["seconds"] / r["one"]["seconds"] for r in rounds), 3)
    out["aot_over_plain_spread"] = [round(min(ratios), 3), round(max(ratios), 3)]
    out["nothing_less_imports_s"] = round(statistics.median(beyond), 3)
    out["met"] = {name: out[name] <= aim for name, aim in AIMS.items()}
    return out


def table(found: Json) -> str:
    lines = [f"{'mode':10}{'wall s':>9}{'cpu s':>9}   all"]
    for mode in MODES:
        row = found[mode]
        lines.append(f"{mode:10}{row['median_s']:9.2f}{row['processor_s']:9.2f}   {row['all_s']}")
    for name, aim in AIMS.items():
        lines.append(f"{name} {found[name]} (aim {aim}, {'met' if found['met'][name] else 'not met'})")
    lines += [f"{name} {found[name]}" for name in ("few_over_plain", "aot_over_one")]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h200")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", metavar="FILE", help="where to write the record")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.plain:
        stdout = os.dup(1)
        os.dup2(2, 1)  # whatever libraries print
        os.write(stdout, json.dumps(plain(options.target)).encode())
        return 0
    rounds = []
    for number in range(options.rounds):
        rounds.append(one_round(options))
        times = ", ".join(f"{mode} {rounds[-1][mode]['seconds']:.1f}" for mode in MODES)
        print(f"round {number + 1}: {times} (load before {rounds[-1]['load'][0]})", file=sys.stderr, flush=True)
    found = summary(rounds)
    record = {
        "tool": "bench_build",
        "commit": commit(),
        "machine": machine(),
        "target": options.target,
        "workers": options.workers,
        "graphs": rounds[0]["graphs"],
        "points": rounds[0]["points"],
        "few_points": rounds[0]["few_points"],
        "summary": found,
        "rounds": rounds,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")
    print(table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
