"""Bundles as an OCI image: an ordinary image, whose only files are bundles, so that one form serves all who pull it.

    manifest   image manifest v1 with an `artifactType`; annotations say what is inside
    config     image config v1 with the same as labels, and those that kernel caches have
    layers     one tar+gzip for each bundle: `io.triton.cache/NAME.safetensors`, and the files that belong to it

Registries and `oras` see an artifact; containerd, CRI-O and so Kubernetes image volumes see an image to mount.

The folder's name and the labels `cache.triton.image/…` are those of the Model Cache Vault's *compat* images, which its `mcv
--extract` and so GKM and KServe's kernel cache unpack: redhat-et/GKM at f0e65de4, mcv/docs/spec-compat.md, read by
`ExtractCache`, `extractCompatImg` and `validateExtractedCacheSize` in mcv/pkg/fetcher/imgfetcher.go, and by
`CompareCacheSummaryLabelToGPU` and `DetectCacheTypeFromLabels` in mcv/pkg/preflightcheck/utils.go. `io.kserve.km/…` are the
hints of mcv/pkg/cache/vllm.go there, which nothing in kserve/kserve read at aaac4e29.

Sources of the form: OCI image-spec 1.1, manifest.md ("Guidelines for Artifact Usage") and config.md.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import platform
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from aot_cache.errors import BundleCorrupt
from aot_cache.remote.description import BESIDE, Description, beside, is_bundle_name, signed
from aot_cache.store import Bundle, json_in

ARTIFACT_TYPE = "application/vnd.aot-cache.bundle.v1"
MANIFEST_TYPE = "application/vnd.oci.image.manifest.v1+json"
CONFIG_TYPE = "application/vnd.oci.image.config.v1+json"
LAYER_TYPE = "application/vnd.oci.image.layer.v1.tar+gzip"
FOLDER = "io.triton.cache"
"""Where the bundles are in the image."""
PREFIX = "aot-cache.bundle/"
"""Of the names of our own annotations and labels: `digest`, `target`, `torch`, `triton`, `recipe`, `complete`, `size`."""
MAX_MANIFEST = 4 << 20
"""Bytes. Registries take no larger ones (distribution-spec, "Pushing Manifests")."""

_TITLE = "org.opencontainers.image.title"
_SIGNED = f"{PREFIX}signatures"
_MOUNTED = "/home/kserve/.cache/aot-cache"
_PIECE = 1 << 20  # bytes
_MACHINES = {"x86_64": "amd64", "aarch64": "arm64"}  # Go's names, which the config has


@dataclass(frozen=True)
class Layer:
    """One bundle's layer.

    Args:
        digest: `sha256:` and the hash of the blob; `diff_id` is that of the tar in it.
        size: bytes of the blob; `files`: bytes of the files in it.
        signed: see `description.signed`.
        description: what is said of the bundle.
    """

    digest: str
    diff_id: str
    size: int
    files: int
    signed: str
    description: Description

    def descriptor(self) -> dict[str, Any]:
        annotations = {_TITLE: self.description.name, _SIGNED: self.signed, **_annotations([self.description])}
        return {"mediaType": LAYER_TYPE, "digest": self.digest, "size": self.size, "annotations": annotations}


@dataclass(frozen=True)
class Packed:
    """A layer of an image that was pulled, as its manifest says: nothing of this is checked yet.

    Args:
        digest: `sha256:` and the hash of the blob.
        size: bytes of the blob.
        name: the bundle's file name.
        bundle: the bundle's digest.
        signed: see `description.signed`.
    """

    digest: str
    size: int
    name: str
    bundle: str
    signed: str


# --- out --------------------------------------------------------------------------------------------------------------


def write_layer(bundle: Bundle, description: Description, out: Path) -> Layer:
    """Write a bundle's layer to a file. The same files give the same bytes: no times, no owners."""
    files = [bundle.path, *beside(bundle.path)]
    with out.open("wb") as file:
        blob = _Hashed(file)
        with gzip.GzipFile(filename="", mode="wb", fileobj=blob, mtime=0) as packed:
            inner = _Hashed(packed)
            with tarfile.open(fileobj=inner, mode="w|", format=tarfile.PAX_FORMAT) as tar:
                folder = tarfile.TarInfo(FOLDER)
                folder.type, folder.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(folder)
                total = 0
                for path in files:
                    with path.open("rb") as source:
                        entry = tarfile.TarInfo(f"{FOLDER}/{path.name}")
                        entry.size, entry.mode = source.seek(0, io.SEEK_END), 0o644
                        source.seek(0)
                        tar.addfile(entry, source)
                        total += entry.size
    digest, diff_id = f"sha256:{blob.hash.hexdigest()}", f"sha256:{inner.hash.hexdigest()}"
    return Layer(digest, diff_id, blob.size, total, signed(bundle.path), description)


class _Hashed(io.RawIOBase):
    """What is written to it is hashed, counted and passed on."""

    def __init__(self, file: IO[bytes] | gzip.GzipFile) -> None:
        self.hash, self.size, self._file = hashlib.sha256(), 0, file

    def writable(self) -> bool:
        return True

    def write(self, data: Any, /) -> int:
        self._file.write(data)
        self.hash.update(data)
        self.size += len(data)
        return len(data)


