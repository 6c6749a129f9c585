"""One rank of the jobs in test_ranks.py: runs the scenes that it is told, and says what came of each as JSON lines."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

import aot_cache
from aot_cache.errors import RankDisagreement
from aot_cache.runtime import capture_loop, rank_agreement

SHAPES = (1, 8, 4)
LINGERS = 3.0


def rank() -> int:
    return dist.get_rank()


class Model:
    """A step with a collective in it: a rank that skips it makes the others wait for ever."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    def batch(self, shape: int) -> Any:
        return torch.full((shape,), float(rank() + 1))

    def step(self, batch: Any) -> Any:
        self.ran.append(len(batch))
        out = batch.clone()
        dist.all_reduce(out)
        return out


def loop(make_batch: Callable[[int], Any] | None = None, **options: Any) -> dict[str, Any]:
    model = Model()
    answer: dict[str, Any] = {"ran": model.ran}
    try:
        found = aot_cache.capture(SHAPES, make_batch or model.batch, model.step, **options)
    except RankDisagreement as error:
        return {**answer, "error": str(error)}
    sums = [float(out[0]) for out in found.outputs.values()]
    return {**answer, "report": found.report, "captured": list(found.graphs), "sums": sums}


def asked(call: Callable[[], Any]) -> dict[str, Any]:
    began = time.monotonic()
    try:
        answer = {"answer": call()}
    except RankDisagreement as error:
        answer = {"error": str(error)}
    return {**answer, "seconds": time.monotonic() - began}


def some_have_none(shape: int) -> Any:
    return None if shape == 8 and rank() == 2 else Model().batch(shape)


def lacking(shape: int) -> tuple[str, dict[str, int]]:
    return ("decode", {"tokens": shape})


def capture_where_one_rank_lacks_a_unit(**options: Any) -> dict[str, Any]:
    hit = aot_cache.Hit(rank() != 1, [] if rank() != 1 else ["model:gated: its graph is not loaded"])
    original, capture_loop.will_hit = capture_loop.will_hit, lambda *_: hit
    try:
        return loop(covers=lacking, **options)
    finally:
        capture_loop.will_hit = original


def a_miss_during_the_capture() -> dict[str, Any]:
    """Only rank 3 falls back, and only while it captures shape 4."""
    from pretend import capture

    times = {"n": 0}

    @torch.compile(backend=lambda graph, inputs: graph.forward)
    def compiled(x: Any) -> Any:
        return x * 2

    model = Model()

    def step(batch: Any) -> Any:
        times["n"] += len(batch) == 4
        if rank() == 3 and len(batch) == 4 and times["n"] == 2:
            with capture():
                compiled(batch)
        return model.step(batch)

    found = aot_cache.capture(SHAPES, model.batch, step)
    return {"report": found.report, "captured": list(found.graphs)}


def load(own: str, strict: bool = True) -> dict[str, Any]:
    """Load together: the last rank what is called `own`, the others `one`."""
    name = own if rank() == dist.get_world_size() - 1 else "one"
    before = len(aot_cache.stats()["bundles"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            aot_cache.load(f"{os.environ['FOLDER']}/{name}.safetensors", together=True, strict=strict)
            error = ""
        except RankDisagreement as disagreement:
            error = str(disagreement)
    return {"loaded": len(aot_cache.stats()["bundles"]) - before, "error": error, "warnings": len(caught)}


SCENES: dict[str, Callable[[], Any]] = {
    "all say yes": lambda: asked(lambda: rank_agreement.agree_all(True, "start")),
    "one says no": lambda: asked(lambda: rank_agreement.agree_all(rank() != 2, "start", why="no memory")),
    "all the same": lambda: asked(lambda: rank_agreement.agree_same("abc", "bundle")),
    "one differs": lambda: asked(lambda: rank_agreement.agree_same("abc" if rank() != 3 else "def", "bundle")),
    "another place": lambda: asked(lambda: rank_agreement.agree_all(True, "left" if rank() else "right")),
    "all have batches": loop,
    "none has a batch for 8": lambda: loop(lambda shape: None if shape == 8 else Model().batch(shape)),
    "one has no batch for 8": lambda: loop(some_have_none),
    "one has no batch for 8, dropped": lambda: loop(some_have_none, mixed="drop"),
    "one lacks a unit": capture_where_one_rank_lacks_a_unit,
    "one lacks a unit, dropped": lambda: capture_where_one_rank_lacks_a_unit(mixed="drop"),
    "the same bundle": lambda: load("one"),
    "another bundle": lambda: load("other"),
    "no bundle": lambda: load("none", strict=False),
    "a miss during the capture": a_miss_during_the_capture,
}


def hangs_without_us() -> Any:
    """What engines did: a rank without a batch goes on, to serving, and the others wait for it in a collective."""
    model = Model()
    batch = some_have_none(8)
    if batch is None:
        time.sleep(60)
    else:
        model.step(batch)
    return {"ran": model.ran}


def killed() -> Any:
    if rank() == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return asked(lambda: rank_agreement.agree_all(True, "start", timeout=2))


def sleeps() -> Any:
    if rank() == 1:
        time.sleep(4)
    return asked(lambda: rank_agreement.agree_all(True, "start", timeout=1 if rank() != 1 else 3))


def raises() -> Any:
    def make_batch(shape: int) -> Any:
        if rank() == 1 and shape == 4:
            raise MemoryError("out of memory for 4")
        return Model().batch(shape)

    began = time.monotonic()
    try:
        return {**loop(make_batch, timeout=30), "seconds": time.monotonic() - began}
    except MemoryError as error:
        return {"own": str(error)}


FATAL: dict[str, Callable[[], Any]] = {
    "hangs without us": hangs_without_us,
    "killed": killed,
    "sleeps": sleeps,
    "raises": raises,
}


def main() -> None:
    aot_cache.arm("fallback")
    dist.init_process_group("gloo")
    names = sys.argv[1:] or list(SCENES)
    for name in names:
        print(json.dumps([rank(), name, {**SCENES, **FATAL}[name]()]), flush=True)
    if rank() == 0:
        time.sleep(LINGERS)  # the store is in this process, and the others may still have something to read
    os._exit(0)  # not through a destructor that waits for ranks which are no more


if __name__ == "__main__":
    main()
