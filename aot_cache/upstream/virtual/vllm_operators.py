"""Shape rules for vLLM's operators in CUDA that have none, because vLLM never traces them.

Upstream, all in vLLM: `csrc/torch_bindings.cpp` (`weak_ref_tensor`, `get_cuda_view_from_cpu_tensor`),
`vllm/vllm_flash_attn/flash_attn_interface.py` (what FlashAttention 2 and 3 return). FlashAttention's scheduler metadata are 32
bit integers, four vectors over the requests, rounded up to four, and one number (`hopper/flash_api.cpp`).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import torch

from aot_cache.upstream.virtual import torch_fake

_MODULES = ("vllm._custom_ops", "vllm.vllm_flash_attn")
"""Importing them loads vLLM's extensions, of which those that are for other devices may be missing."""


def register() -> None:
    """Register the rules of operators that are here and have none.

    vLLM registers rules of its own when it is imported, so that comes first.
    """
    for module in _MODULES:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    for name, rule in _RULES.items():
        if _is_here(name) and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
            torch.library.register_fake(name, rule)
    for name in _VIEWS_OF_HOST:
        if _is_here(name):
            torch_fake.VIEWS_OF_HOST.add(_operator(name))


def _is_here(name: str) -> bool:
    with contextlib.suppress(AttributeError, RuntimeError):
        return _operator(name) is not None
    return False


def _operator(name: str) -> Any:
    space, _, own = name.partition("::")
    return getattr(getattr(torch.ops, space), own).default


def _attention(out: torch.Tensor | None, q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(the output, the logarithms of its sums: [heads, tokens] for q of [tokens, heads, width])"""
    made = torch.empty_like(q) if out is None else out
    return made, q.new_empty(q.shape[-2], q.shape[0], dtype=torch.float32)


def _flash_2(q: Any, k: Any, v: Any, out: Any = None, *_: Any, **__: Any) -> list[torch.Tensor]:
    return list(_attention(out, q))


def _flash_3(
    q: Any, k: Any, v: Any, k_new: Any = None, v_new: Any = None, q_v: Any = None, out: Any = None, *_: Any, **__: Any
) -> list[torch.Tensor]:
    return [*_attention(out, q), q.new_empty(0), q.new_empty(0)]


_FIXED = 8
"""Where `seqused_k` stands among the arguments of `get_scheduler_metadata`."""


def _flash_3_metadata(batch_size: int, *given: Any, seqused_k: Any = None, **_: Any) -> torch.Tensor:
    lengths = seqused_k if seqused_k is not None else given[_FIXED - 1]
    rounded = -(-batch_size // 4) * 4
    made: torch.Tensor = lengths.new_empty(1 + 4 * rounded, dtype=torch.int32)
    return made


def _same(tensor: Any) -> torch.Tensor:
    seen: torch.Tensor = tensor.new_empty_strided(tensor.shape, tensor.stride())
    return seen


def _grouped_topk(scores: Any, n_group: int, topk_group: int, topk: int, *_: Any) -> tuple[Any, Any]:
    shape = (scores.shape[0], topk)
    return scores.new_empty(shape, dtype=torch.float32), scores.new_empty(shape, dtype=torch.int32)


_RULES: dict[str, Callable[..., Any]] = {
    "_vllm_fa2_C::varlen_fwd": _flash_2,
    "_vllm_fa3_C::fwd": _flash_3,
    "_vllm_fa3_C::get_scheduler_metadata": _flash_3_metadata,
    "_C::weak_ref_tensor": _same,
    "_moe_C::grouped_topk": _grouped_topk,
}
_VIEWS_OF_HOST = ("_C::get_cuda_view_from_cpu_tensor",)
