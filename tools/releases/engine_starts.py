"""`build --engine` with a real engine, on a machine without a GPU: what was built, and what it took."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TARGET = "h200"
KEPT = ("units", "graphs", "size", "compiled", "neighbours", "failed")


def built(engine: str, python: str, folder: Path, arguments: list[str]) -> dict[str, Any]:
    """One build, in the environment of a real engine."""
    command = [python, "-m", "aot_cache", "build", "--engine", engine, "--target", TARGET, "--json", "--no-rehearse"]
    own = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "AOT_CACHE_UNTESTED": "1", "HF_HUB_OFFLINE": "1"}
    # FlashInfer is in none of vLLM's environments here; where it is not, vLLM asks for this setting.
    environment = {**os.environ, **own, "VLLM_USE_FLASHINFER_SAMPLER": "0", "HOME": str(folder)}
    folder.mkdir(parents=True, exist_ok=True)
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [*command, "--store", str(folder / "store"), "--", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    if not done.stdout.strip() or done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    (made,) = json.loads(done.stdout)["bundles"]
    start = made["engine"]
    out = {name: made[name] for name in KEPT} | {"nothing_to_do": made["nothing_to_do"], "path": made["path"]}
    out |= {"seconds": round(seconds, 1), "cpu seconds": round(_cpu(after) - _cpu(before), 1)}
    out |= {"engine version": start["version"], "requests": start["requests"], "unreached": start["unreached"]}
    out |= {"models": start["models"], "places with assumed values": len(start["assumed"])}
    out["largest process, GiB"] = round(after.ru_maxrss / 2**20, 2)
    return out


def _cpu(used: resource.struct_rusage) -> float:
    return used.ru_utime + used.ru_stime
