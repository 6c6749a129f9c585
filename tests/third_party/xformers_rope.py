"""xformers' rotary embedding, which puts new keys and values into a padded cache."""

import torch
from xformers.ops import rope_padded
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask as Mask

from aot_cache import Call, Range, Recipe, declare, device


@declare(batch=Range(1, 64))
def rope(batch: int) -> Call:
    with torch.device(device()):
        q = torch.randn(1, batch, 32, 128, dtype=torch.bfloat16)
        k, v = torch.randn(2, 1, batch, 8, 128, dtype=torch.bfloat16)
        caches = torch.zeros(2, 1, batch * 512, 8, 128, dtype=torch.bfloat16)
    mask = Mask.from_seqlens([1] * batch, 512, [200] * batch, device=torch.device(device()))
    return Call(rope_padded, q, k, v, *caches, mask)


recipe = Recipe("xformers-rope", [rope])
