#!/usr/bin/env python3
"""Check on several GPUs that ranks never disagree about a capture, and print one JSON record.

    python tools/gpu/check_ranks.py [--ranks 2] [--out RECORD.json]

A tensor-parallel layer with an all-reduce (NCCL) inside the captured graph; the last rank has no room for the largest shape,
and for another one it misses while it captures. First without us: the job hangs, and is killed. Then with
`aot_cache.capture`: the same decision on all ranks, replays right, no hang. And what agreeing costs beside a capture.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jobs
from harness import commit, finish, hand_over, last_words

Json = Any
SHAPES = (1, 2, 4, 8, 16, 32)
LACKING, MISSING = 32, 4
WIDTH = 1024


class Layer:
    """One rank's part of two matrix products followed by an all-reduce, and the whole layer for comparison."""

    def __init__(self) -> None:
        import torch
        import torch.distributed as dist

        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        torch.manual_seed(0)
        up, down = (torch.randn(WIDTH, WIDTH, device="cuda") / WIDTH**0.5 for _ in range(2))
        self.whole = (up, down)
        self.up = up.chunk(self.size, 1)[self.rank].contiguous()
        self.down = down.chunk(self.size, 0)[self.rank].contiguous()
        self.missing = False

    def batch(self, shape: int) -> Any:
        import torch

        if shape == LACKING and self.rank == self.size - 1:
            return None
        return torch.ones(shape, WIDTH, device="cuda")

    def step(self, x: Any) -> Any:
        import torch
        import torch.distributed as dist

        out = torch.nn.functional.silu(x @ self.up) @ self.down
        if self.rank == self.size - 1 and len(x) == MISSING and torch.cuda.is_current_stream_capturing():
            out = nothing_new(out)  # only this rank falls back, and only during the capture
        dist.all_reduce(out)
        return out

    def alone(self, x: Any) -> Any:
        import torch

        up, down = self.whole
        return torch.nn.functional.silu(x @ up) @ down


def nothing_new(x: Any) -> Any:
    import torch

    return torch.compile(lambda x: x * 1)(x)


def part_without(_: argparse.Namespace) -> Json:
    """Without `aot_cache.capture`: a rank without a batch goes on to the next shape, as engines did."""
    layer = Layer()
    import torch

    for shape in sorted(SHAPES, reverse=True):
        batch = layer.batch(shape)
        if batch is not None:
            layer.step(batch)
            torch.cuda.synchronize()
    return {"hung": False}


def part_with(options: argparse.Namespace) -> Json:
    import torch
    import torch.distributed as dist

    import aot_cache
    from aot_cache.errors import RankDisagreement
    from aot_cache.runtime import rank_agreement

    aot_cache.arm("fallback")
    layer = Layer()
    answer: Json = {}
    try:
        aot_cache.capture(SHAPES, layer.batch, layer.step)
    except RankDisagreement as error:
        answer["error"] = str(error)
    began = time.perf_counter()
    found = aot_cache.capture(SHAPES, layer.batch, layer.step, mixed="drop")
    answer["seconds"] = time.perf_counter() - began
    answer["report"], answer["captured"] = found.report, list(found.graphs)
    worst = 0.0
    for shape, graph in found.graphs.items():
        torch.manual_seed(shape)
        found.batches[shape].copy_(torch.randn(shape, WIDTH, device="cuda"))
        graph.replay()
        torch.cuda.synchronize()
        wanted = layer.alone(found.batches[shape])
        worst = max(worst, float((found.outputs[shape] - wanted).norm() / wanted.norm()))
    answer["replays"] = worst
    answer["agreeing ms"] = cost(lambda: rank_agreement.of().gather({"batch": True, "hits": True, "why": ""}, "cost"))
    began = time.perf_counter()
    for shape in found.graphs:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer.step(found.batches[shape])
    answer["one capture ms"] = 1e3 * (time.perf_counter() - began) / len(found.graphs)
    dist.barrier()
    return answer


def cost(call: Any, times: int = 200) -> float:
    """Median milliseconds of one call."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    return 1e3 * sorted(took)[times // 2]


def run_job(part: str, options: argparse.Namespace, seconds: float) -> list[Json]:
    """Run a part on all ranks; returns the answer of each, or that it hung or died."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-W", "ignore", __file__, "--part", part, "--ranks", str(options.ranks)]
        places = [Path(folder, f"{rank}.json") for rank in range(options.ranks)]
        told = [{**one, "ANSWER": str(place)} for one, place in zip(jobs.environments(options.ranks), places)]
        answers = []
        for place, (code, said) in zip(places, jobs.run(command, told, seconds)):
            if code == -signal.SIGKILL:
                answers.append({"hung": True})
            else:
                answers.append(json.loads(place.read_text()) if place.exists() else {"died": last_words(said)[-8:]})
        return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    options = parser.parse_args()
    import torch

    if options.part:
        import torch.distributed as dist

        torch.cuda.set_device(int(os.environ["RANK"]))
        dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["RANK"])))
        os._exit(hand_over(globals()[f"part_{options.part}"](options)))
    without = run_job("without", options, 40)
    ours = run_job("with", options, 150)
    record: Json = {"what": "ranks and captures", "gpus": options.ranks, "gpu": torch.cuda.get_device_name()}
    record |= {"commit": commit(), "torch": torch.__version__, "nccl": ".".join(map(str, torch.cuda.nccl.version()))}
    whole = all("report" in one for one in ours)
    alike = whole and all(one["report"] == ours[0]["report"] and one["error"] == ours[0]["error"] for one in ours)
    record["claims"] = {
        "without us the job hangs": any(one.get("hung") for one in without),
        "nothing hangs, and no rank dies": whole,
        "the same decision, and the same error, on every rank": alike,
        "the shape that one rank has no room for is dropped on all": alike and LACKING not in ours[0]["captured"],
        "a miss of one rank's capture drops the graph on all": alike and MISSING not in ours[0]["captured"],
        "all others are captured": alike and set(ours[0]["captured"]) == set(SHAPES) - {LACKING, MISSING},
        "replays are right": whole and all(one["replays"] < 1e-3 for one in ours),
        "agreeing takes under 2 ms": whole and all(one["agreeing ms"] < 2 for one in ours),
    }
    record |= {"without us": without, "with us": ours}
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
