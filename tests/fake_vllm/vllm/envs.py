import os
from typing import Any


def compile_factors() -> dict[str, Any]:
    names = ("VLLM_CONFIG_ROOT", "VLLM_USE_TRITON_AWQ")
    return {name: os.environ.get(name) for name in names} | {"VLLM_API_KEY": "hunter2"}


def cache_root() -> str:
    return os.environ["VLLM_CACHE_ROOT"]
