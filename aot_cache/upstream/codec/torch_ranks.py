"""The ranks of a job, and the store in which they found each other. Imports no torch that the process has not.

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
    """The job's ranks that a process group has, in its order; None is all of them."""
    import torch.distributed as dist

    return tuple(dist.get_process_group_ranks(dist.group.WORLD if group is None else group))


def own_rank() -> int:
    import torch.distributed as dist

    return int(dist.get_rank())


def own_or_first() -> int:
    """This process's rank in its job; outside of one it is the first and only one."""
    return own_rank() if up() else 0


def store() -> Any:
    """The store of the job that this process belongs to now."""
    from torch.distributed import distributed_c10d

    found: Any = distributed_c10d._get_default_store()
    return found


class Board:
    """A place where ranks put texts for each other: the job's store.

    Its server is a thread of C++, in the launcher or in rank 0: a rank that computes, or hangs, does not hold it up.
    """

    def __init__(self) -> None:
        # Not a connection of our own: making one would wait for minutes where the store is gone. What is asked of it here
        # is answered at once, so that nobody else waits for us.
        self._store = self.of = store()

    def put(self, key: str, text: str) -> None:
        """Raises RuntimeError when the store is gone."""
        self._store.set(key, text)

    def has(self, *keys: str) -> bool:
        """Whether there is a text under each key. Raises RuntimeError when the store is gone."""
        return bool(self._store.check(list(keys)))

    def get(self, keys: list[str]) -> list[str]:
        """The texts under keys that are there: a wait for one that is not is answered with warnings of upstream's.

        Raises:
            RuntimeError: the store is gone.
        """
        return [text.decode() for text in self._store.multi_get(keys)]

    def remove(self, key: str) -> None:
        """Take one's own text away."""
        self._store.delete_key(key)
