"""A fake process group: lets host code use `torch.distributed` with several ranks in a single process while it is traced.

Upstream: `torch/testing/_internal/distributed/fake_pg.py` (backend `fake`: collectives return at once).
"""

from __future__ import annotations

from typing import Any


def join(rank: int, size: int) -> None:
    """Join a fake process group as rank `rank` of world size `size`. Not undone."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)


def only_fake(rank: int, size: int) -> None:
    """Join a fake process group, and make every further group of this process a fake one, whatever backend is asked for.

    Objects of other ranks are equal to this one's. torch's own functions would read their sizes from memory that nobody wrote to.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    join(rank, size)
    module: Any = distributed_c10d
    new_group = module.new_group

    def fake(ranks: Any = None, timeout: Any = None, backend: Any = None, pg_options: Any = None, **more: Any) -> Any:
        return new_group(ranks, backend="fake", **{**more, "device_id": None})

    def all_gather_object(object_list: list[Any], obj: Any, *_: Any, **__: Any) -> None:
        object_list[:] = [obj] * len(object_list)

    def broadcast_object_list(object_list: list[Any], *_: Any, **__: Any) -> None:
        pass

    def monitored_barrier(*_: Any, **__: Any) -> None:
        pass  # torch's own takes gloo only

    public: Any = dist
    for owner in (public, module):
        owner.new_group, owner.monitored_barrier = fake, monitored_barrier
        owner.all_gather_object, owner.broadcast_object_list = all_gather_object, broadcast_object_list
