"""`pull`: bundles from a registry, an object store or a folder. Nothing has its name here before it was checked."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aot_cache.errors import AotCacheError, BundleCorrupt, DeclarationError, DigestMismatch, RemoteMissing
from aot_cache.remote import image, reference
from aot_cache.remote.description import BESIDE, describe, is_bundle_name, signed
from aot_cache.remote.folders import RemoteFolder
from aot_cache.remote.image import Packed
from aot_cache.remote.incoming import Blob, Incoming, into, sha256
from aot_cache.remote.push import Moved, Progress, in_megabytes
from aot_cache.remote.reference import Folder, Image
from aot_cache.remote.registry import Registry
from aot_cache.store import INCOMPLETE, Bundle, read_bundle, signature, write_atomic
from aot_cache.store.atomic import move_atomic
from aot_cache.store.bundle import MAX_HEADER

_PREFIX = 8  # bytes of a bundle before its header: the header's length
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)


@dataclass(frozen=True)
class Pulled:
    """What a pull did; `ref` is where the bundles came from."""

    ref: str
    bundles: Sequence[Moved]

    def to_json(self) -> dict[str, Any]:
        return {"ref": self.ref, "bundles": [one.to_json() for one in self.bundles]}


def pull(ref: str, out: Path, digest: str | None = None, progress: Progress = lambda *_: None) -> Pulled:
    """Fetch bundles, and the files that belong to them, into a folder.

    What an interrupted pull of the same bundle has left is continued. A bundle that is there already is not fetched.

    Args:
        ref: what to pull.
        out: the folder; it is made if it is missing.
        digest: fetch the bundle with this digest, and no other.

    Raises:
        DeclarationError: `ref` names nothing, or `digest` is none.
        DigestMismatch: it has no bundle with this digest.
        BundleCorrupt: what came is damaged.
        Untrusted: no key of AOT_CACHE_TRUSTED_KEYS has signed it.
        RemoteError: there.
        StoreUnwritable: here.
    """
    there = reference.parse(ref)
    if digest is not None and not _DIGEST.fullmatch(digest):
        raise DeclarationError("a bundle's digest of 64 hex digits", repr(digest), "see `aot-cache verify BUNDLE`")
    if isinstance(there, Image):
        return Pulled(str(there), _from_registry(there, out, digest, progress))
    return Pulled(str(there), _from_folder(there, out, digest, progress))


# --- from where -------------------------------------------------------------------------------------------------------


def _from_registry(there: Image, out: Path, digest: str | None, progress: Progress) -> list[Moved]:
    registry = Registry(there)
    found = image.read_manifest(registry.manifest(), str(there))
    if digest is not None:
        wanted = [packed for packed in found if packed.bundle == digest]
        if not wanted:
            raise _other(digest, [packed.bundle for packed in found], str(there))
        found = wanted
    with into(out) as incoming:
        return [_layer(registry, packed, there, incoming, progress) for packed in found]


def _layer(registry: Registry, packed: Packed, there: Image, incoming: Incoming, progress: Progress) -> Moved:
    before = _present(incoming.out / packed.name, packed.bundle)
    if before is not None and packed.signed in ("", signed(before.path)):
        return before
    hashed = packed.digest.partition(":")[2]
    blob = Blob(hashed, packed.size, lambda offset: registry.download(packed.digest, offset))
    told = in_megabytes(progress, f"pulling {packed.name}", packed.size)
    with incoming.fetched(blob, lambda path: sha256(path) == hashed, told) as (part, right):
        if not right:
            what = f"what {there} has as {packed.name} is damaged: it does not hash to {packed.digest[:23]}…"
            raise BundleCorrupt(what, hint="push it again, under a tag of its own")
        with incoming.unpacked(hashed) as folder:
            path = image.unpack(part, packed, folder, incoming.room)
            return _arrived(path, packed.bundle, incoming.out, str(there), packed.size)


def _from_folder(there: Folder, out: Path, digest: str | None, progress: Progress) -> list[Moved]:
    url, _, name = there.url.rpartition("/") if there.is_bundle else (there.url, "", "")
    folder = RemoteFolder(url)
    every = folder.names()
    names = [name] if name else [one for one in every if is_bundle_name(one) and not one.endswith(INCOMPLETE)]
    if not names or (name and name not in every):
        raise RemoteMissing(f"there is no bundle at {there}", hint="check the name")
    heads = {one: _digest(folder, one) for one in names}
    if digest is not None:
        heads = {one: found for one, found in heads.items() if found == digest} or heads
        if digest not in heads.values():
            raise _other(digest, list(heads.values()), str(there))
    with into(out) as incoming:
        return [_file(folder, one, found, every, incoming, progress) for one, found in heads.items()]


def _file(
    folder: RemoteFolder, name: str, digest: str, every: Sequence[str], incoming: Incoming, progress: Progress
) -> Moved:
    before = _present(incoming.out / name, digest)
    if before is not None:
        if f"{name}.sig" in every:  # it may have been signed since
            write_atomic(incoming.out / f"{name}.sig", folder.read(f"{name}.sig"))
        return before
    size = folder.size(name)
    # The digest is of the header, which has the hash of everything behind it.
    blob = Blob(digest, size, lambda offset: folder.pieces(name, offset, size))
    told = in_megabytes(progress, f"pulling {name}", size)
    with incoming.fetched(blob, lambda path: _why_not(path, digest) is None, told) as (part, right):
        with incoming.unpacked(digest) as unpacked:
            path = unpacked / name
            part.rename(path)
            if right:
                stem = name.removesuffix(".safetensors")
                for other in (stem + ending for ending in BESIDE):
                    if other in every:
                        _companion(folder, other, unpacked, incoming)
            return _arrived(path, digest, incoming.out, folder.url, size)


def _companion(folder: RemoteFolder, name: str, unpacked: Path, incoming: Incoming) -> None:
    size = folder.size(name)
    incoming.room(size)
    with (unpacked / name).open("xb") as file:
        for piece in folder.pieces(name, 0, size):
            file.write(piece)


def _digest(folder: RemoteFolder, name: str) -> str:
    """The digest of a bundle that is elsewhere, from its first bytes."""
    head = folder.read(name, 0, _PREFIX)
    length = int.from_bytes(head, "little")
    if len(head) < _PREFIX or length > MAX_HEADER:
        raise BundleCorrupt(f"{folder.url}/{name} is no bundle", hint="name another file")
    return hashlib.sha256(head + folder.read(name, _PREFIX, _PREFIX + length)).hexdigest()


# --- what has come ----------------------------------------------------------------------------------------------------


def _present(path: Path, digest: str) -> Moved | None:
    """The bundle with this digest, if it is here already and sound."""
    try:
        bundle = _sound(path, digest)
        _require_signed(path, digest)
        return Moved(describe(bundle), path, 0)
    except AotCacheError:
        return None


def _why_not(path: Path, digest: str) -> AotCacheError | None:
    """Why a file is not the bundle with this digest."""
    try:
        _sound(path, digest)
    except AotCacheError as error:
        return error
    return None


def _sound(path: Path, digest: str) -> Bundle:
    bundle = read_bundle(path, digest)
    bundle.require_sound()
    return bundle


def _require_signed(path: Path, digest: str) -> None:
    """Where keys are trusted, one of them must have signed a bundle: its signatures are beside it."""
    keys = signature.trusted_keys()
    if keys is not None:
        signature.require(path, digest, keys)


def _arrived(path: Path, digest: str, out: Path, where: str, moved: int) -> Moved:
    """Check a bundle that came, with what belongs to it beside it, and give all of it its name."""
    try:
        bundle = _sound(path, digest)
        described = describe(bundle)
        _require_signed(path, digest)
    except AotCacheError as error:  # its path is one that nobody can look at
        raise type(error)(error.message.replace(str(path), f"{path.name} of {where}"), hint=error.hint) from error
    stem = path.name.removesuffix(".safetensors")
    same = _present(out / path.name, digest) is not None
    for name in (stem + ending for ending in BESIDE):
        if (path.parent / name).exists():
            move_atomic(path.parent / name, out / name)
        elif not same:
            (out / name).unlink(missing_ok=True)  # it is of the bundle that was here before
    move_atomic(path, out / path.name)
    return Moved(described, out / path.name, moved)


def _other(digest: str, found: Sequence[str], where: str) -> DigestMismatch:
    return DigestMismatch(f"bundle {digest} at {where}", f"bundle {', '.join(found)}", "pull or pin the right one")
