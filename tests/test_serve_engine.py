"""The serving example over the real engine: tokens over HTTP are the engine's own, and a bundle of other sizes is told.

Nothing is compiled here: what the compiled functions compute is tested elsewhere.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("transformers.modeling_layers", reason="the real engine needs transformers")

import serve
import torch

from aot_cache.runtime import loader

Json = Any
SIZES = ["--max-batch", "2", "--max-model-len", "48", "--prefill-chunk", "8", "--dtype", "float32"]
PROMPTS = [[1], [5, 6, 7], list(range(20, 45)), [9] * 8]


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.fixture(autouse=True)
def _unsealed() -> Iterator[None]:
    yield
    loader.LEDGER.sealed = False


def options_of(*arguments: str) -> argparse.Namespace:
    return serve.make_parser().parse_args(["--model", "qwen3.5-tiny", "--device", "cpu", *SIZES, *arguments])
