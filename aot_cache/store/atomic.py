"""Whole files in, whole files out.

A file is written under another name, flushed to the disk and then renamed, so that a reader sees the old bytes or the
new bytes and never a part of them, also when the writer is killed. What a killed writer leaves behind is a file named
`.<32 hex digits>.tmp`, which no reader looks at.
"""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aot_cache.errors import BundleCorrupt, BundleMissing, StoreError, StoreUnwritable

PROBE_BYTES = 4096

# errno -> (what was found, what to do about it)
_REASONS = {
    errno.ENOSPC: ("no space is left on that file system", "free some space or choose another folder"),
    errno.EDQUOT: ("the disk quota is used up", "free some space or choose another folder"),
    errno.EFBIG: ("the file would be larger than this process may write", "raise the limit on file size (ulimit -f)"),
    errno.EACCES: ("this user has no permission to write there", "change the permissions or choose another folder"),
    errno.EPERM: ("this user is not allowed to write there", "change the permissions or choose another folder"),
    errno.EROFS: ("that file system is read-only", "choose a folder that can be written"),
    errno.ENOTDIR: ("a part of that path is a file, not a folder", "remove that file or choose another folder"),
    errno.EEXIST: ("a file is where a folder is needed", "remove that file or choose another folder"),
    errno.EISDIR: ("a folder is in the file's place", "remove that folder or choose another name"),
    errno.ENAMETOOLONG: ("the name is too long for that file system", "choose a shorter name"),
    errno.ELOOP: ("the path is a circle of symbolic links", "remove the links or choose another folder"),
}

# Some network and FUSE file systems cannot flush a folder; the rename is done all the same.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`: after a crash at any moment the file has its old bytes or all of the new ones.

    Missing folders are made. The permissions are 0644 less the umask. A symbolic link at `path` is replaced, never
    followed.

    Raises:
        StoreUnwritable: no space, no permission, a read-only file system, a file where a folder is needed, ...
    """
    temporary = _temporary_name(path.parent)
    try:
        _make_folder(path.parent)
        try:
            _write_new(temporary, data)
            os.replace(temporary, path)
        except BaseException:  # an interrupt leaves nothing behind either
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def probe_writable(folder: Path) -> None:
    """Write and remove a small file in `folder`, which is made if it is missing.

    Asking for permission bits would not do: root passes them, and a full or read-only file system has them too.

    Raises:
        StoreUnwritable: as `write_atomic`.
    """
    temporary = _temporary_name(folder)
    try:
        _make_folder(folder)
        try:
            _write_new(temporary, bytes(PROBE_BYTES))
        finally:
            with suppress(FileNotFoundError):
                temporary.unlink()
    except OSError as error:
        raise unwritable(folder, error) from error


def unwritable(path: Path, error: OSError) -> StoreUnwritable:
    """The error to raise when the system's `error` kept something from being written at `path`."""
    default = (error.strerror or str(error), "choose another folder")
    why, hint = _REASONS.get(error.errno or 0, default)
    return StoreUnwritable(f"cannot write {path}: {why}", hint=hint)


@contextmanager
def open_regular(path: Path, what: str = "bundle") -> Iterator[tuple[io.FileIO, int]]:
    """Open an ordinary file for reading; yields the unbuffered file and its size in bytes.

    A folder, pipe or device is refused without waiting on it. Symbolic links are followed: what is read is judged by
    its hash, not by its name.

    Raises:
        BundleMissing: nothing is there.
        BundleCorrupt: something is there that is no ordinary file.
        StoreError: it cannot be read, for example for want of permission.
    """
    # O_NONBLOCK: opening a named pipe that nobody writes would otherwise wait for ever.
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0)
    try:
        descriptor = os.open(path, flags)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise BundleCorrupt(
                    f"{path} is a folder, pipe or device, not a file", hint=f"name the file of a {what}"
                )
            with io.FileIO(descriptor, "r", closefd=False) as file:
                yield file, status.st_size
        finally:
            os.close(descriptor)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise BundleMissing(f"no {what} at {path}", hint="build it, or correct the path") from error
    except OSError as error:
        why = error.strerror or str(error)
        raise StoreError(f"cannot read {path}: {why}", hint="make it readable for this user") from error


def _temporary_name(folder: Path) -> Path:
    # Imported here because a process that only reads need not pay for it (it pulls in platform and re).
    from uuid import uuid4

    # Unique by chance, not by process id: containers and hosts that share a folder have the same ids.
    return folder / f".{uuid4().hex}.tmp"


def _write_new(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o644)  # the kernel takes the umask off
    try:
        rest = memoryview(data)
        while rest:  # one call writes 2 GiB at most, and less on a disk that is nearly full
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():  # else another writer was faster
            raise
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` last: without it a rename can be lost with the power, though the bytes are there."""
    if os.name == "nt":  # folders cannot be opened there
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # one may write into a folder and not list it
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
