"""flash-linear-attention's gated delta rule in chunks, and the norms around it, forward only."""

import torch
from fla.modules.fused_norm_gate import rms_norm_gated
from fla.modules.l2norm import l2norm
from fla.modules.layernorm import rms_norm
from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from torch import bfloat16, rand, randn

from aot_cache import Call, Case, Range, Recipe, declare, device

TAKES = {l2norm: "q", rms_norm: "qwn", rms_norm_gated: "vzwn", chunk_gated_delta_rule: "qqvgb"}


def case(function: object, takes: str) -> Case:
    @declare(name=function.__name__, batch=Range(1, 16), tokens=Range(128, 128))
    def call(batch: int, tokens: int) -> Call:
        with torch.device(device()):
            made = {name: randn(batch, tokens, 4, 128, dtype=bfloat16) for name in "qvz"}
            made |= {"w": torch.ones(128), "n": None, "g": -rand(batch, tokens, 4)}
            made |= {"b": rand(batch, tokens, 4, dtype=bfloat16)}
        return Call(function, *(made[letter] for letter in takes))

    return call


recipe = Recipe("fla", [case(*one) for one in TAKES.items()])
