"""The experts of Qwen3.5 on the virtual device: one kernel for any number of tokens, small enough for every target."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aot_cache import Call, Case, Range, Recipe
from aot_cache.artifact import target as targets
from aot_cache.artifact.plan import Plan
from aot_cache.builder import kernels_trace as tracing
from aot_cache.models.qwen3_5 import experts
from aot_cache.recipes import dimensions
from aot_cache.upstream.codec import triton_jit
from aot_cache.upstream.virtual import triton_compile

MOST = 40


def smallest(backend: str) -> targets.Target:
    """The target whose blocks have the least shared memory."""
    known = [one for one in targets.TARGETS.values() if one.backend == backend]
    return min(known, key=lambda one: one.shared_memory_per_block_optin)


def traced(dtype: torch.dtype) -> Plan:
    """Of the experts of the 35B-A3B, for 1 … `MOST` tokens."""

    def forward(tokens: int) -> Call:
        module = nn.Module()
        for name, shape in {"gate_up_proj": (256, 1024, 2048), "down_proj": (256, 2048, 512)}.items():
            module.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype, device="cuda"), False))
        x = torch.empty(tokens, 2048, dtype=dtype, device="cuda")
        chosen = torch.empty(tokens, 8, dtype=torch.int64, device="cuda")
        return Call(experts.forward, module, x, chosen, chosen.to(dtype))

    recipe = Recipe("experts", [Case("forward", forward, {"tokens": Range(1, MOST)}, "no_grad")])
    return tracing.trace(recipe, "h200", lambda *_: None, workers=1).plan


def test_no_number_of_tokens_is_in_a_key() -> None:
    plan = traced(torch.bfloat16)
    assert [unit.kernel for unit in plan.units] == ["aot_cache.models.qwen3_5.experts_kernel:grouped_gemm_kernel"] * 2
    for unit in plan.units:
        assert [point["tokens"] for point in dimensions.expand(unit.reached["forward"])] == [*range(1, MOST + 1)]
    assert not plan.tunings


@pytest.mark.parametrize("backend", ["cuda", "hip"])
def test_its_tiles_fit(backend: str) -> None:
    """In the widest type, which takes the most shared memory."""
    unit, target = traced(torch.float32).units[0], smallest(backend)
    function = triton_jit.unwrap(triton_jit.find(unit.kernel))
    pairs = [triton_jit.decode_pair(pair) for pair in unit.specialization]
    options = {name: triton_jit.decode(value) for name, value in unit.options.items()}
    made = triton_compile.compile_specialization(function, pairs, options, target)
    assert 0 < made.metadata["shared"] <= target.shared_memory_per_block_optin
