"""The C modules of Triton's driver and of its launchers, found in bundles."""

from __future__ import annotations

from collections.abc import Iterable

from aot_cache.artifact.manifest import Served, served
from aot_cache.runtime import bundle_lookup
from aot_cache.store import Bundle


def find(bundles: Iterable[tuple[Served, Bundle]], source: str) -> bytes | None:
    """The module for this Python that was built from the C source with the key `source`, from the first bundle that has it.

    Raises:
        BundleCorrupt: its bytes do not hash.
    """
    from aot_cache.upstream.hooks.triton_launcher import interpreter_tag  # here, because it imports Triton

    suffix = interpreter_tag()
    for manifest, bundle in bundles:
        for native in manifest.native:
            if native.source == source and native.suffix == suffix:
                return bundle.object(native.object)
    return None


def of_environment(source: str) -> bytes | None:
    """`find` in the bundles that AOT_CACHE names, for a process that loads none.

    Raises:
        BundleCorrupt: a manifest does not have the form that this version writes, or the module's bytes do not hash.
    """
    return find(((served(bundle), bundle) for bundle in bundle_lookup.of_environment()), source)
