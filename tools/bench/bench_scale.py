#!/usr/bin/env python3
"""How builds, bundles and loading grow with their number of kernels, graphs and points; any machine, no GPU.

    python tools/bench/bench_scale.py [--kernels 10,100,1000] [--graphs 10,30,100] [--points 1000,1000000] [--out RECORD]

kernels   N different Triton kernels for `--target`: `aot-cache build` in an empty store, the bundle's size, and what a process
          that has imported torch needs to read and check it (no GPU: nothing is loaded onto one).
graphs    N different compiled functions for the CPU: the same, and a server: `load`, `ready`, and the first call of each, which
          must compile nothing.
points    a grid of N declared points: how long it takes to list them, and whether they are sampled.

Each step is a fresh process. `slope` is the exponent between the ends of a row of numbers (log over log): 1 is linear, 0 is flat.
A part that costs the same at every size lowers it, so `per_one` is what one more costs, between one size and the next: where it
rises, the work is worse than linear.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "gpu"))

from harness import PATH, cli, commit, empty_caches, finish, last_words, machine, without_ours

Json = Any
LINEAR = 1.1
"""Largest slope that counts as linear."""
SOURCE = '''
import torch
import triton
import triton.language as tl

from aot_cache import Call, Range, Recipe, Values, declare, device

KERNEL = """
@triton.jit
def kernel_{number}(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n)
    tl.store(x + at, tl.exp(value) * {number} + tl.sum(value, 0), mask=at < n)
"""


def kernels(count):
    @declare(name="kernels", k=Values(*range(count)))
    def case(k):
        import scale_kernels

        x = torch.empty(64, device=device())
        return Call(lambda: getattr(scale_kernels, f"kernel_{k}")[(1,)](x, 64, BLOCK=64))

    return Recipe(f"kernels{count}", [case])


FUNCTION = """
@torch.compile
def function_{number}(x, weight):
    y = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    return torch.nn.functional.silu(y * weight) + {number}
"""


def graphs(count):
    import scale_functions

    def of(number):
        function = getattr(scale_functions, f"function_{number}")
        arguments = lambda n: (torch.ones(n, 32, device=device()), torch.ones(32, device=device()))
        return declare(name=f"graph{number}", n=Range(2, 9))(lambda n: Call(function, *arguments(n)))

    return Recipe(f"graphs{count}", [of(number) for number in range(count)])
'''


def sources(folder: Path, kernels: list[int], graphs: list[int]) -> None:
    (folder / "scale.py").write_text(SOURCE)
    for kind, counts in (("kernels", kernels), ("graphs", graphs)):
        for n in counts:  # a module each: importing it makes its recipe only
            (folder / f"scale_{kind}{n}.py").write_text(f"import scale\n\nrecipe = scale.{kind}({n})\n")
    written(
        folder / "scale_kernels.py", "import triton\nimport triton.language as tl\n", "KERNEL", max(kernels, default=0)
    )
    written(folder / "scale_functions.py", "import torch\n", "FUNCTION", max(graphs, default=0))


def written(path: Path, head: str, template: str, count: int) -> None:
    """A module of `count` functions: Triton and Dynamo read their source."""
    text = SOURCE.partition(f'{template} = """')[2].partition('"""')[0]
    path.write_text(head + "".join(text.format(number=number) for number in range(count)))


# --- the measured processes -------------------------------------------------------------------------------------------


def read(bundle: str) -> Json:
    """What a server does with a bundle before the first graph or kernel is loaded."""
    import torch  # noqa: F401  # as a server has

    from aot_cache.artifact.manifest import served
    from aot_cache.store import read_bundle

    before = rss()
    began = time.perf_counter()
    found = read_bundle(Path(bundle), prefetch=True)
    served(found)
    read_s = time.perf_counter() - began
    found.require_sound()
    return {
        "read_ms": 1e3 * read_s,
        "all_hashes_ms": 1e3 * (time.perf_counter() - began - read_s),
        "memory_mib": rss() - before,
    }


def serve(bundle: str, count: int) -> Json:
    import torch
    import torch._dynamo
    import torch._inductor.compile_fx

    import aot_cache

    before = rss()
    marks = [time.perf_counter()]
    aot_cache.load(bundle, strict=True)
    marks.append(time.perf_counter())
    import scale_functions

    marks.append(time.perf_counter())
    aot_cache.ready()
    marks.append(time.perf_counter())
    with torch.inference_mode():
        for number in range(count):
            getattr(scale_functions, f"function_{number}")(torch.ones(5, 32), torch.ones(32))
    marks.append(time.perf_counter())
    total = aot_cache.stats()["total"]
    frames = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)  # noqa: SLF001  # upstream's own count
    assert total["graph"] == count and not total["graph_compile"] and not frames, (total, frames)
    load, _, ready, first = (1e3 * (b - a) for a, b in itertools.pairwise(marks))
    return {"load_ms": load, "ready_ms": ready, "first_calls_ms": first, "memory_mib": rss() - before}


def points(count: int) -> Json:
    from aot_cache import Call, Range, declare

    side = round(count ** (1 / 2))
    case = declare(name="grid", n=Range(1, side), m=Range(1, side))(lambda n, m: Call(print))
    began = time.perf_counter()
    found = case.points()
    seconds = time.perf_counter() - began
    return {
        "declared": found.total,
        "visited": len(found.points),
        "sampled": list(found.sampled),
        "list_ms": 1e3 * seconds,
    }


def rss() -> float:
    """MiB of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


