"""Shape rules for vLLM's operators in CUDA that have none, because vLLM never traces them.

Upstream, all in vLLM: `csrc/torch_bindings.cpp` (`weak_ref_tensor`, `get_cuda_view_from_cpu_tensor`),
`vllm/vllm_flash_attn/flash_attn_interface.py` (what FlashAttention 2 and 3 return).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch

from aot_cache.upstream.virtual import flash_attention, operator_rules, torch_fake

_MODULES = ("vllm._custom_ops", "vllm.vllm_flash_attn")
"""Importing them loads vLLM's extensions, of which those that are for other devices may be missing."""


def register() -> None:
    """Register the rules of operators that are here and have none.

    vLLM registers rules of its own when it is imported, so that comes first.
    """
    for module in _MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    operator_rules.add(_RULES)
    for name in _VIEWS_OF_HOST:
        found = operator_rules.operator(name)
        if found is not None:
            torch_fake.VIEWS_OF_HOST.add(found)


def _grouped_topk(scores: Any, n_group: int, topk_group: int, topk: int, *_: Any) -> tuple[Any, Any]:
    shape = (scores.shape[0], topk)
    return scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.int32)


_RULES: dict[str, Callable[..., Any]] = {
    "_vllm_fa2_C::varlen_fwd": flash_attention.forward_2,
    "_vllm_fa3_C::fwd": flash_attention.forward_3,
    "_vllm_fa3_C::get_scheduler_metadata": flash_attention.metadata_3,
    "_C::weak_ref_tensor": operator_rules.same,
    "_moe_C::grouped_topk": _grouped_topk,
}
_VIEWS_OF_HOST = ("_C::get_cuda_view_from_cpu_tensor",)
