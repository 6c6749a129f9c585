"""gemlite's linear layer with weights of 4 bits: a matrix-vector kernel, split-K, or a plain product, by the batch."""

from functools import cache

import torch
from gemlite.helper import A16W4_HQQ_INT

from aot_cache import Call, Range, Recipe, declare, device


@cache
def layer() -> torch.nn.Module:
    weight = torch.randint(0, 16, (1024, 2048), dtype=torch.uint8, device=device())
    group = torch.ones(1024 * 32, 1, dtype=torch.float16, device=device())
    return A16W4_HQQ_INT(device=device()).from_weights(weight, group / 64, group * 8)


@declare(tokens=Range(1, 64))
def linear(tokens: int) -> Call:
    return Call(layer(), torch.randn(tokens, 2048, dtype=torch.float16, device=device()))


recipe = Recipe("gemlite", [linear])
