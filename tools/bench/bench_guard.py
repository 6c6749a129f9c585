#!/usr/bin/env python3
"""What the guard costs where everything hits: nanoseconds a call, armed against not armed, paired in one process.

    python tools/bench/bench_guard.py [--rounds 5] [--pairs 15] [--calls 4000] [--out RECORD.json]

In each round, a fresh process: an empty compiled function, and on a GPU an empty Triton kernel, are called in turns with the
guard armed and with it taken out. Beside it stands the same with nothing done between the turns: how far plain is from
itself. And what arming takes, in a process that has torch's compiler and Triton imported.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from harness import PATH, finish

Json = Any


def nanoseconds(call: Callable[[], Any], calls: int) -> float:
    """Of one call, the mean of so many."""
    began = time.perf_counter_ns()
    for _ in range(calls):
        call()
    return (time.perf_counter_ns() - began) / calls


def in_turns(
    call: Callable[[], Any], pairs: int, calls: int, change: Callable[[], Any], back: Callable[[], Any]
) -> Json:
    """Medians of both turns and of their difference, pair by pair; the order within a pair changes every time."""
    one, other = [], []
    nanoseconds(call, calls)
    for number in range(pairs):
        for turn in (0, 1) if number % 2 else (1, 0):
            if turn:
                change()
            call()
            (other if turn else one).append(nanoseconds(call, calls))
            if turn:
                back()
    differences = [b - a for a, b in zip(one, other)]
    return {
        "plain": statistics.median(one),
        "other": statistics.median(other),
        "difference": statistics.median(differences),
    }


def empty_function() -> Callable[[], Any]:
    """A call of a compiled function that does nothing but check its guards."""
    import torch

    @torch.compile(backend=lambda graph, inputs: graph.forward)
    def empty(x: Any) -> Any:
        return x.view(-1)

    x = torch.zeros(1)
    return lambda: empty(x)


def empty_kernel() -> Callable[[], Any]:
    import torch
    import triton

    @triton.jit
    def empty(x, n):
        pass

    x = torch.zeros(1, device="cuda")
    launch = empty[(1,)]
    return lambda: launch(x, 1)


def part_round(options: argparse.Namespace) -> Json:
    import torch
    import torch._dynamo
    import triton  # noqa: F401

    import aot_cache

    began = time.perf_counter()
    aot_cache.arm()
    first = time.perf_counter() - began
    aot_cache.disarm()
    began = time.perf_counter()
    aot_cache.arm()
    arming = {"with aot-cache's own imports": 1e3 * first, "beyond imports": 1e3 * (time.perf_counter() - began)}
    aot_cache.disarm()
    answer: Json = {"arm milliseconds": arming}
    calls = {"compiled function": empty_function()}
    if torch.cuda.is_available():
        calls["Triton kernel"] = empty_kernel()
    for name, call in calls.items():
        call()
        armed = in_turns(call, options.pairs, options.calls, aot_cache.arm, aot_cache.disarm)
        itself = in_turns(call, options.pairs, options.calls, lambda: None, lambda: None)
        answer[name] = {"armed": armed, "itself": itself}
    return answer


def run_round(options: argparse.Namespace) -> Json:
    command = [sys.executable, "-W", "ignore", __file__, "--part", "round"]
    command += ["--pairs", str(options.pairs), "--calls", str(options.calls)]
    environment = {**os.environ, "PYTHONPATH": PATH}
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def summary(rounds: list[Json]) -> Json:
    out: Json = {}
    for name in rounds[0]:
        if name == "arm milliseconds":
            out[name] = {k: round(max(one[name][k] for one in rounds), 2) for k in rounds[0][name]}
            continue
        armed, itself = ([one[name][kind]["difference"] for one in rounds] for kind in ("armed", "itself"))
        spread = max(map(abs, itself))
        out[name] = {
            "plain ns": round(statistics.median(one[name]["armed"]["plain"] for one in rounds), 1),
            "armed - plain ns": round(statistics.median(armed), 1),
            "of each round": [round(d, 1) for d in armed],
            "plain - plain ns": [round(d, 1) for d in itself],
            "within the spread of plain against itself": abs(statistics.median(armed)) <= spread,
        }
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--calls", type=int, default=4000)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(part_round(options)))
        return 0
    import torch

    found = summary([run_round(options) for _ in range(options.rounds)])
    record = {"what": "the guard on the hit path", "torch": torch.__version__, "rounds": options.rounds, **found}
    record["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
