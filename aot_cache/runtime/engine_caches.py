"""Entries of an engine's compile cache in the bundles of a process: found, and unpacked into a private folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from aot_cache.artifact.engine_cache import EngineCache
from aot_cache.artifact.manifest import served
from aot_cache.files import scratch
from aot_cache.store import Bundle


class Cached(NamedTuple):
    """An entry, and the bundle that has its files."""

    bundle: Bundle
    entry: EngineCache


def entries(bundles: Iterable[Bundle], engine: str, kind: str) -> list[Cached]:
    """The entries of one kind, in the order of the bundles.

    Raises:
        BundleCorrupt: a header does not have the form that this version writes.
    """
    found = [Cached(bundle, entry) for bundle in bundles for entry in served(bundle).engine_caches]
    return [one for one in found if (one.entry.engine, one.entry.kind) == (engine, kind)]


@contextlib.contextmanager
def unpacked(cached: Cached) -> Iterator[Path]:
    """A folder with the files of an entry, that only this user can read, until the block ends.

    Raises:
        BundleCorrupt: the bytes of a file do not hash.
        OSError: no space, no permission, …
    """
    with scratch.folder() as folder:
        for name, digest in cached.entry.files.items():
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(cached.bundle.object(digest))
        yield folder
