"""Who uses a store: builds share it for their whole life, and housekeeping has it alone.

The lock is the kernel's (`flock`), which frees it when its holder dies. It needs no file with process ids that may be wrong.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from aot_cache.errors import StoreInUse, StoreUnwritable
from aot_cache.files.mounts import unseen_locks
from aot_cache.store.atomic import unwritable

FILE = ".use"
PRECISION = 60.0
"""Seconds. A use is noted only if the last note is older: on a network file system, each note is a request."""
_POLL = 0.1


@contextmanager
def shared(root: Path) -> Iterator[None]:
    """Inside, no housekeeping removes anything from the store at `root`. Waits for one that is running.

    Where no lock can be taken (a read-only folder, a file system without locks), the block runs without one: `alone` cannot take
    it there, either.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = os.open(root / FILE, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_SH)
        yield
    finally:
        os.close(file)


@contextmanager
def alone(root: Path, wait: float = 0.0) -> Iterator[None]:
    """Inside, nobody builds with the store at `root`.

    Args:
        wait: seconds to wait for those that do.

    Raises:
        StoreInUse: somebody still does.
        StoreUnwritable: there are no locks that other hosts would see, no permission, ...
    """
    why = unseen_locks(root)
    if why:
        raise StoreUnwritable(f"cannot lock {root}: {why}", hint="run it on the machine that has the disk")
    path = root / FILE
    try:
        # Writable, because NFS takes an exclusive lock for such a file only.
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise unwritable(path, error) from error
    try:
        until = time.monotonic() + wait
        while not _locked(file, path):
            if time.monotonic() >= until:
                users = ", ".join(holders(file)) or "a process of another host or container"
                hint = "wait for it (--wait SECONDS), or end it"
                raise StoreInUse(f"the store {root} is in use by {users}", hint=hint)
            time.sleep(_POLL)
        yield
    finally:
        os.close(file)


def _locked(file: int, path: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        hint = "run it on the machine that has the disk"
        raise StoreUnwritable(f"cannot lock {path}: {error.strerror or error}", hint=hint) from error
    return True


def users(root: Path) -> list[str]:
    """The processes of this host that use the store at `root`."""
    try:
        file = os.open(root / FILE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return []
    try:
        return holders(file)
    finally:
        os.close(file)


def holders(file: int) -> list[str]:
    """The processes of this host with a lock on an open file, each as its number and command line. Source: proc_locks(5)."""
    inode = str(os.fstat(file).st_ino)
    try:
        rows = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return []
    # The device is not compared: an overlay's is another one in /proc.
    found = {int(row[4]) for row in rows if row[1] == "FLOCK" and row[5].rpartition(":")[2] == inode}
    return [f"process {pid}{_command(pid)}" for pid in sorted(found) if pid > 0 and pid != os.getpid()]


def _command(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
    return f" ({words[:100]})" if words else ""


def note(file: int | Path) -> None:
    """Note in a file's time of change that it is used now. Without permission to do so, nothing happens."""
    with suppress(OSError):
        if time.time() - os.stat(file).st_mtime > PRECISION:
            os.utime(file)
