"""The process that becomes one target: `python -m aot_cache.build.worker`, started by `pipeline`.

Takes a job as JSON on stdin and answers with events, one JSON object a line, on a copy of stdout; whatever libraries
print goes to stderr. One process a target, because libraries decide at import what they will launch.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

Json = Any


def main() -> int:
    job = json.loads(sys.stdin.readline())
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(kind: str, **data: Json) -> None:
        events.write(json.dumps({"event": kind, **data}) + "\n")

    from aot_cache.errors import AotCacheError

    try:
        _work(job, send)
    except AotCacheError as error:
        send("error", type=type(error).__name__, wanted=error.wanted, found=error.found, do=error.do)
        return 1
    except Exception as error:
        traceback.print_exc()
        send(
            "error",
            type="AotCacheError",
            wanted="the build worker to finish",
            found=f"{type(error).__name__}: {error}",
            do="",
        )
        return 1
    return 0


def _work(job: dict[str, Json], send: Any) -> None:
    from aot_cache import target as targets
    from aot_cache.build import virtual_device

    target = targets.Target(**{**job["target"], "capability": tuple(job["target"]["capability"])})
    virtual_device.become(target)

    from aot_cache import recipe as recipes
    from aot_cache import shapes
    from aot_cache.build import compile as compiler
    from aot_cache.build import stamp, trace
    from aot_cache.plan import Plan
    from aot_cache.store import Store
    from aot_cache.upstream import triton_launcher

    def progress(stage: str, done: int, total: int) -> None:
        send("progress", stage=stage, done=done, total=total)

    recipe = None
    if job["recipe"]:
        ranges = {name: shapes.parse_dimension(text) for name, text in job["ranges"].items()}
        recipe = recipes.load(job["recipe"]).narrowed(ranges)
        plan = trace.trace(recipe, target.id, progress, job["workers"])
    else:
        plan = Plan.read(Path(job["plan"]))
    plan.write(Path(job["plan_out"]))
    send("traced", units=len(plan.units))
    if job["show_plan"]:
        return
    pythons = [triton_launcher.this_python(), *map(triton_launcher.other_python, job["pythons"])]
    pythons = list({p.suffix: p for p in pythons}.values())
    store = Store(job["store"])
    outcome = compiler.compile_plan(
        plan,
        recipe,
        target,
        store,
        line_info=job["line_info"],
        pythons=pythons,
        progress=progress,
        workers=job["workers"],
    )
    send(
        "compiled",
        keys=outcome.keys,
        memory_keys=outcome.memory_keys,
        compiled=outcome.compiled,
        native=outcome.native,
        failed=outcome.failed,
        toolchain=outcome.toolchain,
        inputs=stamp.inputs(trace.late_modules),
        python=sys.version.split()[0],
    )


if __name__ == "__main__":
    sys.exit(main())
