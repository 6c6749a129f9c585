"""SGLang's attention to decode, over a cache that is indexed token by token."""

import torch
from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

from aot_cache import Call, Range, Recipe, declare, device


@declare(batch=Range(1, 64))
def decode(batch: int) -> Call:
    with torch.device(device()):
        q, out = torch.randn(2, batch, 32, 128, dtype=torch.bfloat16)
        k, v = torch.randn(2, 16384, 8, 128, dtype=torch.bfloat16)
        starts = torch.arange(batch + 1, dtype=torch.int32) * 200
        slots = torch.arange(batch * 200)
        parts, sums = torch.empty(batch, 32, 8, 128), torch.empty(batch, 32, 8)
        splits = torch.full((batch,), 4, dtype=torch.int32)
    return Call(decode_attention_fwd, q, k, v, out, starts, slots, parts, sums, splits, 8, 128**-0.5, 1.0, 1.0)


recipe = Recipe("sglang-attention", [decode])
