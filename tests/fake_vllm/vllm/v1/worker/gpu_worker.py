import functools
import os
from typing import Any

import fake_vllm_model
import torch

from vllm.compilation.decorators import Model
from vllm.config import VllmConfig


def traced(function: Any) -> Any:
    """vLLM's own decorator around some steps."""

    @functools.wraps(function)
    def step(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return step


class Worker:
    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        self.step = fake_vllm_model.step
        self.model = Model(VllmConfig.here())

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        self.cache = torch.zeros(8)

    @traced
    def compile_or_warm_up_model(self) -> str:
        if "VLLM_CACHE_ROOT" in os.environ:
            self.model()
        self.execute_model(4)
        return "compilation times"

    @torch.inference_mode()
    def execute_model(self, size: int) -> list[float]:
        found: list[float] = self.step(torch.arange(size, dtype=torch.float32)).tolist()
        return found
