from typing import Any

from sglang.srt.managers.scheduler import run_scheduler_process
from sglang.srt.utils import add_prometheus_middleware

__all__ = ["launch", "run_scheduler_process"]


def launch() -> Any:
    app: list[Any] = []
    add_prometheus_middleware(app)
    return app[0]
