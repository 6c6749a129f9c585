"""`push`: bundles to a registry, an object store or a folder."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from aot_cache.errors import DeclarationError
from aot_cache.remote import image, reference
from aot_cache.remote.description import BESIDE, Description, beside, describe, gpu
from aot_cache.remote.folders import RemoteFolder
from aot_cache.remote.reference import Folder, Image
from aot_cache.remote.registry import Registry
from aot_cache.store import Bundle, read_bundle

Progress = Callable[[str, int, int], None]
_MB = 1_000_000


@dataclass(frozen=True)
class Moved:
    """A bundle that was pushed or pulled.

    Args:
        description: which one it is.
        path: the file here.
        moved: the bytes that were sent or received for it; 0 if it was there already.
    """

    description: Description
    path: Path
    moved: int

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self.description), "path": str(self.path), "moved": self.moved}


@dataclass(frozen=True)
class Pushed:
    """What a push did.

    Args:
        ref: where the bundles are now.
        digest: of the image's manifest, `sha256:…`; empty for folders.
    """

    ref: str
    digest: str
    bundles: Sequence[Moved]

    def to_json(self) -> dict[str, Any]:
        return {"ref": self.ref, "digest": self.digest, "bundles": [one.to_json() for one in self.bundles]}


def push(paths: Sequence[Path], ref: str, progress: Progress = lambda *_: None) -> Pushed:
    """Send bundles, and the files that belong to them. Who pulls meanwhile gets the old or the new ones.

    Raises:
        DeclarationError: `ref` names nothing that can be written, or two bundles have one name.
        BundleMissing, BundleCorrupt, StoreError: a bundle here.
        RemoteError: there.
    """
    there = reference.parse(ref)
    if isinstance(there, Image) and there.digest:
        raise DeclarationError("a tag to push to", there.digest, "registry.example.com/team/name:tag")
    if isinstance(there, Folder) and there.is_bundle:
        raise DeclarationError("a folder to push to", str(there), "the bundles keep their names")
    bundles = [read_bundle(path) for path in paths]
    for bundle in bundles:
        bundle.require_sound()
        if sum(bundle.path.name == other.path.name for other in bundles) > 1:
            raise DeclarationError("bundles with different names", f"two of {bundle.path.name}", "rename one of them")
    if isinstance(there, Image):
        return _to_registry(bundles, there, progress)
    return _to_folder(bundles, there, progress)


def in_megabytes(progress: Progress, stage: str, total: int) -> Callable[[int], None]:
    """`progress` for somebody who counts bytes."""

    def told(done: int) -> None:
        progress(f"{stage} (MB)", -(-done // _MB), -(-total // _MB))

    return told


def _to_registry(bundles: Sequence[Bundle], there: Image, progress: Progress) -> Pushed:
    registry = Registry(there)
    layers, moved = [], []
    for bundle in bundles:
        described = describe(bundle)
        with tempfile.TemporaryDirectory(prefix="aot-cache-") as scratch:
            blob = Path(scratch) / "layer"
            layer = image.write_layer(bundle, described, blob)
            new = not registry.has(layer.digest)
            if new:
                told = in_megabytes(progress, f"pushing {described.name}", layer.size)
                registry.upload(layer.digest, blob, told)
        layers.append(layer)
        moved.append(Moved(described, bundle.path, layer.size if new else 0))
    gpus: list[Any] = []
    for found in map(gpu, bundles):
        if found is not None and found not in gpus:
            gpus.append(found)
    config = image.config(layers, gpus)
    with tempfile.TemporaryDirectory(prefix="aot-cache-") as scratch:
        (Path(scratch) / "config").write_bytes(config)
        if not registry.has(image.digest_of(config)):
            registry.upload(image.digest_of(config), Path(scratch) / "config", lambda _: None)
    manifest = image.manifest(layers, config)
    registry.put_manifest(manifest)
    return Pushed(str(there), image.digest_of(manifest), moved)


def _to_folder(bundles: Sequence[Bundle], there: Folder, progress: Progress) -> Pushed:
    folder = RemoteFolder(there.url)
    moved = []
    for bundle in bundles:
        described = describe(bundle)
        # First what belongs to it: a bundle that is there is there with its signature.
        here = {path.name: path for path in beside(bundle.path)}
        stem = described.name.removesuffix(".safetensors")
        for name in (stem + ending for ending in BESIDE):
            if name in here:
                folder.send(name, here[name], lambda _: None)
            else:
                folder.remove(name)  # it is of the bundle that was there before
        told = in_megabytes(progress, f"pushing {described.name}", described.size)
        folder.send(described.name, bundle.path, told)
        moved.append(Moved(described, bundle.path, described.size))
    return Pushed(str(there), "", moved)
