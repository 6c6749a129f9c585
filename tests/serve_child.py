"""A process of `examples/serving/serve.py` with `FakeEngine` in the model's place. FAKE_ENGINE is JSON: see the code."""

from __future__ import annotations

import json
import os
import sys
import time
import types
from pathlib import Path
from typing import Any

import serve
from fake_engine import FakeEngine
from limits import HANGS

from aot_cache.models.qwen3_5.settings import Settings, settings
from aot_cache.recipes.declare import Call, Recipe, declare
from aot_cache.recipes.dimensions import Values

FAKE = json.loads(os.environ.get("FAKE_ENGINE", "{}"))


class Fake(FakeEngine):
    def capture(self) -> dict[str, list[dict[str, Any]]]:
        return {"decode": [{"shape": 1, "action": "captured", "why": ""}, *FAKE.get("captures", [])]}


def make_engine(made: Settings, device: str, folder: str, layers: int | None, speculate: bool) -> Fake:
    print(json.dumps({"drafts": made.drafts, "speculate": speculate, "layers": layers}), flush=True)
    if "fails" in FAKE:
        raise RuntimeError(FAKE["fails"])
    while "waits_for" in FAKE and not Path(FAKE["waits_for"]).exists():
        time.sleep(0.01)

    def before(call: str) -> None:
        time.sleep(FAKE.get("seconds", 0.0))  # a call
        if call.startswith(FAKE.get("stuck_in", "nothing")):
            time.sleep(HANGS)

    return Fake(made.max_batch, made.max_model_len, made.drafts * speculate, 50, before)


@declare(batch=Values(1))
def decode(batch: int) -> Call:
    return Call(print, batch)


def recipe(*, spec: str = "mtp", max_batch: int = 4, max_model_len: int = 64) -> Recipe:
    made = settings(size="tiny", spec=spec, max_batch=max_batch, max_model_len=max_model_len)
    return Recipe("fake", [decode], settings=made)


if __name__ == "__main__":
    # What imports torch and transformers; the rest of the rooms is the real one.
    for name, fake in {"engine": make_engine, "recipe": recipe}.items():
        module = types.ModuleType(f"aot_cache.models.qwen3_5.{name}")
        setattr(module, fake.__name__, fake)
        sys.modules[module.__name__] = module
    sys.exit(serve.main())
