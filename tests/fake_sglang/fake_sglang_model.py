"""What the fake SGLang serves, and the recipe for it."""

import torch

from aot_cache import Call, Range, Recipe, declare


@torch.compile
def step(x: torch.Tensor) -> torch.Tensor:
    return (x * 3).cos() + 1


@torch.compile
def draft_step(x: torch.Tensor) -> torch.Tensor:
    return (x * 5).sin() - 1


@declare(tokens=Range(2, 16), mode="no_grad")
def target(tokens: int) -> Call:
    return Call(step, torch.randn(tokens))


@declare(tokens=Range(2, 16), mode="no_grad")
def draft(tokens: int) -> Call:
    return Call(draft_step, torch.randn(tokens))


recipe = Recipe("fake-sglang", [target, draft])
