"""Run jobs with several ranks on this host."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence

from harness import PATH

GRACE = 20.0
"""Seconds that the other ranks have to end after one has failed."""


def environments(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank of a new job, as a launcher sets it, with a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "PYTHONPATH": PATH}
    return [{**os.environ, **common, "RANK": str(rank)} for rank in range(ranks)]


def own_gpu(rank: int) -> dict[str, str]:
    """The variable that makes a rank see only its own GPU, as GPU 0, for which compiled graphs are built."""
    seen = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return {"CUDA_VISIBLE_DEVICES": seen[rank] if seen else str(rank)}


def run(command: Sequence[str], told: Sequence[Mapping[str, str]], seconds: float) -> list[tuple[int, str]]:
    """Start a process for each environment in `told`; returns (exit code, stderr) of each.

    They are killed after `seconds`. If one fails, the others are killed after `GRACE` seconds, because they may wait for it in
    a collective.
    """
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in told]
        jobs = [
            subprocess.Popen(command, env=dict(environment), stdout=subprocess.DEVNULL, stderr=file)
            for environment, file in zip(told, files, strict=True)
        ]
        try:
            deadline = time.monotonic() + seconds
            while any(job.poll() is None for job in jobs) and time.monotonic() < deadline:
                if any(job.poll() for job in jobs):
                    deadline = min(deadline, time.monotonic() + GRACE)
                time.sleep(0.2)
        finally:
            for job in jobs:
                job.kill()
                job.wait()
        for file in files:
            file.seek(0)
        return [(job.returncode, file.read()) for job, file in zip(jobs, files, strict=True)]
