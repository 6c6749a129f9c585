"""Atomic writes and safe reads of whole files.

A file is written under a temporary name, flushed to disk and then renamed, so that a reader sees the old or the new bytes
and never a part of them, even if the writer is killed. A killed writer leaves a file named `.<32 hex digits>.tmp`, which no
reader looks at. While it is written it is locked, so that `is_abandoned` can tell.
"""

from __future__ import annotations

import errno
import fcntl
import io
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aot_cache.errors import BundleCorrupt, BundleMissing, StoreError, StoreUnwritable
from aot_cache.files.mounts import unseen_locks

PROBE_BYTES = 4096
TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp", re.ASCII)
"""Names of files that are being written, or whose writer was killed."""
_PIECE = 1 << 20  # bytes

# errno -> (reason, hint)
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

# Some network and FUSE file systems cannot flush a folder; the rename still works there.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP, errno.ENOSYS})


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path`. After a crash at any moment the file has its old bytes or all of the new ones.

    Missing folders are made. Permissions are 0644 minus the umask. A symbolic link at `path` is replaced, not followed.

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


def move_atomic(source: Path, path: Path) -> None:
    """Give a file another name on the same file system. After a crash at any moment `path` has its old bytes or all of the new
    ones. A symbolic link at `path` is replaced, not followed.

    Raises:
        StoreUnwritable: like `write_atomic`.
    """
    try:
        descriptor = os.open(source, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # a power loss may otherwise leave the new name with other bytes
        finally:
            os.close(descriptor)
        os.replace(source, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise unwritable(path, error) from error


def copy_atomic(source: Path, path: Path) -> None:
    """Like `write_atomic`, with the bytes of a file that may be larger than the memory.

    Raises:
        StoreUnwritable: like `write_atomic`.
    """
    temporary = _temporary_name(path.parent)
    try:
        _make_folder(path.parent)
        with source.open("rb") as read, temporary.open("xb") as file:
            _lock(file.fileno())
            while piece := read.read(_PIECE):
                file.write(piece)
        move_atomic(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def probe_writable(folder: Path) -> None:
    """Write and remove a small file in `folder`, which is made if it is missing.

    Checking permission bits is not enough: root ignores them, and they do not show a full or read-only file system.

    Raises:
        StoreUnwritable: like `write_atomic`.
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
    """The error to raise when a write at `path` failed with `error`."""
    default = (error.strerror or str(error), "choose another folder")
    why, hint = _REASONS.get(error.errno or 0, default)
    return StoreUnwritable(f"cannot write {path}: {why}", hint=hint)


@contextmanager
def open_regular(path: Path, what: str = "bundle") -> Iterator[tuple[io.FileIO, int]]:
    """Open a regular file for reading; yields the unbuffered file and its size in bytes.

    A folder, pipe or device is refused without blocking. Symbolic links are followed, because the content is checked by its
    hash, not by its name.

    Raises:
        BundleMissing: there is no file.
        BundleCorrupt: it is not a regular file.
        StoreError: it cannot be read, for example because of its permissions.
    """
    # O_NONBLOCK: without it, opening a named pipe that has no writer would block forever.
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
    # Imported here so that a process that only reads does not pay for it (it imports platform and re).
    from uuid import uuid4

    # Random, not the process id: containers and hosts that share a folder can have the same ids.
    return folder / f".{uuid4().hex}.tmp"


def _write_new(path: Path, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o644)  # the kernel applies the umask
    try:
        _lock(descriptor)
        rest = memoryview(data)
        while rest:  # one call writes at most 2 GiB, and less on a disk that is nearly full
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    with suppress(OSError):  # a file system without locks: then only its age tells
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # exclusive: NFS gives no other to who may only write


def is_abandoned(temporary: Path) -> bool:
    """Whether nobody writes this temporary file any more: its writer was killed. False where locks cannot tell.

    The file must be older than a writer needs from making to locking it, and from unlocking to renaming it.
    """
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:  # it is gone, or somebody else's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return not unseen_locks(temporary.parent)


def _make_folder(folder: Path) -> None:
    if folder.is_dir():
        return
    if folder.parent != folder:
        _make_folder(folder.parent)
    try:
        folder.mkdir()
    except FileExistsError:
        if not folder.is_dir():  # if it is one, another writer made it first
            raise
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Flush the names in `folder` to disk: otherwise a power loss can undo a rename, although the bytes are on disk."""
    if os.name == "nt":  # folders cannot be opened there
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # a folder may be writable and not readable
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)
