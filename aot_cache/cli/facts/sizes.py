"""What the bytes of a bundle are used for, as plain dicts. Imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from aot_cache.artifact.manifest import Manifest

Facts = dict[str, Any]


def sizes(manifest: Manifest, details: str, size: int) -> list[Facts]:
    """One row for each kind of contents: `kind`, `objects`, `bytes`. The bytes add up to the file's size.

    An object used by two kinds is stored once, and counted for the first of them.

    Args:
        manifest: the bundle's whole manifest.
        details: digest of the object that has the manifest's details.
        size: the file's size in bytes.
    """
    stored = manifest.objects
    left = set(stored)
    rows: list[Facts] = []
    for kind, digests in _kinds(manifest, details):
        mine = left & set(digests)
        left -= mine
        if mine:
            rows.append({"kind": kind, "objects": len(mine), "bytes": sum(stored[digest] for digest in mine)})
    rows.append({"kind": "manifest", "objects": 0, "bytes": size - sum(row["bytes"] for row in rows)})
    return rows


def _kinds(manifest: Manifest, details: str) -> Iterator[tuple[str, Iterable[str]]]:
    graphs = manifest.graphs
    yield "kernels", (unit.object for unit in manifest.units)
    yield "compiled graphs", (digest for graph in graphs for digest in graph.graphs.values())
    yield "libraries of graphs", (digest for graph in graphs for digest in graph.libraries.values())
    yield "guards and bytecode", (digest for graph in graphs for digest in graph.objects())
    yield "engines' caches", (digest for entry in manifest.engine_caches for digest in entry.objects())
    yield "C launchers", (native.object for native in manifest.native)
    yield "details for people", [details]
    yield "other", manifest.objects
