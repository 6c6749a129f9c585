#!/usr/bin/env python3
"""Check on a real GPU what aot-cache claims of misses inside captures, and print one JSON record.

    python tools/gpu/check_guard.py [--only cells,entrances,libraries,loop] [--jobs 12] [--out RECORD.json]

cells       every case of `guard_cases.py` × capture mode × (whole capture, side stream), first without us, then with us under
            each policy: a first call inside a capture, replays, the same call outside, a second capture
entrances   `capture_begin`, `make_graphed_callables`, `cudagraph_trees`, and a miss while another thread captures
libraries   the first matrix product, convolution and attention of a process inside a capture
loop        a bundle that lacks points → the file of misses → `build --misses` → no miss
Each cell is a process of its own with empty caches. Exit code 0 when every claim holds.
"""

from __future__ import annotations

import argparse
import ctypes
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from harness import Independent, build, commit, distance, finish, hand_over, ran

Json = Any
MODES = ("global", "thread_local", "relaxed")
WHERE = ("whole", "side")
LIBRARIES = {
    "matrix product": lambda t: t @ t,
    "linear with a bias": lambda t: __import__("torch").nn.functional.linear(t, t, t[0]),
    "convolution": lambda t: __import__("torch").nn.functional.conv2d(t[None, None], t[None, None, :3, :3]),
    "attention": lambda t: __import__("torch").nn.functional.scaled_dot_product_attention(*[t[None, None]] * 3),
    "random numbers": lambda t: __import__("torch").rand_like(t),
}


# --- one cell, in a process of its own ----------------------------------------------------------------------------------


class Watch:
    """Events since the last call: upstream's, counted by hooks below ours, and the ledger's."""

    def __init__(self) -> None:
        self._independent = Independent()  # hooked before ours: calls that we answer never get here
        self._before: Counter[str] = Counter()

    def watch_driver(self) -> None:
        self._independent.watch_driver()

    def since(self) -> Json:
        import aot_cache

        stats = aot_cache.stats()
        now = Counter(stats["in_capture"]) + Counter({f"all {k}": v for k, v in stats["total"].items()})
        ledger = {kind: count - self._before[kind] for kind, count in now.items() if count != self._before[kind]}
        self._before = now
        events = {kind: count for kind, count in self._independent.counts.items() if count}
        self._independent.counts.clear()
        return {
            "events": events,
            "in_capture": {k: v for k, v in ledger.items() if not k.startswith("all ")},
            "ledger": {k.removeprefix("all "): v for k, v in ledger.items() if k.startswith("all ")},
        }


def captured(call: Callable[[Any], Any], x: Any, mode: str, where: str) -> tuple[Any, Any]:
    """Capture a call; returns (graph, its output)."""
    import torch

    graph, stream = torch.cuda.CUDAGraph(keep_graph=True), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode=mode):
        if where == "whole":
            return graph, call(x)
        side = torch.cuda.Stream()
        side.wait_stream(stream)
        with torch.cuda.stream(side):
            out = call(x)
        stream.wait_stream(side)
    return graph, out


def nodes_of(graph: Any) -> int:
    """Number of nodes in a captured graph."""
    count = ctypes.c_size_t()
    ctypes.CDLL("libcuda.so.1").cuGraphGetNodes(ctypes.c_void_p(graph.raw_cuda_graph()), None, ctypes.byref(count))
    return count.value


def lost(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160] if str(error).strip() else ''}"


def capture_and_replay(case: Any, x: Any, options: argparse.Namespace) -> Json:
    """Capture the case's call, and replay it with other values."""
    import torch

    try:
        graph, out = captured(case.call, x, options.mode, options.where)
    except Exception as error:
        torch.cuda.synchronize()
        return {"lost": lost(error), "cause": lost(error.__cause__ or error.__context__ or error)}
    nodes = {
        "nodes": nodes_of(graph),
        "nodes of eager": nodes_of(captured(case.eager, x, options.mode, options.where)[0]),
    }
    worst = 0.0
    for _ in range(2):
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.cuda.synchronize()
        worst = max(worst, distance(out, case.eager(x)))
    return {"lost": "", "error": worst, **nodes}


