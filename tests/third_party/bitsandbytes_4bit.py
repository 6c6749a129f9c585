"""bitsandbytes' Triton kernels for weights of 4 bits: quantize, dequantize, multiply by a vector."""

import torch
from bitsandbytes.backends.triton import ops as bnb
from bitsandbytes.functional import get_4bit_type

from aot_cache import Call, Recipe, Values, declare, device

ROWS = Values(512, 1024, 4096)


@declare(rows=ROWS)
def quantize(rows: int) -> Call:
    return Call(bnb.quantize_4bit, torch.randn(rows, 2048, device=device()), 64, "nf4", torch.uint8)


@declare(rows=ROWS)
def dequantize(rows: int) -> Call:
    packed = torch.randint(0, 256, (rows * 1024, 1), dtype=torch.uint8, device=device())
    scales = torch.ones(rows * 32, device=device())
    return Call(bnb.dequantize_4bit, packed, scales, 64, "nf4", (rows, 2048), torch.bfloat16)


@declare(rows=ROWS)
def gemv(rows: int) -> Call:
    packed = torch.randint(0, 256, (rows * 1024, 1), dtype=torch.uint8, device=device())
    x, scales = torch.randn(1, 2048, dtype=torch.bfloat16, device=device()), torch.ones(rows * 32, device=device())
    return Call(bnb.gemv_4bit, x, packed, (rows, 2048), scales, get_4bit_type("nf4", device=device()), 64)


recipe = Recipe("bitsandbytes-4bit", [quantize, dequantize, gemv])
