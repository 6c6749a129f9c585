"""A process of `tools/serve.py` with `FakeEngine` in the model's place. FAKE_ENGINE is JSON: see the code."""

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

FAKE = json.loads(os.environ.get("FAKE_ENGINE", "{}"))


def make_engine(**options: Any) -> FakeEngine:
    options.pop("mark")("weights")
    print(json.dumps(options, default=str), flush=True)
    if "fails" in FAKE:
        raise RuntimeError(FAKE["fails"])
    while "waits_for" in FAKE and not Path(FAKE["waits_for"]).exists():
        time.sleep(0.01)

    def before(call: str) -> None:
        time.sleep(FAKE.get("seconds", 0.0))  # a call

    return FakeEngine(options["max_batch"], options["max_model_len"], options["num_speculative_tokens"], 50, before)


if __name__ == "__main__":
    module = types.ModuleType("aot_cache.models.qwen3_5.engine")
    module.make_engine = make_engine  # type: ignore[attr-defined]
    sys.modules["aot_cache.models.qwen3_5"] = types.ModuleType("aot_cache.models.qwen3_5")
    sys.modules[module.__name__] = module
    sys.exit(serve.main())