def part_cell(options: argparse.Namespace) -> Json:
    """A first call inside a capture, the same call outside, and a second capture."""
    import torch

    watch = Watch()
    import aot_cache

    if options.policy != "none":
        aot_cache.arm("fallback" if options.policy == "rocm" else options.policy)
    from guard_cases import CASES, SIZE

    if options.policy == "rocm":  # pretend to be on ROCm only for the decisions of the guard
        from aot_cache.upstream.hooks import torch_capture

        torch_capture.on_rocm = lambda: True
    case = CASES[options.case]
    x = torch.randn(SIZE, device="cuda")
    from triton.runtime.driver import driver

    _ = driver.active.utils
    watch.watch_driver()
    if case.warm:
        case.warm(x)
    watch.since()
    answer = {"first": {**capture_and_replay(case, x, options), **watch.since()}}
    try:
        answer["outside"] = {"error": distance(case.call(x), (case.measuring or case.eager)(x)), **watch.since()}
    except Exception as error:
        return {**answer, "outside": {"lost": lost(error)}, "second": {}}
    answer["second"] = {**capture_and_replay(case, x, options), **watch.since()}
    stats = aot_cache.stats()
    return {**answer, "why": [f"{m['action']}: {m['why']}" for m in stats["misses"]], "unsafe": stats["unsafe"]}


def part_entrance(options: argparse.Namespace) -> Json:
    """A first call in the other ways to start a capture."""
    import torch

    watch = Watch()
    import aot_cache

    if options.policy != "none":
        aot_cache.arm(options.policy)
    import guard_cases

    x = torch.randn(guard_cases.SIZE, device="cuda")
    want = lambda: (x * 2).cos() * 2 + 2  # noqa: E731
    watch.since()
    try:
        if options.case == "capture_begin":
            graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.Stream()):
                graph.capture_begin(capture_error_mode=options.mode)
                out = guard_cases.other_in_capture(x * 2) + 1
                graph.capture_end()
            graph.replay()
        elif options.case == "make_graphed_callables":
            out = torch.cuda.make_graphed_callables(lambda x: guard_cases.other_in_capture(x * 2) + 1, (x,))(x)
        elif options.case == "cudagraph_trees":
            with torch.no_grad():
                for _ in range(4):
                    out = guard_cases.in_trees(x).clone()
        else:
            out = beside_another_capture(guard_cases, x)
        torch.cuda.synchronize()
        return {"lost": "", "error": distance(out, want()), **watch.since()}
    except Exception as error:
        return {"lost": lost(error), **watch.since()}


def beside_another_capture(cases: Any, x: Any) -> Any:
    """Make a first call on this thread while another thread captures in mode `global`; then replay that capture."""
    import torch

    begun, done, found = threading.Event(), threading.Event(), {}

    def capture() -> None:
        try:
            graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
            other = torch.ones(16, device="cuda")
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                begun.set()
                done.wait(60)
                out = other * 3
            graph.replay()
            torch.cuda.synchronize()
            found["sum"] = float(out.sum())
        except Exception as error:
            found["error"] = error
        finally:
            begun.set()

    thread = threading.Thread(target=capture)
    thread.start()
    begun.wait(60)
    try:
        out = cases.late(x * 2) + 1
    finally:
        done.set()
        thread.join()
    if found.get("sum") != 48.0:
        raise found.get("error", AssertionError(str(found)))
    return out


def part_library(options: argparse.Namespace) -> Json:
    import torch

    import aot_cache

    if options.policy != "none":
        aot_cache.arm(options.policy)
    t = torch.empty(64, 64, device="cuda", dtype=torch.bfloat16).fill_(0.1)
    try:
        graph, out = captured(LIBRARIES[options.case], t, "global", "whole")
        graph.replay()
        torch.cuda.synchronize()
        return {"lost": "", "finite": bool(out.isfinite().all())}
    except Exception as error:
        return {"lost": lost(error)}


def part_serve(options: argparse.Namespace) -> Json:
    """Serve more points than the bundle has, each first call inside a capture."""
    import torch

    watch = Watch()
    import aot_cache

    aot_cache.load(options.case, strict=True, policy=options.policy)
    import guard_loop

    failed, worst = [], 0.0
    with torch.inference_mode():
        torch.zeros(1, device="cuda")
        aot_cache.ready(strict=True)
        aot_cache.seal()
        watch.since()
        for tokens in range(1, guard_loop.SERVED + 1):
            x = torch.randn(tokens, guard_loop.WIDTH, device="cuda")
            try:
                graph, out = captured(lambda x: guard_loop.step(x, guard_loop.weight()), x, "global", "whole")
                graph.replay()
                torch.cuda.synchronize()
                worst = max(worst, distance(out, guard_loop.in_eager(x, guard_loop.weight())))
            except Exception as error:
                failed.append(f"{tokens}: {lost(error)}")
    return {"lost": failed, "error": worst, **watch.since(), "misses": len(aot_cache.stats()["misses"])}


