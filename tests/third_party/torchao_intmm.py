"""torchao's integer matrix product with scales, launched with configurations that its own tuner chooses from."""

import torch
from torchao.kernel import intmm_triton

from aot_cache import Call, Range, Recipe, Values, declare, device

CHOICES = [c for c in intmm_triton.int8_mm_kernel_configs if c.kwargs["BLOCK_M"] == 32 and c.num_stages == 3]


@declare(tokens=Range(1, 64), choice=Values(*range(8)))
def intmm(tokens: int, choice: int) -> Call:
    with torch.device(device()):
        x = torch.randint(-8, 8, (tokens, 4096), dtype=torch.int8)
        weight = torch.randint(-8, 8, (4096, 1024), dtype=torch.int8)
        scales, out = torch.ones(tokens, 1, dtype=torch.bfloat16), torch.empty(tokens, 1024, dtype=torch.bfloat16)
    scales = scales.expand(tokens, 1024)
    return Call(intmm_triton.int_scaled_matmul_kernel, x, weight, scales, out, CHOICES[choice])


recipe = Recipe("torchao-intmm", [intmm])
