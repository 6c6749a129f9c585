"""What is said of a bundle that travels: which one it is and what it is for. None of it is trusted: the bundle itself is read."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from aot_cache.artifact.manifest import served
from aot_cache.store import Bundle

BESIDE = (".safetensors.sig", ".rehearsed.json", ".plan.json")
"""Endings of the files that belong to a bundle and may lie beside it: its signatures, its rehearsals, its plan."""


@dataclass(frozen=True, kw_only=True)
class Description:
    """A bundle in short.

    Args:
        name: the file's name.
        digest: the bundle's digest.
        size: the file's size in bytes.
        target: the target's id.
        recipe: the recipe that it was built from, with its options.
        torch, triton: the releases that built it; empty without graphs, or without kernels.
        complete: whether nothing failed to compile.
    """

    name: str
    digest: str
    size: int
    target: str
    recipe: str
    torch: str
    triton: str
    complete: bool

    def texts(self) -> dict[str, str]:
        """The fields as text, for annotations."""
        return {name: str(value) for name, value in asdict(self).items()} | {"complete": str(self.complete).lower()}


def describe(bundle: Bundle) -> Description:
    """Raises BundleCorrupt if the bundle's header does not have this version's form."""
    header = served(bundle)
    return Description(
        name=bundle.path.name,
        digest=bundle.digest,
        size=bundle.size,
        target=str(header.target.get("id", "")),
        recipe=header.spec or header.recipe,
        torch=str(header.graph_key.get("torch", "")),
        triton=str(header.toolchain["triton"]),
        complete=header.complete,
    )


def gpu(bundle: Bundle) -> Mapping[str, object] | None:
    """Backend, arch and warp size of the GPU that a bundle is for; None for a CPU."""
    header = served(bundle)
    if header.on_cpu:
        return None
    target = header.target
    return {"backend": target["backend"], "arch": str(target["arch"]), "warp_size": target["warp_size"]}


def beside(bundle: Path) -> list[Path]:
    """The files that belong to a bundle, in the order in which they are written."""
    stem = bundle.name.removesuffix(".safetensors")
    return [path for ending in BESIDE if (path := bundle.with_name(stem + ending)).is_file()]


def signed(bundle: Path) -> str:
    """The sha256 of the file with a bundle's signatures; empty if there is none."""
    path = bundle.with_name(f"{bundle.name}.sig")
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def is_bundle_name(name: object) -> bool:
    """Whether this may be the name of a bundle's file. What others have named becomes a file here."""
    if not isinstance(name, str) or not name.endswith(".safetensors") or len(name) > 200 or not name.isprintable():
        return False
    return "/" not in name and "\\" not in name and not name.startswith(".")
