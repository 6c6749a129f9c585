"""What a build has put into its store, read again when its bundle is written.

Between the two, other processes may have removed or damaged it. A bundle without it would say that it is complete.
"""

from __future__ import annotations

from typing import Any

from aot_cache.artifact.key import UNITS
from aot_cache.artifact.plan import Unit
from aot_cache.errors import BundleCorrupt, BundleMissing, StoreChanged
from aot_cache.store import Store

_HINT = "find out what removes or changes files there, and build again"


def unit(store: Store, planned: Unit, unit_key: str) -> dict[str, Any]:
    """The record of a unit that did not fail.

    Raises:
        StoreChanged: there is none.
    """
    record = store.get_record(UNITS, unit_key)
    if record is None:
        lost = f"none of {planned.kernel} ({unit_key[:16]}), which was there before"
        raise StoreChanged(f"a sound record of each compiled kernel in {store.root}", lost, _HINT)
    return record


def object_of(store: Store, digest: str) -> bytes:
    """The bytes of an object that the build has stored.

    Raises:
        StoreChanged: it is gone or damaged.
    """
    try:
        return store.get(digest)
    except (BundleCorrupt, BundleMissing) as error:
        found = "a damaged one" if isinstance(error, BundleCorrupt) else "none"
        raise StoreChanged(
            f"the object {digest[:16]} in {store.root}", f"{found}, although it was there before", _HINT
        ) from error
