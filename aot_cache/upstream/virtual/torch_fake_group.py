"""A fake process group: lets host code use `torch.distributed` with several ranks in a single process while it is traced.

Upstream: `torch/testing/_internal/distributed/fake_pg.py` (backend `fake`: collectives return at once).
"""

from __future__ import annotations


def join(rank: int, size: int) -> None:
    """Join a fake process group as rank `rank` of world size `size`. Not undone."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
