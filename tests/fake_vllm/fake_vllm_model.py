"""What the fake vLLM serves, and the recipe for it."""

import torch

from aot_cache import Call, Range, Recipe, declare


@torch.compile
def step(x: torch.Tensor) -> torch.Tensor:
    return (x * 3).cos() + 1


@declare(tokens=Range(2, 16))
def tokens(tokens: int) -> Call:
    return Call(step, torch.randn(tokens))


recipe = Recipe("fake-vllm", [tokens])
