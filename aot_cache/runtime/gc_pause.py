"""Pause Python's garbage collector while many objects are created."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Disable garbage collection inside.

    After `import torch` a full collection traverses all of its objects and takes longer than loading a hundred kernels
    (measured on an H200 host: 302 ms for 868 units with collections, 99 ms without).
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
