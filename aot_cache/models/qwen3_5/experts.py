"""The experts of a mixture: every token times the weights of the experts that it is sent to, as one graph.

Two operators that Dynamo does not look into, and what stands between them, which Inductor fuses. What each expert gets is data:
no shape depends on it and the host never asks for it, so a captured graph stays right whatever tokens come.

Not torch's `grouped_mm`, by which transformers does it: it is such a kernel for bfloat16 on sm_90 and sm_100 alone (torch 2.10).
For all else it asks the device how many rows each expert has, which a capture forbids. Here it is one Triton kernel for all
targets and types, compiled when the bundle is built and never tuned; on a CPU a plain loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from aot_cache.models.qwen3_5.experts_kernel import launch

EXPERTS = "aot_cache_grouped"


@torch.library.custom_op("aot_qwen3_5::order", mutates_args=())
def order(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs of a token and an expert, sorted by expert.

    torch's own kernels do it: Inductor's sort of few and many tokens would be of two kinds, and of a size it measures.

    Args:
        chosen: [tokens, experts of each], numbers of experts.
        experts: how many there are.

    Returns:
        Places of the pairs in `chosen`, flattened, [pairs]; and where in them each expert's end, [experts] int32.
    """
    numbers, pairs = chosen.flatten().sort()
    every = torch.arange(experts, device=chosen.device)
    return pairs, torch.searchsorted(numbers, every, right=True, out_int32=True)


@order.register_fake
def _(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return chosen.new_empty(chosen.numel()), chosen.new_empty(experts, dtype=torch.int32)


@torch.library.custom_op("aot_qwen3_5::grouped", mutates_args=())
def grouped(x: Tensor, weight: Tensor, pairs: Tensor, ends: Tensor) -> Tensor:
    """Each pair's row times the weight of its expert.

    Args:
        x: [rows, width]: a row for each pair, or one for all pairs of a token.
        weight: [experts, columns, width].
        pairs, ends: as `order` gives them.

    Returns:
        [pairs, columns], in the order of `chosen`.
    """
    if x.device.type != "cpu":
        return launch(x, weight, pairs, ends)
    out, start = x.new_empty(len(pairs), weight.shape[1]), 0
    for own, end in zip(weight, ends.tolist(), strict=True):
        some = pairs[start:end]
        out[some] = x[some // (len(pairs) // len(x))] @ own.T
        start = end
    return out


@grouped.register_fake
def _(x: Tensor, weight: Tensor, pairs: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(pairs.shape[0], weight.shape[1])


def forward(module: nn.Module, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The experts of a layer, as transformers calls them.

    Args:
        module: with `gate_up_proj` [experts, 2 widths, hidden] and `down_proj` [experts, hidden, width].
        x: [tokens, hidden].
        chosen, weights: [tokens, experts of each].

    Returns:
        [tokens, hidden].
    """
    gate_up, down = module.get_parameter("gate_up_proj"), module.get_parameter("down_proj")
    pairs, ends = order(chosen, gate_up.shape[0])
    gate, up = grouped(x, gate_up, pairs, ends).chunk(2, dim=-1)
    out = grouped(nn.functional.silu(gate) * up, down, pairs, ends)
    summed: Tensor = (out.view(*chosen.shape, x.shape[-1]) * weights[..., None]).sum(1)
    return summed


ExpertsInterface.register(EXPERTS, forward)
