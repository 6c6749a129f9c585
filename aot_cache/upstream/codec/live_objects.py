"""All objects of this process, frozen ones included: kernels that no module attribute holds are found among them.

Upstream: CPython's `gc` (`Modules/gcmodule.c`): `get_objects` leaves out the permanent generation, into which `gc.freeze`
moves all objects. Engines freeze after start-up, or before they fork workers (vLLM's `freeze_gc_heap`).
"""

from __future__ import annotations

import gc


def all_objects() -> list[object]:
    """Every object that the garbage collector tracks. Takes about 0.1 s.

    Where something is frozen, everything is afterwards: what was young by then is never collected if it is a cycle. A look
    after start-up is rare, and the young generations are collected before.
    """
    if not gc.get_freeze_count():
        return gc.get_objects()
    gc.collect(1)
    gc.unfreeze()
    try:
        return gc.get_objects()
    finally:
        gc.freeze()
