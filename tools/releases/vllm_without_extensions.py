"""Imported before vLLM where its compiled extensions cannot be loaded: empty modules take their place. No GPU is needed then."""

import sys
import types

_EXTENSIONS = ("_C", "_moe_C", "_C_stable_libtorch", "_moe_C_stable_libtorch")
_ATTENTION = ("_vllm_fa2_C", "_vllm_fa3_C")

names = [f"vllm.{name}" for name in _EXTENSIONS] + [f"vllm.vllm_flash_attn.{name}" for name in _ATTENTION]
sys.modules.update((name, types.ModuleType(name)) for name in names)
