"""What the tools share that start jobs of several ranks on this host."""

from __future__ import annotations

import os
import socket
from pathlib import Path

HERE = Path(__file__).resolve().parent


def environments(ranks: int) -> list[dict[str, str]]:
    """The environment of each rank of a new job: what a launcher sets, with a port that is free now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    paths = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks), "PYTHONPATH": paths}
    return [{**os.environ, **common, "RANK": str(rank)} for rank in range(ranks)]
