"""The store: a folder of objects named by their hash, and of small records named by their key.

    <root>/.lock                        held by a writer that excludes others
    <root>/.use                         held by builds together, and by housekeeping alone
    <root>/v2/objects/<aa>/<digest>     bytes; the name is their sha256
    <root>/v2/records/<kind>/<key>.json facts about them, with a sha256 over these, their kind and their key

Disks lose and change bytes, and other processes remove files. What does not hash to its name, or a record that does not hash to
what it says, counts as absent: whoever made it makes it again, and writes over it. When a record was used last is its file's time
of change; an object is used when a record that names it is.

A changed layout gets a new `v<n>` beside the old one, so that two releases can share a root.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from aot_cache.errors import BundleCorrupt, BundleMissing, StoreError, StoreUnwritable
from aot_cache.store import use
from aot_cache.store.atomic import open_regular, probe_writable, unwritable, write_atomic

LAYOUT = "v2"
Named = Callable[[Mapping[str, Any]], Iterable[str]]
"""Digests of the objects that a record names."""

DIGEST = re.compile(r"[0-9a-f]{64}", re.ASCII)
# Kinds and keys become file names: they must not lead out of the folder or be hidden files.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII)


class Store:
    """A folder of content-addressed objects and of records.

    The constructor does not touch the disk. Reading changes nothing but a record's time, and never waits for a lock; the first
    write makes the folders.
    One `Store` may be used from many threads, and one root from many processes, at the same time.

    Args:
        root: the folder.
    """

    problem = ""
    """Why the store behind this one is not used, if there is one (see `remote.shared_store`)."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self._home = self.root / LAYOUT

    def put(self, data: bytes) -> str:
        """Store `data` and return its sha256 as 64 hex digits. Bytes that are stored already are not written again; if those are
        damaged, they are replaced.

        Raises:
            StoreUnwritable: no space, no permission, ...
        """
        digest = hashlib.sha256(data).hexdigest()
        path = self._object(digest)
        if not (_has_size(path, len(data)) and self.holds(digest)):
            write_atomic(path, data)
        return digest

    def get(self, digest: str) -> bytes:
        """The bytes that hash to `digest`. They are hashed on every call.

        Raises:
            BundleMissing: no such object.
            BundleCorrupt: the file's bytes hash to something else.
            StoreError: the file cannot be read.
        """
        if not DIGEST.fullmatch(digest):
            raise BundleMissing(
                "a sha256 as the name of an object", repr(digest), "name it by 64 lower-case hex digits"
            )
        path = self._object(digest)
        with open_regular(path, "object") as (file, _):
            data = file.readall()
        if hashlib.sha256(data).hexdigest() != digest:
            raise BundleCorrupt(
                f"object {path} is damaged: its bytes do not hash to its name", hint="build again: it is made anew"
            )
        return data

    def holds(self, digest: str) -> bool:
        """Whether `get` would give the bytes of `digest`. They are hashed on every call."""
        try:
            self.get(digest)
        except StoreError:
            return False
        return True

    def put_record(self, kind: str, key: str, value: dict[str, Any]) -> None:
        """Store `value`, which must be plain JSON, under `kind` and `key`. An older record is replaced.

        Raises:
            StoreUnwritable: no space, no permission, ...
            StoreError: `kind` or `key` cannot be a file name.
            TypeError, ValueError: `value` is not plain JSON.
        """
        path = self._record(kind, key)
        sealed = {"sha256": _seal(kind, key, value), "facts": value}
        text = json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False)
        write_atomic(path, text.encode("ascii") + b"\n")

    def get_record(self, kind: str, key: str) -> dict[str, Any] | None:
        """The record under `kind` and `key`, or None.

        A record only saves work, so one that cannot be read, or was not written under this kind and key, counts as absent.

        Raises:
            StoreError: `kind` or `key` cannot be a file name.
        """
        path = self._record(kind, key)
        try:
            with open_regular(path) as (file, _):
                value = facts_in(file.readall(), kind, key)
                if value is not None:
                    use.note(file.fileno())
        except StoreError:
            return None
        return value

    def fetch(self, kind: str, keys: Collection[str], named: Named) -> None:
        """Make ready what is asked for next; nothing where the store has only its folder (see `remote.shared_store`)."""

    def in_use(self) -> AbstractContextManager[None]:
        """Inside, no housekeeping (`store.gc`) removes anything. Every build is inside for its whole life."""
        return use.shared(self.root)

    @contextmanager
    def writer(self, timeout: float = -1) -> Iterator[None]:
        """Lock the store against other writers (threads and processes). Readers are not affected.

        `put` and `put_record` are safe without it: it is for work that must not be done twice, and for removing files.
        The thread that holds it may enter again. The system frees it when the holder dies.

        Args:
            timeout: seconds to wait for the current holder; negative waits forever.

        Raises:
            StoreUnwritable: the lock cannot be made, or is still held after `timeout`.
        """
        # Imported here because readers need no lock, and this import is slower than reading a bundle.
        from filelock import FileLock, Timeout

        path = self.root / ".lock"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            # One instance per path and process, so that a thread that holds the lock can enter again instead of waiting
            # for itself: a file lock is bound to a descriptor, not to a thread.
            lock = FileLock(path, is_singleton=True)
            lock.acquire(timeout=timeout)
        except Timeout as error:
            what = f"cannot lock {path}: another writer has held the lock for {timeout:g} s"
            raise StoreUnwritable(what, hint="wait for that process, or end it") from error
        except OSError as error:
            raise unwritable(path, error) from error
        try:
            yield
        finally:
            lock.release()

    def check_writable(self) -> None:
        """Check that this process can write here, before the work whose result would be lost.

        Raises:
            StoreUnwritable: no space, no permission, a read-only file system, ...
        """
        probe_writable(self.root)  # the lock goes there
        probe_writable(self._home)

    def _object(self, digest: str) -> Path:
        return self._home / "objects" / digest[:2] / digest

    def _record(self, kind: str, key: str) -> Path:
        for name in (kind, key):
            if not _NAME.fullmatch(name):
                hint = "use up to 200 letters, digits, '.', '_' and '-'"
                raise StoreError("a file name as a record's kind or key", repr(name), hint)
        return self._home / "records" / kind / f"{key}.json"


def facts_in(data: bytes, kind: str, key: str) -> dict[str, Any] | None:
    """What a record's bytes say; None if they are damaged, or were not written under this kind and key."""
    try:
        sealed = json.loads(data.decode("ascii"))
        value = sealed["facts"]
        if isinstance(value, dict) and sealed["sha256"] == _seal(kind, key, value):
            return value
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return None


def _seal(kind: str, key: str, value: Mapping[str, Any]) -> str:
    """The hash in a record. With its kind and key, so that a record in another's place does not pass."""
    text = json.dumps([kind, key, value], sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def _has_size(path: Path, size: int) -> bool:
    """Whether `path` is a regular file of `size` bytes. A link does not count, and `put` replaces it."""
    try:
        status = path.lstat()
    except OSError:  # if something is wrong, the write will report it
        return False
    return stat.S_ISREG(status.st_mode) and status.st_size == size