def loop() -> Json:
    """Serve with a bundle that lacks points, build from the misses, and serve again."""
    with tempfile.TemporaryDirectory() as folder:
        misses = Path(folder, "misses.jsonl")
        first = build("guard_loop:recipe", "h200", Path(folder, "store"))
        if "error" in first:
            return {"first build": first}
        lacking = run_cell("serve", first["path"], "fallback", environment={"AOT_CACHE_MISSES": str(misses)})
        lines = misses.read_text().splitlines()
        second = build("guard_loop:recipe", "h200", Path(folder, "store"), "--misses", str(misses))
        after = run_cell("serve", second.get("path", ""), "error") if "error" not in second else {}
        return {
            "first build": first,
            "serving": lacking,
            "lines": len(lines),
            "second build": second,
            "serving again": after,
        }


# --- all cells ------------------------------------------------------------------------------------------------------------


def run_cell(
    part: str,
    case: str,
    policy: str,
    mode: str = "global",
    where: str = "whole",
    environment: dict[str, str] | None = None,
) -> Json:
    """The answer of one cell's process. It counts even if the process then ends with an error."""
    told = ["--case", case, "--policy", policy, "--mode", mode, "--where", where]
    found = ran(__file__, part, told, 300, TORCHINDUCTOR_COMPILE_THREADS="1", **(environment or {}))
    return {"died": found.said[-8:]} if found.answer is None else found.answer


def cells_to_run(which: set[str]) -> list[tuple[str, ...]]:
    from guard_cases import CASES

    todo: list[tuple[str, ...]] = []
    if "cells" in which:
        for policy in ("none", "fallback"):
            todo += [("cell", case, policy, mode, where) for case in CASES for mode in MODES for where in WHERE]
        todo += [("cell", case, "error", "global", "whole") for case in CASES]
        todo += [("cell", case, "rocm", "global", "whole") for case in CASES]
        todo += [("cell", case, "observe", "thread_local", "whole") for case in CASES]
    if "entrances" in which:
        entrances = ("capture_begin", "make_graphed_callables", "cudagraph_trees", "another thread")
        todo += [("entrance", case, policy) for case in entrances for policy in ("none", "fallback")]
    if "libraries" in which:
        todo += [("library", case, policy) for case in LIBRARIES for policy in ("none", "fallback")]
    return todo


def whole_answer(answer: Json) -> bool:
    return "died" not in answer


def right(answer: Json) -> bool:
    return not answer.get("lost") and answer.get("error", 1.0) < 1e-5


def fell_back(case: Any, answer: Json) -> bool:
    """The row "miss, capture active": no capture lost, replays equal eager, counts exact."""
    first = answer.get("first", {})
    counted = {k: v for k, v in first.get("in_capture", {}).items() if k in ("fallback", "unsafe", "refused")}
    harmful = set(first.get("events", {})) - ({"compile", "module_load", "gcc"} if case.compiles else set())
    compiles = first.get("events", {}).get("compile", 0) == int(case.compiles)
    return whole_answer(answer) and right(first) and counted == case.counts and not harmful and compiles


def then_compiles(case: Any, answer: Json) -> bool:
    """The row "miss, no capture": after the capture the same call compiles (or tunes) as usual."""
    outside = answer.get("outside", {})
    only_a_kernel = case.counts == {"unsafe": 1}  # already compiled and loaded inside the capture
    return right(outside) and bool(outside["events"]) != only_a_kernel and not outside["in_capture"]


def then_hits(answer: Json) -> bool:
    """The row "hit": the second capture has no event and no count."""
    second = answer.get("second", {})
    return right(second) and not second["events"] and not second["ledger"]


def refused(answer: Json) -> bool:
    first = answer.get("first", {})
    return whole_answer(answer) and (
        "CacheMiss" in first.get("lost", "") and not set(first["events"]) and then_hits(answer)
    )


