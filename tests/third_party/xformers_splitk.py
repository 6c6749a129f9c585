"""xformers' split-K attention over a padded cache, to decode: its operator, which needs no C++ extension."""

import torch
from xformers.ops.fmha import Inputs, triton_splitk
from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask as Mask

from aot_cache import Call, Range, Recipe, declare, device


@declare(batch=Range(1, 64))
def splitk(batch: int) -> Call:
    q = torch.randn(1, batch, 8, 128, dtype=torch.bfloat16, device=device())
    k, v = torch.randn(2, 1, batch * 512, 8, 128, dtype=torch.bfloat16, device=device())
    mask = Mask.from_seqlens([1] * batch, 512, [200] * batch, device=torch.device(device()))
    return Call(triton_splitk.FwOp.apply, Inputs(q, k, v, mask), needs_gradient=False)


recipe = Recipe("xformers-splitk", [splitk])
