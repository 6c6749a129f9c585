"""vLLM's attention over a paged cache, as its Triton backend calls it to decode."""

import torch
from vllm.v1.attention.ops.triton_unified_attention import unified_attention

from aot_cache import Call, Range, Recipe, declare, device


@declare(batch=Range(1, 64))
def decode(batch: int) -> Call:
    with torch.device(device()):
        q, out = torch.randn(2, batch, 32, 128, dtype=torch.bfloat16)
        k, v = torch.randn(2, 1024, 16, 8, 128, dtype=torch.bfloat16)
        lengths = torch.full((batch,), 200, dtype=torch.int32)
        starts = torch.arange(batch + 1, dtype=torch.int32)
        pages = torch.arange(batch * 16, dtype=torch.int32).reshape(batch, 16)
        scale = torch.ones(1)
    more = {"causal": True, "window_size": (-1, -1), "block_table": pages, "softcap": 0}
    scales = {"softmax_scale": 128**-0.5, "q_descale": None, "k_descale": scale, "v_descale": scale}
    return Call(unified_attention, q, k, v, out, starts, 1, lengths, 200, **scales, **more)


recipe = Recipe("vllm-attention", [decode])
