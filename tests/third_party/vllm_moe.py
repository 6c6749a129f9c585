"""vLLM's mixture of experts by its Triton kernel: sort pairs of token and expert, multiply, activate, multiply, sum."""

import torch
from vllm.model_executor.layers.fused_moe import fused_experts

from aot_cache import Call, Range, Recipe, declare, device


@declare(tokens=Range(1, 64))
def moe(tokens: int) -> Call:
    with torch.device(device()):
        x = torch.randn(tokens, 2048, dtype=torch.bfloat16)
        up = torch.randn(64, 1536, 2048, dtype=torch.bfloat16)
        down = torch.randn(64, 2048, 768, dtype=torch.bfloat16)
        experts = torch.arange(tokens * 8, dtype=torch.int32).reshape(tokens, 8) % 64
        weights = torch.full((tokens, 8), 0.125)
    return Call(fused_experts, x, up, down, weights, experts)


recipe = Recipe("vllm-moe", [moe])
