"""Kernels for `recorded_program.py`. Importing this makes the process an H200 that runs nothing."""

# ruff: noqa: E402  # the process must be the target before Triton is used

from aot_cache.artifact import target
from aot_cache.builder import virtual_gpu

virtual_gpu.become(target.get("h200"))

import torch
import triton
import triton.language as tl

from aot_cache.runtime import record

record._target_id = lambda: "h200"  # no CUDA is up here

POINTER = torch.float32
with virtual_gpu.tensors():
    TENSOR = torch.empty(64, device="cuda")


@triton.jit
def scale(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = x + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) * 2)


@triton.autotune([triton.Config({"BLOCK": block}) for block in (64, 128, 256)], key=[])
@triton.jit
def tuned(x, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = x + tl.arange(0, BLOCK)
    tl.store(at, tl.load(at) * 3)


tuned.cache[(str(torch.float32),)] = tuned.configs[1]  # chosen before: only that one is launched
