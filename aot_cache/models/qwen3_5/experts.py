"""The experts of an MoE layer as one graph: every token times the weights of the experts that it is routed to.

Two custom operators, which Dynamo does not trace into, and pointwise code between them, which Inductor fuses. The routing is
data: no shape depends on it and the host never reads it, so a captured graph is right for all tokens.

transformers uses torch's `grouped_mm`, which is one such kernel only for bfloat16 on sm_90 and sm_100 (torch 2.10). Otherwise
it reads the number of rows of each expert from the device, which a capture forbids. Here it is one Triton kernel for all targets
and dtypes, compiled when the bundle is built and never tuned; on a CPU a plain loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from aot_cache.models.qwen3_5.experts_kernel import launch

EXPERTS = "aot_cache_grouped"


@torch.library.custom_op("aot_qwen3_5::order", mutates_args=())
def order(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Sort the (token, expert) pairs by expert.

    torch's own kernels do it, because Inductor would use two kinds of sort for few and many tokens, with a size that it measures.

    Args:
        chosen: [tokens, experts per token], expert indices.
        experts: number of experts.

    Returns:
        Indices of the sorted pairs in the flattened `chosen`, [pairs]; and the end of each expert's pairs there, [experts] int32.
    """
    numbers, pairs = chosen.flatten().sort()
    every = torch.arange(experts, device=chosen.device)
    return pairs, torch.searchsorted(numbers, every, right=True, out_int32=True)


@order.register_fake
def _(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    return chosen.new_empty(chosen.numel()), chosen.new_empty(experts, dtype=torch.int32)


@torch.library.custom_op("aot_qwen3_5::grouped", mutates_args=())
def grouped(x: Tensor, weight: Tensor, pairs: Tensor, ends: Tensor) -> Tensor:
    """Multiply each pair's row by the weight of its expert.

    Args:
        x: [rows, width]: one row per pair, or one per token for all its pairs.
        weight: [experts, columns, width].
        pairs, ends: the results of `order`.

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
    """The experts of a layer, with the signature by which transformers calls them.

    Args:
        module: has `gate_up_proj` [experts, 2 * width, hidden] and `down_proj` [experts, hidden, width].
        x: [tokens, hidden].
        chosen, weights: [tokens, experts per token].

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
