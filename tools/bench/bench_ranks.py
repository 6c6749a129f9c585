#!/usr/bin/env python3
"""What agreeing costs: milliseconds a shape, and for all shapes of a start-up, between ranks on one host.

    python tools/bench/bench_ranks.py [--ranks 4] [--shapes 50] [--rounds 5] [--out RECORD.json]

Each round is a job of its own over gloo. A shape costs two agreements: before its capture, and after. Beside it stands
`all_gather_object` of gloo, which answers as much and names nobody. `check_ranks.py` has what a capture itself takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from harness import finish
from jobs import environments

Json = Any


def part_rank(options: argparse.Namespace) -> Json:
    import torch.distributed as dist

    import aot_cache

    dist.init_process_group("gloo")
    aot_cache.before_capture("first", True)
    dist.barrier()
    took = []
    began = time.perf_counter()
    for shape in range(options.shapes):
        one = time.perf_counter()
        aot_cache.before_capture(f"shape {shape}", True)
        aot_cache.after_capture(f"shape {shape}")
        took.append(time.perf_counter() - one)
    whole = time.perf_counter() - began
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.barrier()
    began = time.perf_counter()
    for shape in range(2 * options.shapes):
        dist.all_gather_object(gathered, {"batch": True, "hits": True, "why": "", "shape": shape})
    gloo = time.perf_counter() - began
    return {"a shape": 1e3 * statistics.median(took), "all shapes": 1e3 * whole, "gloo, all shapes": 1e3 * gloo}


def run_round(options: argparse.Namespace) -> Json:
    """The slowest rank's figures."""
    command = [sys.executable, "-W", "ignore", __file__, "--part", "rank", "--shapes", str(options.shapes)]
    jobs = [
        subprocess.Popen(command, env={**environment, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True)
        for environment in environments(options.ranks)
    ]
    answers = [json.loads(job.communicate(timeout=120)[0]) for job in jobs]
    return {name: max(answer[name] for answer in answers) for name in answers[0]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--shapes", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.part:
        print(json.dumps(part_rank(options)), flush=True)
        os._exit(0)
    rounds = [run_round(options) for _ in range(options.rounds)]
    record: Json = {"what": "agreement of ranks, milliseconds", "ranks": options.ranks, "shapes": options.shapes}
    record |= {"cores": os.cpu_count(), "rounds": rounds}
    record["median"] = {name: round(statistics.median(one[name] for one in rounds), 3) for name in rounds[0]}
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
