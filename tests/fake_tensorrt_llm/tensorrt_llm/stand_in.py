"""What the stand-in's engines share: a KV cache with so many blocks, batches, and ranks that talk in two ways."""

from __future__ import annotations

import datetime
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

MEETING = datetime.timedelta(seconds=120)
"""How long ranks wait for each other to start."""


class OverTorch:
    """Ranks of torch.distributed, as when Ray or torchrun starts them. A collective of the model waits for `seconds`."""

    def __init__(self, seconds: float) -> None:
        dist.init_process_group("gloo", timeout=MEETING)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        dist.barrier()  # all are there, and may be impatient from now on
        self._group = dist.new_group(timeout=datetime.timedelta(seconds=seconds))

    def allgather(self, obj: Any) -> list[Any]:
        out: list[Any] = [None] * self.world_size
        dist.all_gather_object(out, obj)
        return out

    def allreduce(self, tensor: torch.Tensor) -> None:
        dist.all_reduce(tensor, group=self._group)


class OverAnother:
    """Ranks that torch.distributed knows nothing of, as under MPI: a store and a group of our own."""

    def __init__(self, port: int, seconds: float) -> None:
        self.rank, self.world_size, self._count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), 0
        limit = datetime.timedelta(seconds=seconds)
        self._store = dist.TCPStore("127.0.0.1", port, self.world_size, self.rank == 0, timeout=MEETING)
        self.allgather("here")
        inner = dist.PrefixStore("group", self._store)
        self._group: Any = dist.ProcessGroupGloo(inner, self.rank, self.world_size, limit)

    def allgather(self, obj: Any) -> list[Any]:
        self._count += 1
        self._store.set(f"{self._count}/{self.rank}", pickle.dumps(obj))
        return [pickle.loads(self._store.get(f"{self._count}/{rank}")) for rank in range(self.world_size)]

    def allreduce(self, tensor: torch.Tensor) -> None:
        self._group.allreduce([tensor]).wait()


@dataclass
class Cache:
    """A KV cache: a block for each request."""

    free: int

    def get_num_free_blocks(self) -> int:
        return self.free


@dataclass
class Resources:
    """What an engine is given in each call."""

    cache: Cache

    def get_resource_manager(self, key: str) -> Cache:
        assert key == "kv cache"
        return self.cache


@dataclass
class Batch:
    """Dummy requests."""

    size: int
    draft_len: int


class Engine:
    """What both layouts have."""

    kv_cache_manager_key = "kv cache"

    def __init__(
        self, dist: Any, sizes: tuple[int, ...], draft_lens: tuple[int, ...] = (0,), fails_at: int = 0
    ) -> None:
        self.dist, self.sizes, self.draft_lens, self.fails_at = dist, sizes, draft_lens, fails_at
        self.ran: list[tuple[int, int]] = []

    def forward(self, batch: Batch) -> None:
        """A step with a collective in it."""
        self.ran.append((batch.size, batch.draft_len))
        if self.dist is not None:
            self.dist.allreduce(torch.ones(batch.size * (1 + batch.draft_len)))

    def _create_cuda_graph_warmup_request(
        self, resource_manager: Resources, batch_size: int, draft_len: int, max_seq_len: int | None = None
    ) -> Batch | None:
        if batch_size == self.fails_at:
            raise RuntimeError("Can't allocate new blocks for window size 4096")
        if resource_manager.cache.free < batch_size:
            return None
        resource_manager.cache.free -= batch_size
        return Batch(batch_size, draft_len)

    @contextmanager
    def _release_batch_context(self, batch: Batch | None, resource_manager: Resources) -> Iterator[Batch | None]:
        try:
            yield batch
        finally:
            if batch is not None:
                resource_manager.cache.free += batch.size

    def _capture_generation_cuda_graphs(self, resource_manager: Resources) -> None:
        for size in sorted(self.sizes, reverse=True):
            for draft_len in sorted(self.draft_lens, reverse=True):
                made = self._create_cuda_graph_warmup_request(resource_manager, size, draft_len, 4096)
                with self._release_batch_context(made, resource_manager) as batch:
                    if batch is None:
                        continue
                    self.forward(batch)
