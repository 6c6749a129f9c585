"""CUDA graphs of the virtual device: what is captured runs as host code, and a replay does nothing.

Upstream: `torch/cuda/graphs.py` (`CUDAGraph`, `graph`, `graph_pool_handle`, `is_current_stream_capturing`), which takes the class
and the functions from its own names, and calls `torch._C._host_emptyCache`.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

Pool = tuple[int, int]
_pools = itertools.count(1)
_capturing: list[CUDAGraph] = []


def new_pool(*_: Any) -> Pool:
    """A handle that stands for a memory pool."""
    return (0, next(_pools))


class CUDAGraph:
    """Stands for a captured graph."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._pool: Pool | None = None

    def capture_begin(self, pool: Pool | None = None, *_: Any, **__: Any) -> None:
        self._pool = pool or new_pool()
        _capturing.append(self)

    def capture_end(self) -> None:
        _capturing.remove(self)

    def pool(self) -> Pool:
        return self._pool or new_pool()

    def replay(self) -> None: ...
    def instantiate(self) -> None: ...
    def reset(self) -> None: ...
    def enable_debug_mode(self) -> None: ...
    def debug_dump(self, path: str) -> None: ...
    def register_generator_state(self, generator: Any) -> None: ...
    def raw_cuda_graph(self) -> int:
        return 0

    def raw_cuda_graph_exec(self) -> int:
        return 0


def is_capturing() -> bool:
    """Whether host code runs inside a capture."""
    return bool(_capturing)


def pretend() -> None:
    """Give this process the graphs of one CUDA device. Not undone."""
    graphs: Any = torch.cuda.graphs
    cuda: Any = torch.cuda
    c: Any = torch._C
    c._host_emptyCache = lambda: None  # called before a capture; a CPU build has none
    for module in (graphs, cuda):
        module.CUDAGraph = CUDAGraph
        module.graph_pool_handle = new_pool
        module.is_current_stream_capturing = is_capturing
