"""torchao's blockwise fp8: quantize activations, multiply by weights that are in blocks of 128 × 128."""

import torch
from torchao.kernel.blockwise_quantization import blockwise_fp8_gemm, fp8_blockwise_act_quant

from aot_cache import Call, Range, Recipe, declare, device


def linear(x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return blockwise_fp8_gemm(*fp8_blockwise_act_quant(x), weight, scales)


@declare(tokens=Range(1, 64))
def fp8(tokens: int) -> Call:
    x = torch.randn(tokens, 2048, dtype=torch.bfloat16, device=device())
    weight = torch.randn(1024, 2048, device=device()).to(torch.float8_e4m3fn)
    return Call(linear, x, weight, torch.ones(8, 16, device=device()))


recipe = Recipe("torchao-fp8", [fp8])
