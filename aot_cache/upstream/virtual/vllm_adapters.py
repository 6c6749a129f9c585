"""LoRA adapters in vLLM's engine, without their weights, and which tokens of a step have one.

vLLM launches its kernels for adapters only in steps where a token has one, and reads that from a tensor on the GPU. Here the
values of such a tensor are not known, but vLLM has made it from a list.

Upstream, all in vLLM: `vllm/lora/punica_wrapper/punica_gpu.py` (`PunicaWrapperGPU.update_metadata`),
`vllm/lora/punica_wrapper/utils.py` (`convert_mapping`), `vllm/lora/ops/triton_ops/lora_kernel_metadata.py`
(`LoRAKernelMeta.prepare_tensors`), `vllm/lora/worker_manager.py` (`add_dummy_lora`, which vLLM's own warm-up calls),
`vllm/lora/request.py`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from typing import Any

import torch

_RANK = 8
"""Of the adapters, as in vLLM's warm-up. Kernels see the largest rank that the server takes."""
PUNICA = "vllm.lora.punica_wrapper.punica_gpu"


def know_which_tokens_have_one() -> None:
    """Give vLLM's kernel metadata the adapters of the tokens as tensors with values. To be called before the engine is made."""
    wrapper: Any = importlib.import_module(PUNICA).PunicaWrapperGPU

    def update_metadata(
        self: Any, mapping: Any, lora_index_to_id: Any, max_loras: int, vocab_size: int, **_: Any
    ) -> None:
        def places(adapters: Iterable[int]) -> torch.Tensor:  # as `convert_mapping` finds them
            return torch.tensor([lora_index_to_id.index(one) if one > 0 else -1 for one in adapters], dtype=torch.long)

        self.is_prefill = mapping.is_prefill
        self._update_base_metadata(mapping, lora_index_to_id, max_loras, vocab_size)
        self.token_mapping_meta.prepare_tensors(places(mapping.index_mapping))
        self.prompt_mapping_meta.prepare_tensors(places(mapping.prompt_mapping))

    wrapper.update_metadata = update_metadata


def add(engine: Any, number: int) -> list[Any]:
    """Add adapters 1 … `number` to a started engine, and return what requests for them need."""
    if not number:  # then the engine has no manager of adapters
        return []
    request = importlib.import_module("vllm.lora.request").LoRARequest
    made = [request(f"adapter-{n}", n, "/not/a/real/path") for n in range(1, number + 1)]
    manager = engine.model_executor.driver_worker.worker.model_runner.lora_manager
    for one in made:
        manager.add_dummy_lora(
            one, rank=manager.get_dummy_lora_warmup_rank(min(_RANK, manager.lora_config.max_lora_rank))
        )
    return made
