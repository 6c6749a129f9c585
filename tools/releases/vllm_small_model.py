"""A model that vLLM compiles with its own backend, small enough for a CPU. For `vllm_compile_cache_here.py`."""

import torch
from vllm.compilation.decorators import support_torch_compile

SPLITS = "small_model::mix"
"""vLLM cuts the graph here, as it does at attention. The layers between are equal, and vLLM keeps equal ones once."""


@torch.library.custom_op(SPLITS, mutates_args=())
def mix(x: torch.Tensor) -> torch.Tensor:
    return x.flip(-1)


@mix.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@support_torch_compile(dynamic_arg_dims={"x": 0})
class SmallModel(torch.nn.Module):
    def __init__(self, *, vllm_config, prefix="", **_):  # type: ignore[no-untyped-def]
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.linspace(-n, n, 64).reshape(8, 8) / 8 for n in (1, 2, 3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = mix(torch.relu(x @ weight) * 2 + x)
        return x


def eager(model: SmallModel, x: torch.Tensor) -> torch.Tensor:
    """The same, without vLLM."""
    for weight in model.weights:
        x = (torch.relu(x @ weight) * 2 + x).flip(-1)
    return x
