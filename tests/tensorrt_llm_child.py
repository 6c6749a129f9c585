"""One rank of the jobs in test_tensorrt_llm.py: runs the scenes that it is told, and says what came of each as JSON lines.

FAKE_TENSORRT_LLM is the stand-in's layout, OVER how its ranks talk, LIMIT how many seconds a collective waits, OURS whether
aot-cache is there.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any

if os.environ["OURS"] == "1":
    import aot_cache.auto  # noqa: F401

from tensorrt_llm._torch.pyexecutor.model_engine import PyTorchModelEngine
from tensorrt_llm.stand_in import Cache, OverAnother, OverTorch, Resources

RANK, LIMIT = int(os.environ["RANK"]), float(os.environ["LIMIT"])
ENOUGH = 8
said: list[str] = []


class Kept(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        said.append(record.getMessage())


def connect() -> Any:
    if os.environ["OVER"] == "torch":
        return OverTorch(LIMIT)
    return OverAnother(int(os.environ["MASTER_PORT"]), LIMIT)


def warmed_up(engine: Any, blocks: int) -> dict[str, Any]:
    cache, error, began = Cache(blocks), "", time.monotonic()
    said.clear()
    try:
        engine.warmup(Resources(cache))
    except Exception as raised:
        error = f"{type(raised).__name__}: {raised}"
    seconds = time.monotonic() - began
    return {"ran": engine.ran, "error": error, "said": list(said), "leaked": blocks - cache.free, "seconds": seconds}


def capture(peers: Any, blocks: int = ENOUGH, sizes: tuple[int, ...] = (2, 8, 4), **options: Any) -> dict[str, Any]:
    return warmed_up(PyTorchModelEngine(peers, sizes, **options), blocks)


def dropping(scene: Callable[[], Any]) -> Any:
    os.environ["AOT_CACHE_MIXED"] = "drop"
    try:
        return scene()
    finally:
        del os.environ["AOT_CACHE_MIXED"]


def less(rank: int = 2) -> int:
    return 5 if rank == RANK else ENOUGH


SCENES: dict[str, Callable[[Any], Any]] = {
    "all have room": lambda peers: capture(peers, draft_lens=(0, 3)),
    "none has room for 8": lambda peers: capture(peers, 5),
    "one has no room for 8": lambda peers: capture(peers, less()),
    "one has no room for 8, dropped": lambda peers: dropping(lambda: capture(peers, less())),
    "two lack, dropped": lambda peers: dropping(lambda: capture(peers, {1: 3, 2: 5}.get(RANK, ENOUGH))),
    "one raises": lambda peers: capture(peers, fails_at=4 if RANK == 1 else 0),
    "one raises, dropped": lambda peers: dropping(lambda: capture(peers, fails_at=4 if RANK == 1 else 0)),
    "the draft lacks": lambda peers: [capture(peers), dropping(lambda: capture(peers, less(3), (4, 8)))],
    "told otherwise": lambda peers: dropping(lambda: capture(peers)) if RANK == 3 else capture(peers),
    "alone": lambda peers: capture(None, less()),
    "one shape": lambda peers: capture(peers, less(), (8,)),
    "other shapes": lambda peers: capture(peers, sizes=(8, 4) if RANK else (8, 2)),
}


def main() -> None:
    log = logging.getLogger("TRT-LLM")  # as TensorRT-LLM's own
    log.setLevel(logging.INFO)
    log.addHandler(Kept())
    peers, began = connect(), time.monotonic()
    for name in sys.argv[1:]:
        print(json.dumps([RANK, name, SCENES[name](peers)]), flush=True)
    if os.environ["OURS"] == "1":
        peers.allgather("end")  # the store is in the first rank, which must not be gone while others read
    else:
        time.sleep(
            max(0.0, LIMIT + 3 - (time.monotonic() - began))
        )  # as a server that goes on: a rank that is gone would not be waited for


main()
os._exit(0)  # whoever waits for this rank notices at once, and no destructor waits for others
