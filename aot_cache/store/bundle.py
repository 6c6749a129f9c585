"""The bundle: one safetensors file with a manifest in its header and the objects as byte tensors.

    8 bytes    length of the header, little endian
    header     JSON, padded with spaces to 8 bytes:
               {"__metadata__": {"format": "aot-cache", "manifest": <JSON>, "manifest_sha256": .., "objects_sha256": ..,
                                 "schema": "1"},
                <sha256>: {"dtype": "U8", "shape": [size], "data_offsets": [begin, end]}, ...}
    objects    in the order of their digests, without gaps

The same manifest and objects give the same bytes, and a header is accepted only if it is, byte for byte, the one that
`write_bundle` writes for its manifest. So the encoding is unique, and an attacker cannot use a second reading of it.

A bundle's *digest* is the sha256 of its first two parts. It covers the objects too, because the manifest lists their
hashes: pinning it pins every byte. Without a pin, a damaged header is still detected (the layout is fixed and
`manifest_sha256` covers the rest), but a forged one is not.

The file is not written by `safetensors.serialize`, because that orders the metadata randomly (0.8.0), and the same input
would have many digests. safetensors can read the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import re
import reprlib
import weakref
from collections.abc import Callable, Mapping
from concurrent import futures
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any, NoReturn

from aot_cache.errors import AotCacheError, BundleCorrupt, DigestMismatch, StoreError
from aot_cache.store import signature
from aot_cache.store.atomic import open_regular, write_atomic

FORMAT = "aot-cache"
SCHEMA = "1"
MAX_HEADER = 16_000_000
"""Bytes. The largest known bundle has 0.9 MB of header. safetensors allows 100 MB, which would take 2.5 GiB to parse."""
MAX_VALUES = 1_200_000
"""Values in a header: commas and opening brackets, also in strings. An empty list takes 3 bytes there and 64 in memory. Known
bundles have 0.06 for each byte."""

_PREFIX = 8  # bytes of the header's length
_MOST_HEADERS = 64_000  # bytes; most are not longer, and one read is faster than two
_MAX_OBJECT = 2**63  # bytes; no file is larger, and Python may refuse to print a longer number
_DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
PART = 2 << 20
"""Bytes of objects that are read and hashed at once when a bundle is read for loading."""

_READERS = 8
_MOST_PREFETCHED = 1 << 30  # bytes; a larger size may be forged, so the header is checked first
_REPR = reprlib.Repr()
_REPR.maxstring = 80


class _Body:
    """All objects of a bundle, read and hashed in parts of `PART` bytes by background threads.

    Large reads and hashes release the GIL; a read and a hash for every object would contend for it.
    """

    def __init__(self, file: int, begin: int, size: int) -> None:
        # Private, so that what a forked child reads again cannot change what was hashed here. The threads touch the pages.
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._file = file
        self._begin = begin
        self._process = os.getpid()
        self._digests: dict[int, str] = {}
        self._parts: list[Future[str]] = [Future() for _ in range(-(-size // PART))]
        self._next = iter(range(len(self._parts)))
        self._start(min(_READERS, len(self._parts)))

    def _start(self, threads: int) -> None:
        if threads:
            Thread(target=self._work, args=(threads - 1,), name="aot-cache", daemon=True).start()

    def _work(self, more: int) -> None:
        # Each thread starts the next. `Thread.start` waits for the new thread, so starting all of them would delay the caller.
        with contextlib.suppress(RuntimeError):  # no more threads can be started: the running ones do the work
            self._start(more)
        for number in self._next:
            try:
                self._digests[number] = self._read(number)
                self._parts[number].set_result(self._digests[number])
            except BaseException as error:  # a caller waits for this part
                self._parts[number].set_exception(error)

    def digest(self, number: int, path: Path) -> str:
        """Wait for a part and return its sha256. The part is then in `memory`."""
        try:
            if number not in self._digests and os.getpid() != self._process:
                # In a forked child: the threads, and the release of any lock that they held, are in the parent.
                self._digests[number] = self._read(number)
            found = self._digests.get(number)
            return found if found is not None else self._parts[number].result()
        except OSError as error:
            raise StoreError(
                f"cannot read {path}: {error.strerror or error}", hint="copy it to a local disk"
            ) from error

    def wait(self) -> None:
        """Wait until the threads no longer use the file."""
        futures.wait(self._parts)

    def _read(self, number: int) -> str:
        view = memoryview(self.memory)[number * PART : (number + 1) * PART]
        at, rest = self._begin + number * PART, view
        while rest and (done := os.preadv(self._file, [rest], at)):  # one call may read less (FUSE, NFS)
            at, rest = at + done, rest[done:]
        # A shortened file leaves zeros, which have another digest.
        return hashlib.sha256(view).hexdigest()


class Bundle:
    """A bundle whose header and layout were checked. Made by `read_bundle`.

    May be used from many threads at the same time; reading and hashing release the GIL. The file stays open, so its path may
    be replaced or deleted meanwhile, and this object still reads the old bundle.

    Attributes:
        path: the file it was read from.
        manifest: what `write_bundle` was given, and "objects": {sha256: size in bytes}.
        digest: 64 hex digits that identify the whole bundle.
        size: the file's size in bytes.
        proven: whether something outside the file says that this is the bundle that was built: `read_bundle` sets it for a
            pinned digest, and where `accept` has not raised.
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        digest: str,
        begin: int,
        part_digests: list[str],
        file: int,
        body: _Body | None,
        proven: bool,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest
        self.proven = proven
        self._file = file
        self._close = weakref.finalize(self, os.close, file)
        self._body_begin = begin
        self._part_digests = part_digests
        self._body = body
        self._checked: dict[str, bytes] = {}
        self._spans: dict[str, tuple[int, int]] = {}
        for name, size in sorted(manifest["objects"].items()):
            self._spans[name] = (begin, size)
            begin += size
        self.size = begin

    def status(self) -> os.stat_result:
        """Owner, mode and times of the open file."""
        return os.fstat(self._file)

    def object(self, digest: str) -> bytes:
        """The bytes of an object, checked against their hash.

        A bundle that was read with `prefetch` returns a new copy each time: all objects are in memory already, and allocating
        pages for cached copies would take a tenth of the loading time.

        Raises:
            BundleCorrupt: they hash to something else, or the bundle has no such object.
            StoreError: they cannot be read.
        """
        # Two threads may both read an object that is not cached yet: the results are equal, and it is cheaper than a lock.
        data = self._checked.get(digest)
        if data is not None:
            return data
        if digest not in self._spans:
            _refuse(self.path, f"it has no object {digest!r}")
        if self._body is not None:
            begin, size = self._spans[digest]
            begin -= self._body_begin
            self._require_sound(self._body, begin, size)
            data = bytes(memoryview(self._body.memory)[begin : begin + size])
            # `write_bundle` has hashed each object. Whoever wrote a header that is not proven may have left that out.
            if not self.proven and hashlib.sha256(data).hexdigest() != digest:
                _refuse(self.path, f"the bytes of object {digest} do not hash to its name")
            return data
        data = self._read(*self._spans[digest])
        if hashlib.sha256(data).hexdigest() != digest:
            _refuse(self.path, f"the bytes of object {digest} do not hash to its name")
        self._checked[digest] = data
        return data

    def require_sound(self) -> None:
        """Check all objects that were not hashed yet.

        Raises:
            BundleCorrupt: some hash to something else.
            StoreError: they cannot be read.
        """
        if self._body is not None:
            self._require_sound(self._body, 0, self.size - self._body_begin)
        else:
            for digest in self._spans:
                self.object(digest)

    def _require_sound(self, body: _Body, begin: int, size: int) -> None:
        for number in range(begin // PART, (begin + size + PART - 1) // PART):
            if body.digest(number, self.path) != self._part_digests[number]:
                bad = ", ".join(self.check_all()) or "none any more: it changes while it is read"
                _refuse(self.path, f"its objects do not hash to what the header says; objects that are wrong: {bad}")

    def check_all(self) -> list[str]:
        """Read and hash every object, even if it was hashed before; returns the digests of the bad ones, sorted."""
        return [name for name, span in self._spans.items() if hashlib.sha256(self._read(*span)).hexdigest() != name]

    def _read(self, begin: int, size: int) -> bytes:
        try:
            data = _pread(self._file, size, begin)
        except OSError as error:
            raise StoreError(
                f"cannot read {self.path}: {error.strerror or error}", hint="copy it to a local disk"
            ) from error
        return data  # fewer bytes if the file was shortened, and they do not hash to the name


def _pread(file: int, size: int, begin: int) -> bytes:
    """`size` bytes from `begin`; fewer only at the file's end. One call may read less: FUSE, NFS, more than 2 GiB on Linux."""
    data = os.pread(file, size, begin)
    while len(data) < size and (more := os.pread(file, size - len(data), begin + len(data))):
        data += more
    return data


INCOMPLETE = ".incomplete.safetensors"
"""Ending of an incomplete bundle's name, where a complete one has the name that was asked for."""


def bundles_in(folder: Path) -> list[Path]:
    """Files of a folder that may be bundles, but no incomplete ones."""
    return sorted(path for path in folder.glob("*.safetensors") if not path.name.endswith(INCOMPLETE))


def peek(path: Path) -> bytes:
    """The header of what may be a bundle, unchecked and with its length: to pass quickly over files that cannot be meant. Empty
    if it cannot be read."""
    with contextlib.suppress(StoreError), open_regular(path) as (file, size):
        data = file.read(_MOST_HEADERS)
        length = int.from_bytes(data[:_PREFIX], "little")
        if length <= min(MAX_HEADER, size - _PREFIX):
            begin = _PREFIX + length
            return data[:begin] if len(data) >= begin else _pread(file.fileno(), begin, 0)
    return b""


def looks_sound(header: bytes) -> bool:
    """Whether a header begins as `write_bundle` begins it."""
    return header[_PREFIX:].startswith(_BEGIN)


def in_header(fragment: str) -> bytes:
    """How a fragment of a manifest's JSON, without spaces, stands in a header."""
    return json.dumps(fragment)[1:-1].encode("ascii")


def write_bundle(path: str | os.PathLike[str], manifest: Mapping[str, Any], objects: Mapping[str, bytes]) -> str:
    """Write a bundle atomically and return its digest. The signatures of another bundle that it replaces are removed.

    Args:
        path: the file; an existing one is replaced whole, and missing folders are made.
        manifest: plain JSON (string keys, finite numbers). Its "objects" is set here, the rest is kept.
        objects: bytes by their sha256 (64 lower-case hex digits).

    Raises:
        BundleCorrupt: an object's bytes do not hash to its name.
        StoreError: the header would be larger than `MAX_HEADER`.
        StoreUnwritable: no space, no permission, ...
        TypeError, ValueError: `manifest` is not plain JSON.
    """
    path = Path(path)
    for name, data in objects.items():
        if hashlib.sha256(data).hexdigest() != name:
            raise BundleCorrupt(f"cannot write {path}: the bytes of object {name!r} do not hash to its name")
    sizes = {name: len(data) for name, data in objects.items()}
    text = _canonical({**manifest, "objects": sizes})
    if _canonical(_parse(text)) != text:  # number keys become strings, which may sort differently or collide
        raise ValueError("the manifest is not plain JSON: what is read back would not be what was written")
    ordered = [objects[name] for name in sorted(objects)]
    header = _header(text, sizes, _part_digests(b"".join(ordered)))
    if len(header) - _PREFIX > MAX_HEADER or _values(header) > MAX_VALUES:
        why = f"its header would have {len(header):,} bytes and {_values(header):,} values, "
        why += f"more than the {MAX_HEADER:,} and {MAX_VALUES:,} that are allowed"
        raise StoreError(f"cannot write {path}: {why}", hint="split it into several bundles")
    digest = hashlib.sha256(header).hexdigest()
    stale = signature.beside(path).exists() and _digest_of(path) != digest
    write_atomic(path, b"".join([header, *ordered]))
    if stale:
        signature.remove(path)
    return digest


def _digest_of(path: Path) -> str:
    """The digest of the bundle at a path; empty if there is no sound one."""
    try:
        return read_bundle(path).digest
    except AotCacheError:
        return ""


def read_bundle(
    path: str | os.PathLike[str],
    digest: str | None = None,
    *,
    prefetch: bool = False,
    accept: Callable[[str], object] | None = None,
) -> Bundle:
    """Read a bundle's header, and check it and the layout. Objects are read and hashed on access.

    Writes nothing and takes no lock. Bytes are copied into memory, not mapped: truncating a mapped file kills its readers
    (SIGBUS), and a mapped file could change after it was hashed.

    Args:
        path: the file.
        digest: the digest that the bundle must have, or None for any.
        prefetch: also read and hash all objects, on threads that start as soon as the header is known to be good: by its digest,
            if that is given, else when it is parsed. For loading.
        accept: called with the digest of a sound header, before any object is read; raises what it has against the bundle.

    Raises:
        BundleMissing: there is no file.
        BundleCorrupt: it is damaged, or not a bundle; the message says what is wrong.
        DigestMismatch: it is a sound bundle with another digest.
        StoreError: the file cannot be read.
    """
    path = Path(path)
    with open_regular(path) as (file, size):
        header = _pread(file.fileno(), _PREFIX, 0)
        if len(header) < _PREFIX:
            _refuse(path, f"it has {size} bytes, too few for a header")
        length = int.from_bytes(header, "little")
        if length > min(MAX_HEADER, size - _PREFIX):
            _refuse(path, f"it says that its header has {length:,} bytes, and the file has {size:,}")
        descriptor, body = os.dup(file.fileno()), None
        try:
            begin = _PREFIX + length
            header = _pread(descriptor, begin, 0)  # before the threads start, because it would wait behind their reads
            if (values := _values(header)) > MAX_VALUES:
                _refuse(path, f"its header has {values:,} values, more than the {MAX_VALUES:,} that are allowed")
            actual = hashlib.sha256(header).hexdigest()
            pinned = actual == digest and accept is None
            ahead = prefetch and 0 < size - begin <= _MOST_PREFETCHED
            if ahead and pinned:
                body = _Body(descriptor, begin, size - begin)
            manifest, part_digests = _read_header(path, header, size)
            if digest not in (None, actual):
                raise DigestMismatch(f"bundle {digest} at {path}", f"bundle {actual}", "install or pin the right one")
            if accept is not None:
                accept(actual)
            if ahead and not pinned:
                body = _Body(descriptor, begin, size - begin)
            proven = actual == digest or accept is not None
            return Bundle(path, manifest, actual, begin, part_digests, descriptor, body, proven)
        except BaseException:
            if body is not None:
                body.wait()
            os.close(descriptor)
            raise


def _values(header: bytes) -> int:
    return header.count(b",") + header.count(b"[") + header.count(b"{")


def _read_header(path: Path, header: bytes, size: int) -> tuple[dict[str, Any], list[str]]:
    """(manifest, digests of the parts). `header` starts with its length."""
    manifest, part_digests = _check_header(path, header)
    wanted = sum(manifest["objects"].values())
    if size - len(header) != wanted:
        _refuse(path, f"it has {size - len(header):,} bytes of objects, and its manifest says {wanted:,}")
    return manifest, part_digests


def _refuse(path: Path, found: str) -> NoReturn:
    raise BundleCorrupt(f"bundle {path} is damaged: {found}", hint="copy or build it again")


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _parse(text: str) -> Any:
    """Parse JSON strictly. Raises ValueError or RecursionError for anything ambiguous (a repeated key) or invalid."""
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a key is there twice")
    return table


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _part_digests(body: bytes) -> str:
    """The sha256 of each `PART` bytes of the concatenated objects, in order, separated by commas."""
    return ",".join(hashlib.sha256(body[begin : begin + PART]).hexdigest() for begin in range(0, len(body), PART))


def _metadata(text: str, part_digests: str) -> dict[str, str]:
    return {
        "format": FORMAT,
        "manifest": text,
        "manifest_sha256": hashlib.sha256((text + part_digests).encode("ascii")).hexdigest(),
        "objects_sha256": part_digests,
        "schema": SCHEMA,
    }


def _header(text: str, sizes: Mapping[str, int], part_digests: str) -> bytes:
    """The canonical header, preceded by its length, for the manifest `text` and objects of these sizes (bytes)."""
    parts = [f'"__metadata__":{_canonical(_metadata(text, part_digests))}']
    begin = 0
    for name in sorted(sizes):  # without json, because digests and numbers need no escapes and every load runs this
        end = begin + sizes[name]
        parts.append(f'"{name}":{{"dtype":"U8","shape":[{sizes[name]}],"data_offsets":[{begin},{end}]}}')
        begin = end
    header = f"{{{','.join(parts)}}}".encode("ascii")
    header += b" " * (-len(header) % 8)  # objects then start at a multiple of 8, as in safetensors
    return len(header).to_bytes(_PREFIX, "little") + header


def _check_header(path: Path, header: bytes) -> tuple[dict[str, Any], list[str]]:
    """(manifest in `header`, digests of the parts of all objects).

    `header` starts with its length, and must be the one that `write_bundle` writes for these two.
    """
    try:
        metadata = _first_metadata(header)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its header is not JSON ({_short(error)})")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        _refuse(path, f"its header does not say that it is of format {FORMAT!r}")
    if metadata.get("schema") != SCHEMA:
        _refuse(path, f"it has schema {_short(metadata.get('schema'))}, and this aot-cache reads {SCHEMA!r}")
    text = metadata.get("manifest")
    if not isinstance(text, str) or not text.isascii():
        _refuse(path, "its header has no manifest in ASCII")
    joined = metadata.get("objects_sha256")
    parts = joined.split(",") if isinstance(joined, str) and joined else []
    if not isinstance(joined, str) or not all(_DIGEST.fullmatch(part) for part in parts):
        _refuse(path, f"its objects_sha256 is {_short(joined)}, which is no list of sha256")
    manifest = _check_manifest(path, text)
    wanted = _header(text, manifest["objects"], joined)
    if header != wanted:  # this is the check; `_difference` only words the error
        _refuse(path, _difference(header, wanted))
    if len(parts) != -(-sum(manifest["objects"].values()) // PART):
        _refuse(path, f"it has digests of {len(parts)} parts of its objects, which is not their number")
    return manifest, parts


_METADATA = '{"__metadata__":'
_BEGIN = f'{_METADATA}{{"format":"{FORMAT}"'.encode("ascii")


def _first_metadata(header: bytes) -> Any:
    """The metadata in `header`. Of a header by `write_bundle` only the metadata is parsed, because it determines the rest."""
    text = header[_PREFIX:].decode("utf-8")
    if text.startswith(_METADATA):
        with contextlib.suppress(ValueError):
            return json.JSONDecoder().raw_decode(text, len(_METADATA))[0]
    table = json.loads(text)
    return table.get("__metadata__") if isinstance(table, dict) else None


def _check_manifest(path: Path, text: str) -> dict[str, Any]:
    try:
        manifest = _parse(text)
    except (ValueError, RecursionError) as error:
        _refuse(path, f"its manifest is not JSON ({_short(error)})")
    objects = manifest.get("objects") if isinstance(manifest, dict) else None
    if not isinstance(manifest, dict) or not isinstance(objects, dict):
        _refuse(path, "its manifest lists no objects")
    for name, size in objects.items():
        if not _DIGEST.fullmatch(name):
            _refuse(path, f"its manifest has an object {_short(name)}, which is no sha256")
        if type(size) is not int or not 0 <= size < _MAX_OBJECT:
            _refuse(path, f"its manifest says that object {name} has {_short(size)} bytes")
    return manifest


def _difference(header: bytes, wanted: bytes) -> str:
    """Describe how a header differs from `wanted`, the canonical header for its manifest."""
    try:
        json.loads(header[_PREFIX:].decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return f"its header is not JSON ({_short(error)})"
    try:
        found = _parse(header[_PREFIX:].decode("utf-8"))
    except ValueError as error:
        return f"its header has more than one meaning ({_short(error)})"
    tensors = _parse(wanted[_PREFIX:].decode("ascii"))
    metadata = tensors.pop("__metadata__")
    if found.pop("__metadata__").get("manifest_sha256") != metadata["manifest_sha256"]:
        return "its manifest does not hash to the manifest_sha256 beside it"
    for name in sorted(found.keys() - tensors.keys()):
        return f"it has a tensor {_short(name)} that its manifest does not list"
    for name in sorted(tensors.keys() - found.keys()):
        return f"it lacks the object {name} that its manifest lists"
    for name, tensor in tensors.items():
        if found[name] != tensor:
            return f"the tensor {name} is {_short(found[name])}, and its manifest asks for {_short(tensor)}"
    return "its header is not written as write_bundle writes it (order, spacing, padding or keys)"


def _short(value: object) -> str:
    """`value` as one short line. It may be hostile: long, deeply nested or full of control characters."""
    text = str(value) if isinstance(value, Exception) else _REPR.repr(value)
    return "".join(character if character.isprintable() else "?" for character in text[:200])