# --- the parent -------------------------------------------------------------------------------------------------------


def measured(part: str, folder: Path, *arguments: object) -> Json:
    more = {"PYTHONPATH": os.pathsep.join([str(folder), PATH]), **empty_caches(folder / "caches")}
    command = [sys.executable, "-W", "ignore", __file__, "--part", part, *map(str, arguments)]
    done = subprocess.run(command, env={**without_ours(), **more}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit("\n".join(last_words(done.stderr)))
    return {name: round(x, 1) if isinstance(x, float) else x for name, x in json.loads(done.stdout).items()}


def built(folder: Path, name: str, target: str, workers: int) -> Json:
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    arguments = ["--model", f"scale_{name}:recipe", "--target", target, "--store", str(folder / name)]
    done = cli("build", *arguments, "--workers", str(workers), "--no-rehearse", "--json", "--quiet", paths=[folder])
    if done.returncode:
        raise SystemExit("\n".join(last_words(done.stderr)))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    (bundle,) = json.loads(done.stdout)["bundles"]
    return {
        "build_s": round(time.perf_counter() - began, 1),
        "build_processor_s": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "bundle_kib": round(bundle["size"] / 1024, 1),
        "units": bundle["units"],
        "graphs": bundle["graphs"],
        "path": bundle["path"],
    }


def curve(rows: list[Json]) -> Json:
    """Of each number in the rows: its exponent between the ends, and what one more costs at each step."""
    out = {}
    for name in (name for name, value in rows[0].items() if isinstance(value, float)):
        xs, ys = [row["n"] for row in rows], [row[name] for row in rows]
        steps = [(b - a) / (n - m) for a, b, m, n in zip(ys, ys[1:], xs, xs[1:], strict=False)]
        slope = math.log(max(ys[-1], 0.1) / max(ys[0], 0.1)) / math.log(xs[-1] / xs[0])
        out[name] = {"slope": round(slope, 2), "per_one": [round(step, 4) for step in steps]}
    return out


def table(rows: list[Json]) -> str:
    names = [name for name in rows[0] if name != "path"]
    lines = ["".join(f"{name:>18}" for name in names)]
    return "\n".join(lines + ["".join(f"{row[name]!s:>18}" for name in names) for row in rows])


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", type=numbers, default="10,100,1000")
    parser.add_argument("--graphs", type=numbers, default="10,30,100")
    parser.add_argument("--points", type=numbers, default="1000,1000000")
    parser.add_argument("--target", default="h200")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", metavar="FILE", help="where to write the record")
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part, *arguments = options.part
        found = {"read": read, "serve": lambda b, n: serve(b, int(n)), "points": lambda n: points(int(n))}[part](
            *arguments
        )
        print(json.dumps(found))
        return 0
    rows: dict[str, list[Json]] = {"kernels": [], "graphs": [], "points": []}
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        folder = Path(name)
        sources(folder, options.kernels, options.graphs)
        for n in options.kernels:
            row = built(folder, f"kernels{n}", options.target, options.workers)
            rows["kernels"].append({"n": n, **row, **measured("read", folder, row["path"])})
            print(table(rows["kernels"]), file=sys.stderr, flush=True)
        for n in options.graphs:
            row = built(folder, f"graphs{n}", "cpu", options.workers)
            rows["graphs"].append({"n": n, **row, **measured("serve", folder, row["path"], n)})
            print(table(rows["graphs"]), file=sys.stderr, flush=True)
        for n in options.points:
            rows["points"].append({"n": n, **measured("points", folder, n)})
    for row in (row for found in rows.values() for row in found):
        row.pop("path", None)
    curves = {name: curve(found) for name, found in rows.items() if len(found) > 1}
    claims = {
        f"{name}: {number} grows no faster than the number": facts["slope"] <= LINEAR
        for name, found in curves.items()
        for number, facts in found.items()
    }
    record = {"tool": "bench_scale", "commit": commit(), "machine": machine(), "load": round(os.getloadavg()[0], 1)}
    for name, found in rows.items():
        if found:
            print(f"{name}\n{table(found)}", file=sys.stderr)
    return finish(
        {
            **record,
            "target": options.target,
            "workers": options.workers,
            "claims": claims,
            "rows": rows,
            "curves": curves,
        },
        options.out,
    )


if __name__ == "__main__":
    sys.exit(main())
