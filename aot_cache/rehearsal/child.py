"""The process that has only the bundle: `python -m aot_cache.rehearsal.child`, started by `process`.

Reads a job as JSON from stdin and writes events, one JSON object per line, to a copy of stdout. What libraries print goes to
stderr. It does what a server does, in the same order: load the bundle, make the model, `ready`, `seal`, call.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

Send = Callable[..., None]


def main() -> int:
    job = json.loads(sys.stdin.readline())
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(kind: str, **data: object) -> None:
        events.write(json.dumps({"event": kind, **data}) + "\n")

    from aot_cache.errors import AotCacheError, one_line

    try:
        _rehearse(job, send)
    except AotCacheError as error:
        send("error", type=type(error).__name__, **error.parts())
        return 1
    except Exception as error:
        traceback.print_exc()
        send("error", type="AotCacheError", expected=f"the rehearsal failed: {one_line(error)}", found="", hint="")
        return 1
    return 0


def _rehearse(job: Mapping[str, Any], send: Send) -> None:
    from aot_cache.artifact import manifest
    from aot_cache.recipes import declare as declaring
    from aot_cache.rehearsal import points
    from aot_cache.runtime import loader
    from aot_cache.store import read_bundle

    bundle = read_bundle(_path(job), job["digest"])
    built = manifest.whole(bundle)
    on_gpu = built.target["backend"] != "cpu"
    device = "cuda" if on_gpu else "cpu"
    _join(job)
    loader.load(bundle.path, digest=job["digest"], strict=True, policy="fallback")
    declaring.set_device(device)
    found = declaring.load(built.spec)
    chosen = points.choose(found, built.cases, job["cases"], job["points"])
    second = _start(device, bool(built.units))
    stage = _stage(device, second, job["tolerance"])
    _make_model(chosen, device)
    send("ready", not_ready=_ready(), device=_name(device))
    for one in chosen:
        send("case", name=one.case.name, declared=one.declared, chosen=len(one.points))
        for point in one.points:
            send("at", case=one.case.name, point=point)
            send("point", **stage.run(one.case, point).to_json())
        send("done", name=one.case.name, not_captured=stage.not_captured.get(one.case.name, ""))
    send("end")


def _path(job: Mapping[str, Any]) -> Any:
    from pathlib import Path

    return Path(job["bundle"])


def _join(job: Mapping[str, Any]) -> None:
    """Join the job's fake process group, if it has several ranks; the other ranks are assumed to do the same as this one."""
    if job["ranks"] > 1:
        from aot_cache.upstream.virtual import torch_fake_group

        torch_fake_group.join(job["rank"], job["ranks"])


def _start(device: str, kernels: bool) -> object:
    """Initialise the device, and start the second count of events, which is independent of the ledger."""
    import torch

    from aot_cache.upstream.hooks.second_count import SecondCount

    if device == "cuda":
        torch.zeros(1, device=device)
    return SecondCount(kernels=device == "cuda" or kernels)


def _stage(device: str, second: object, tolerance: float | None) -> Any:
    return importlib.import_module("aot_cache.rehearsal.serve").Stage(device, second, tolerance)


def _make_model(chosen: Any, device: str) -> None:
    """Make what the recipe makes once and keeps, because a server has its model before `ready`. Errors are reported later."""
    import contextlib

    from aot_cache.rehearsal import arguments

    for one in chosen:
        with contextlib.suppress(Exception):
            arguments.make(one.case, one.points[0], device)


def _ready() -> str:
    """Install and load everything, and seal; returns the error of `ready(strict=True)`, or an empty text."""
    from aot_cache.errors import NotReady
    from aot_cache.runtime import loader

    try:
        loader.ready(strict=True)
    except NotReady as error:
        return str(error)
    finally:
        loader.seal()
    return ""


def _name(device: str) -> str:
    from aot_cache.upstream.hooks import torch_capture

    return torch_capture.device_name() if device == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())
