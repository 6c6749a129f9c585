"""liger-kernel's norms, activations, softmax, rotary embedding and loss, forward only."""

import torch
from liger_kernel.transformers import functional as liger
from torch import ones, randn

from aot_cache import Call, Case, Range, Recipe, declare, device

TAKES = {"rms_norm": "xwe", "layer_norm": "xwwe", "fused_add_rms_norm": "xxwe", "softmax": "x", "relu_squared": "x"}
TAKES |= {"swiglu": "xx", "geglu": "xx", "dyt": "xsww", "rope": "qkcc", "cross_entropy": "xt"}


def case(name: str, takes: str) -> Case:
    @declare(name=name, tokens=Range(1, 64))
    def call(tokens: int) -> Call:
        with torch.device(device()):
            made = {"x": randn(tokens, 2048), "w": ones(2048), "e": 1e-6, "s": ones(1), "t": torch.arange(tokens)}
            made |= {"q": randn(1, 8, tokens, 128), "k": randn(1, 2, tokens, 128), "c": randn(1, tokens, 128)}
        return Call(getattr(liger, f"liger_{name}"), *(made[letter] for letter in takes))

    return call


recipe = Recipe("liger", [case(*one) for one in TAKES.items()])
