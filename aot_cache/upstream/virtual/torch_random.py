"""Random generators of the virtual device: CPU generators in disguise, whose numbers are never seen.

Upstream: `torch/_C` (`Generator`, which can be subclassed), `torch/cuda/random.py` (`torch.cuda.default_generators`),
`aten/src/ATen/cuda/CUDAGeneratorImpl.cpp` (the state is 16 bytes in host memory: a seed and an offset, which libraries read).
"""

from __future__ import annotations

from typing import Any

import torch

from aot_cache.upstream.virtual import this_gpu

_PLAIN: Any = torch.Generator


class Generator(_PLAIN):  # type: ignore[misc]  # torch's class is untyped
    """A generator that claims to be on CUDA."""

    def __new__(cls, device: Any = "cpu") -> Any:
        place = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if place.type != "cuda":
            return _PLAIN(place)
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self._offset = 0

    def get_state(self) -> torch.Tensor:
        return torch.tensor([self.initial_seed(), self._offset], dtype=torch.int64).view(torch.uint8)

    def set_state(self, new_state: torch.Tensor) -> Any:
        seed, offset = new_state.view(torch.int64).tolist()
        self.manual_seed(seed)
        self._offset = offset
        return self

    def get_offset(self) -> int:
        return self._offset

    def set_offset(self, offset: int) -> None:
        self._offset = offset

    @property
    def device(self) -> torch.device:
        return this_gpu.device()


def pretend() -> None:
    """Give this process the generators of its CUDA devices. Not undone."""
    module: Any = torch
    module.Generator = Generator
    cuda: Any = torch.cuda
    cuda.default_generators = tuple(Generator("cuda") for _ in range(this_gpu.count()))