def config(layers: Sequence[Layer], gpus: Sequence[Mapping[str, object]]) -> bytes:
    """The image's config. `gpus`: backend, arch and warp size of those that the bundles are for."""
    machine = platform.machine()
    found = [layer.description for layer in layers]
    labels = _annotations(found) | {
        "io.kserve.km/framework": "aot-cache",
        "io.kserve.km/cache-type": "aot-cache-bundle",
        "io.kserve.km/cache-hash": ",".join(one.digest for one in found),
        "io.kserve.km/cache-mount-subpath": ".",
        "io.kserve.km/cache-root-env": f"AOT_CACHE={_MOUNTED}",
    }
    if gpus:
        labels |= {
            "cache.triton.image/entry-count": str(len(layers)),
            "cache.triton.image/cache-size-bytes": str(sum(layer.files for layer in layers)),
            "cache.triton.image/summary": _compact({"targets": gpus}).decode(),
        }
    return _compact(
        {
            "architecture": _MACHINES.get(machine, machine),
            "os": "linux",
            "config": {"Labels": labels},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
    )


def manifest(layers: Sequence[Layer], config: bytes) -> bytes:
    """The image's manifest."""
    return _compact(
        {
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "artifactType": ARTIFACT_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": digest_of(config), "size": len(config)},
            "layers": [layer.descriptor() for layer in layers],
            "annotations": _annotations([layer.description for layer in layers]),
        }
    )


def _annotations(found: Sequence[Description]) -> dict[str, str]:
    """What several bundles have in common is said once, else all values are, separated by commas."""
    texts = [one.texts() for one in found]
    names = [name for name in texts[0] if name != "name"]
    return {PREFIX + name: ",".join(dict.fromkeys(text[name] for text in texts)) for name in names}


def digest_of(data: bytes) -> str:
    """The name of a blob in a registry."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def _compact(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


# --- in ---------------------------------------------------------------------------------------------------------------


def read_manifest(data: bytes, where: str) -> list[Packed]:
    """The bundles' layers in an image's manifest.

    Raises:
        BundleCorrupt: it is not the manifest of such an image.
    """
    try:
        found = json_in(data)
        kind = found.get("artifactType") or found["config"]["mediaType"]
        if kind != ARTIFACT_TYPE:
            raise BundleCorrupt(
                f"bundles ({ARTIFACT_TYPE}) at {where}", str(kind)[:100], "push them with `aot-cache push`"
            )
        layers = [_packed(layer) for layer in found["layers"]]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BundleCorrupt(
            f"the manifest at {where} is not one that aot-cache writes", hint="push it again"
        ) from error
    if not layers or len({layer.name for layer in layers}) != len(layers):
        raise BundleCorrupt(f"the manifest at {where} has no bundle, or two of one name", hint="push it again")
    return layers


def _packed(layer: Mapping[str, Any]) -> Packed:
    notes = layer["annotations"]
    found = Packed(layer["digest"], layer["size"], notes[_TITLE], notes[f"{PREFIX}digest"], notes.get(_SIGNED, ""))
    kind, _, hashed = found.digest.partition(":")
    if kind != "sha256" or len(hashed) != 64 or not set(hashed) <= set("0123456789abcdef"):
        raise ValueError("a layer's digest")
    if type(found.size) is not int or found.size < 0:
        raise ValueError("a layer's size")
    if not is_bundle_name(found.name):
        raise ValueError("a bundle's name")
    return found


def unpack(blob: Path, packed: Packed, folder: Path, room: Callable[[int], None]) -> Path:
    """Unpack a layer's bundle, and what belongs to it, into a folder; returns the bundle's path.

    Args:
        blob: the layer, whose hash was checked.
        room: called with the size of each file before it is written; raises if there is no room for it.

    Raises:
        BundleCorrupt: it is not a layer that `write_layer` writes.
    """
    stem = packed.name.removesuffix(".safetensors")
    names = {f"{FOLDER}/{name}": name for name in (packed.name, *(stem + ending for ending in BESIDE))}
    try:
        with tarfile.open(blob, "r:gz") as tar:
            for entry in tar:
                if entry.isdir() and entry.name == FOLDER:
                    continue
                # Each name once: they are removed as they come.
                if not entry.isreg() or entry.name not in names:
                    raise ValueError("an entry that does not belong there")
                room(entry.size)
                source = tar.extractfile(entry)
                with (folder / names.pop(entry.name)).open("xb") as file:
                    for piece in _pieces(source, entry.size):
                        file.write(piece)
    except (tarfile.TarError, ValueError, EOFError, OSError, zlib.error) as error:
        raise _not_ours(packed) from error
    path = folder / packed.name
    if not path.is_file():
        raise _not_ours(packed)
    return path


def _pieces(source: IO[bytes] | None, size: int) -> Iterator[bytes]:
    while size and source is not None:
        piece = source.read(min(size, _PIECE))
        if not piece:
            raise EOFError
        size -= len(piece)
        yield piece


def _not_ours(packed: Packed) -> BundleCorrupt:
    return BundleCorrupt(f"the layer of {packed.name} is not one that aot-cache writes", hint="push it again")
