"""Temporary folders that show whether their process lives: it has a lock (`flock`) on the folder itself.

A process that is killed leaves its folders behind, and the kernel frees the lock. `abandoned` finds them.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aot_cache.files.mounts import unseen_locks

PREFIX = "aot-cache-"
_RUN = f"{PREFIX}run-"
_NEW = f"{PREFIX}new-"
"""Until it is locked, a folder has this name, so that nobody takes it for abandoned. Both are of one length."""


def make() -> tuple[Path, int]:
    """(a new private folder in the temporary folder, the descriptor whose closing says that it is not used any more).

    Raises:
        OSError: no space, no permission, ...
    """
    new = Path(tempfile.mkdtemp(prefix=_NEW))
    file = os.open(new, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with suppress(OSError):  # a file system without locks: then it is never taken for abandoned
        fcntl.flock(file, fcntl.LOCK_SH)
    folder = new.with_name(new.name.replace(_NEW, _RUN, 1))
    new.rename(folder)
    return folder, file


@contextmanager
def folder() -> Iterator[Path]:
    """A new private folder, which is removed when the block ends.

    Raises:
        OSError: no space, no permission, ...
    """
    path, file = make()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(file)


@contextmanager
def abandoned() -> Iterator[list[Path]]:
    """The folders of this user's dead processes. Inside the block, no other process takes them for abandoned."""
    files: list[int] = []
    try:
        yield [path for path in _folders() if _is_abandoned(path, files)]
    finally:
        for file in files:
            os.close(file)


def _folders() -> list[Path]:
    place = Path(tempfile.gettempdir())
    return [] if unseen_locks(place) else sorted(place.glob(f"{_RUN}*"))


def _is_abandoned(path: Path, files: list[int]) -> bool:
    """Whether no process has a lock on the folder. This process then has it, through one more of `files`."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:  # somebody else's, or no folder
        return False
    files.append(file)
    status = os.fstat(file)
    if status.st_uid != os.geteuid() or not stat.S_ISDIR(status.st_mode):
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is in use, or there are no locks
        return False
    return True
