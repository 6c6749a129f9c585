"""TensorRT-LLM's warm-up: where each rank makes the batch of a CUDA graph, and what its ranks talk through.

Upstream, read in https://github.com/NVIDIA/TensorRT-LLM (`LAYOUTS` has the commits):

- `_create_cuda_graph_warmup_request(resource_manager, batch_size, draft_len, …)` is called for each shape, the largest first, in
  the same order on all ranks. It returns a batch, or None if this rank has no room; the caller then skips the shape, on this
  rank alone (https://github.com/NVIDIA/TensorRT-LLM/pull/14986). Main warms up all shapes before it captures one, so each shape
  comes twice there.
- `_release_batch_context(batch, resource_manager)` is a context manager that frees a batch when it ends.
- `warmup(resource_manager)` has all of this in it. It is called for the target and for a draft model.
- `dist` of the owner is None, or has `world_size` and `allgather` for any object, in the order of ranks
  (`tensorrt_llm/_torch/distributed/communicator.py`). It blocks until all ranks call it.
- `resource_manager.get_resource_manager(owner.kv_cache_manager_key).get_num_free_blocks()` is what decides whether there is room.
- The engine's logger has the name `TRT-LLM` (`tensorrt_llm/logger.py`), which `engines/tensorrt_llm.py` relies on.
- `tensorrt_llm` is imported before its modules, as any package.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aot_cache.upstream import patch

_MAKE, _RELEASE, _WARMUP = "_create_cuda_graph_warmup_request", "_release_batch_context", "warmup"
PARAMETERS = ("self", "resource_manager", "batch_size", "draft_len")
"""The first parameters of `_create_cuda_graph_warmup_request`, in each layout."""


@dataclass(frozen=True)
class Layout:
    """Where a generation of TensorRT-LLM has its warm-up.

    Args:
        module: its module; owner: the class in it.
        read_at: commits at which it was read.
    """

    module: str
    owner: str
    read_at: tuple[str, ...]


LAYOUTS = (
    Layout(
        "tensorrt_llm._torch.pyexecutor.model_engine",
        "PyTorchModelEngine",
        ("1a0dc5f70054f66d892df6a964996fc5ead6f81e",),
    ),
    Layout(
        "tensorrt_llm._torch.pyexecutor.engine.runners.decoder.runner",
        "DecoderRunner",
        ("0ea8c1debd2aae24c7fceaf5474f0c627114cc6a", "fcc4432bef2a729ae6de0d29fdd89b7d15c87794"),
    ),
)


@dataclass(frozen=True)
class Peers:
    """The ranks that run a model together, one of which is this process.

    Args:
        size: how many there are.
        allgather: takes an object; returns that of each rank, in their order. All ranks must call it.
    """

    size: int
    allgather: Callable[[Any], list[Any]]


@dataclass(frozen=True)
class Wanted:
    """A batch that this rank is asked to make.

    Args:
        shape: what is captured, for people; the same on all ranks.
        peers: the ranks that capture it together; None if this is the only one.
        make: returns the batch, or None if there is no room for it. release: frees one.
        free_blocks: how many blocks of the KV cache are free; None if that is not known.
    """

    shape: str
    peers: Peers | None
    make: Callable[[], Any]
    release: Callable[[Any], None]
    free_blocks: Callable[[], int | None]


def hook(layout: Layout, batch: Callable[[Wanted], Any], around: Callable[[Callable[[], None]], None]) -> bool:
    """Call `batch(wanted)` in place of making a batch, and `around(warmup)` in place of warming up. The module is imported.

    Returns whether it is hooked: not if this TensorRT-LLM has its warm-up elsewhere.

    Raises:
        AttributeError: it has its warm-up there, but not all that this module relies on; nothing is hooked then.
    """
    owner = getattr(importlib.import_module(layout.module), layout.owner, None)
    if owner is None or not hasattr(owner, _MAKE):
        return False
    getattr(owner, _RELEASE)  # raises if it is not there
    signature = inspect.signature(getattr(owner, _MAKE))
    if tuple(signature.parameters)[: len(PARAMETERS)] != PARAMETERS:
        raise AttributeError(f"{layout.owner}.{_MAKE} takes {', '.join(signature.parameters)}")

    def make(original: Any, *args: Any, **kwargs: Any) -> Any:
        asked = signature.bind(*args, **kwargs).arguments
        engine, resources = asked["self"], asked["resource_manager"]
        return batch(
            Wanted(
                shape=f"batch_size={asked['batch_size']}, draft_len={asked['draft_len']}",
                peers=_peers(engine),
                make=lambda: original(*args, **kwargs),
                release=lambda made: _release(engine, made, resources),
                free_blocks=lambda: _free_blocks(engine, resources),
            )
        )

    def warmup(original: Any, *args: Any, **kwargs: Any) -> None:
        around(lambda: original(*args, **kwargs))

    patch.replace_all(owner, {_MAKE: make, _WARMUP: warmup})
    return True


def _peers(engine: Any) -> Peers | None:
    dist = getattr(engine, "dist", None)
    if dist is None or dist.world_size <= 1:
        return None
    return Peers(dist.world_size, dist.allgather)


def _release(engine: Any, made: Any, resources: Any) -> None:
    with engine._release_batch_context(made, resources):
        pass


def _free_blocks(engine: Any, resources: Any) -> int | None:
    try:
        return int(resources.get_resource_manager(engine.kv_cache_manager_key).get_num_free_blocks())
    except Exception:  # it is only shown to people, and the other ranks wait for this one
        return None
