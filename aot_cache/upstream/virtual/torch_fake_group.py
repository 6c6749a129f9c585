"""A job of several ranks in a process that is alone: what host code asks of `torch.distributed` while it is traced.

Upstream: `torch/testing/_internal/distributed/fake_pg.py` (backend `fake`: collectives return at once).
"""

from __future__ import annotations


def join(rank: int, size: int) -> None:
    """Make this process rank `rank` of `size`; for good."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
