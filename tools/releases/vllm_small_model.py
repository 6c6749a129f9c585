"""A model that vLLM compiles with its own backend, small enough for a CPU. For `vllm_compile_cache_here.py`."""

import torch
from vllm.compilation.decorators import support_torch_compile


@support_torch_compile(dynamic_arg_dims={"x": 0})
class SmallModel(torch.nn.Module):
    def __init__(self, *, vllm_config, prefix="", **_):  # type: ignore[no-untyped-def]
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 64).reshape(8, 8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x @ self.weight) * 2 + x
