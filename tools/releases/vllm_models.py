"""Configurations of models of several families, without weights, for checks with a real vLLM. Sizes as published, but for layers.

Sources: the models' own config.json; fields that vLLM does not read are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_COMMON: dict[str, Any] = {"torch_dtype": "bfloat16", "tie_word_embeddings": False, "rms_norm_eps": 1e-6}
_LLAMA = {
    **_COMMON,
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
}
_MOE = {
    **_COMMON,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}
_GEMMA = {
    **_COMMON,
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "max_position_embeddings": 32768,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 512,
    "query_pre_attn_scalar": 256,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
}
_FALCON = {
    **_COMMON,
    "architectures": ["FalconH1ForCausalLM"],
    "model_type": "falcon_h1",
    "hidden_size": 1024,
    "intermediate_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 32784,
    "max_position_embeddings": 16384,
    "mamba_d_ssm": 1536,
    "mamba_n_heads": 24,
    "mamba_d_head": 64,
    "mamba_n_groups": 1,
    "mamba_d_state": 128,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_chunk_size": 128,
    "hidden_act": "silu",
    "rope_theta": 1e11,
}
_TINY = {"num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama tiny": {
        **_LLAMA,
        **_TINY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 32000,
    },
    "llama 8b": _LLAMA,
    "qwen3 moe 2 layers": {**_MOE, **_TINY},
    "qwen3 moe 30b-a3b": _MOE,
    "gemma3 6 layers": {**_GEMMA, "num_hidden_layers": 6},
    "gemma3 1b": _GEMMA,
    "falcon-h1 2 layers": {**_FALCON, **_TINY},
    "falcon-h1 0.5b": _FALCON,
}
"""Name → config.json. A Qwen3.5 with MTP is made by `tools/gpu/check_vllm_serving.write_model`."""


def write(name: str, folder: Path) -> Path:
    """The folder of a model, with nothing in it but its config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(MODELS[name], indent=1))
    return folder
