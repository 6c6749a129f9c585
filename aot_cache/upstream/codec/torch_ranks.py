"""The ranks of a job, and the store of its rendezvous. Does not import torch unless the process already has.

Upstream: `torch/distributed/distributed_c10d.py` (`_get_default_store`), `torch/csrc/distributed/c10d/Store.hpp`
(`multi_get`, `check`).
"""

from __future__ import annotations

import sys
from typing import Any


def up() -> bool:
    """Whether this process belongs to a job of several ranks."""
    torch = sys.modules.get("torch")
    if torch is None or "torch.distributed" not in sys.modules:
        return False
    return bool(torch.distributed.is_available() and torch.distributed.is_initialized())


def ranks_of(group: Any) -> tuple[int, ...]:
    """The global ranks of a process group, in its order; None is the whole job."""
    import torch.distributed as dist

    return tuple(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))


def own_rank() -> int:
    import torch.distributed as dist

    return int(dist.get_rank())


def own_or_first() -> int:
    """This process's rank in its job; 0 outside of a job."""
    return own_rank() if up() else 0


def one_of_several() -> int | None:
    """This process's rank in a job of several; None elsewhere."""
    return own_rank() if up() and len(ranks_of(None)) > 1 else None


def store() -> Any:
    """The store of the job that this process belongs to now."""
    from torch.distributed import distributed_c10d

    found: Any = distributed_c10d._get_default_store()
    return found


class Board:
    """The job's store, as a board where ranks leave texts for each other.

    Its server is a C++ thread in the launcher or in rank 0, so a rank that computes or hangs does not block it.
    """

    def __init__(self) -> None:
        # The existing connection is used: making a new one would wait for minutes if the store is gone. All requests here
        # are answered at once, so they do not delay other users of the connection.
        self._store = self.of = store()

    def put(self, key: str, text: str) -> None:
        """Write a text. Raises RuntimeError if the store is gone."""
        self._store.set(key, text)

    def has(self, *keys: str) -> bool:
        """Whether each key has a text. Raises RuntimeError if the store is gone."""
        return bool(self._store.check(list(keys)))

    def get(self, keys: list[str]) -> list[str]:
        """The texts of existing keys. Waiting for a missing key would make upstream print warnings, so ask `has` first.

        Raises:
            RuntimeError: the store is gone.
        """
        return [text.decode() for text in self._store.multi_get(keys)]

    def remove(self, key: str) -> None:
        """Remove a text of this rank."""
        self._store.delete_key(key)