def claims_of(done: dict[tuple[str, ...], Json]) -> dict[str, bool]:
    from guard_cases import CASES, FALLBACK

    def without(cell: tuple[str, ...]) -> Json:
        return done[(*cell[:2], "none", *cell[3:])]

    claims: dict[str, bool] = {}
    by = {
        policy: {cell: a for cell, a in done.items() if cell[0] == "cell" and cell[2] == policy} for policy in POLICIES
    }
    if any(by.values()):
        ours = by["fallback"]
        claims["miss, capture active: nothing lost, replays equal eager, counts exact"] = all(
            fell_back(CASES[cell[1]], answer) for cell, answer in ours.items()
        )
        claims["miss, no capture: compiles as ever"] = all(then_compiles(CASES[c[1]], a) for c, a in ours.items())
        claims["hit: no event at all"] = all(then_hits(answer) for answer in ours.values())
        claims["policy error: raises before anything happens, and a later capture hits"] = all(
            map(refused, by["error"].values())
        )
        claims["policy observe: as without us"] = all(
            all(bool(answer["first"][fact]) == bool(without(cell)["first"][fact]) for fact in ("lost", "events"))
            for cell, answer in by["observe"].items()
        )
        claims["on ROCm: eager, a twin, or an error before anything is recorded"] = all(
            refused(a) if "unsafe" in CASES[c[1]].counts else fell_back(CASES[c[1]], a) for c, a in by["rocm"].items()
        )
        claims["nothing is recorded that eager would not have launched"] = all(
            a["first"]["nodes"] == a["first"]["nodes of eager"]
            for c, a in {**ours, **by["rocm"]}.items()
            if CASES[c[1]].counts == FALLBACK
        )
        claims["without us captures are lost, or compiled into"] = all(
            a["first"]["lost"] or a["first"]["events"] for a in by["none"].values()
        )
    for part in ("entrance", "library"):
        mine = {cell: a for cell, a in done.items() if cell[0] == part and cell[2] == "fallback"}
        if mine:
            claims[f"{part}: nothing lost"] = all(whole_answer(a) and not a["lost"] for a in mine.values())
    entrances = [a for cell, a in done.items() if cell[0] == "entrance" and cell[2] == "fallback"]
    if entrances:
        claims["entrance: falls back, right results"] = all(
            right(a) and a["in_capture"].get("fallback", 0) >= 1 and not a["in_capture"].get("frame") for a in entrances
        )
    return claims


POLICIES = ("none", "fallback", "error", "observe", "rocm")


def table(done: dict[tuple[str, ...], Json]) -> Json:
    """One line for each cell."""

    def line(answer: Json) -> Json:
        if not whole_answer(answer) or "first" not in answer:
            return answer
        first = answer["first"]
        kept = {
            k: first[k] for k in ("lost", "error", "events", "in_capture", "nodes", "nodes of eager") if first.get(k)
        }
        rest = {part: answer[part].get("events") for part in ("outside", "second") if answer.get(part)}
        losses = {f"{part} lost": answer[part]["lost"] for part in ("outside", "second") if answer[part].get("lost")}
        return {**kept, **{k: v for k, v in rest.items() if v}, **losses}

    return {" · ".join(cell): line(answer) for cell, answer in done.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="cells,entrances,libraries,loop")
    parser.add_argument("--jobs", type=int, default=12)
    parser.add_argument("--out")
    for name in ("part", "case", "policy", "mode", "where"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        return hand_over(globals()[f"part_{options.part}"](options))
    import torch
    import triton

    which = set(options.only.split(","))
    with ThreadPoolExecutor(options.jobs) as pool:
        todo = cells_to_run(which)
        done = dict(zip(todo, pool.map(lambda cell: run_cell(*cell), todo)))
    record: Json = {"what": "misses inside captures", "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    record["commit"] = commit()
    record |= {"triton": triton.__version__, "claims": claims_of(done), "cells": table(done)}
    if "loop" in which:
        record["loop"] = found = loop()
        lacking, after = found.get("serving", {}), found.get("serving again", {})
        record["claims"]["loop: without the points nothing is lost, and it is counted"] = (
            lacking.get("lost") == [] and lacking["error"] < 1e-5 and lacking["in_capture"].get("fallback", 0) > 0
        )
        record["claims"]["loop: built from the misses, no miss and no event"] = (
            after.get("lost") == [] and after["error"] < 1e-5 and not after["events"] and after["misses"] == 0
        )
    record["why"] = {
        " · ".join(c): a["why"] for c, a in done.items() if a.get("why") and c[2:] == ("fallback", "global", "whole")
    }
    return finish(record, options.out)


if __name__ == "__main__":
    sys.exit(main())
