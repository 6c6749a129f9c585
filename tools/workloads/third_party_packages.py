"""Whose functions the recipes of tests/third_party call."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "third_party"


@dataclass(frozen=True)
class Package:
    """What a recipe is about.

    Args:
        distribution: the package's name in an index.
        functions: what of it is called.
        note: what the recipe does not call, and whose reason that is.
        uncapturable: cases that no capture can have, with or without aot-cache, because the function reads from the GPU.
    """

    distribution: str
    functions: str
    note: str = ""
    uncapturable: tuple[str, ...] = ()


PACKAGES = {
    "vllm_attention": Package("vllm", "unified_attention"),
    "vllm_moe": Package("vllm", "fused_experts"),
    "sglang_attention": Package("sglang", "decode_attention_fwd"),
    "torchao_fp8": Package("torchao", "fp8_blockwise_act_quant, blockwise_fp8_gemm"),
    "torchao_intmm": Package(
        "torchao",
        "int_scaled_matmul_kernel",
        "theirs: int_scaled_matmul itself takes its times in the call, 960 configurations for each new shape; declared are 8",
    ),
    "xformers_rope": Package("xformers", "rope_padded"),
    "xformers_splitk": Package(
        "xformers",
        "triton_splitk.FwOp.apply",
        "theirs: memory_efficient_attention refuses where its C++ extension, built for torch 2.10, does not load",
    ),
    "bitsandbytes_4bit": Package(
        "bitsandbytes",
        "quantize_4bit, dequantize_4bit, gemv_4bit",
        "theirs: on CUDA its functions call C++; the Triton kernels are called by their own names",
    ),
    "gemlite_gemm": Package("gemlite", "A16W4_HQQ_INT (forward_functional)"),
    "liger": Package("liger-kernel", "ten of transformers.functional", uncapturable=("cross_entropy",)),
    "fla_delta": Package(
        "fla-core",
        "chunk_gated_delta_rule, l2norm, rms_norm, rms_norm_gated",
        "theirs: fused_recurrent_gated_delta_rule of 0.6.0 returns NaNs in eager, with Triton 3.6 on an H200",
    ),
}
