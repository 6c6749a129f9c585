"""What comes from elsewhere, until it is checked: in a hidden folder beside its place, and then renamed.

    OUT/.aot-cache-pull/lock       one pull at a time into a folder
    OUT/.aot-cache-pull/ID.part    the first bytes of what ID names; the next pull of ID goes on from there
    OUT/.aot-cache-pull/ID/        what was unpacked of it

A pull that ends leaves none of it, whether the bytes were right or wrong; one that is interrupted leaves the `.part`.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from aot_cache.errors import RemoteDenied, RemoteError, RemoteMissing, StoreUnwritable
from aot_cache.remote import Progress
from aot_cache.store.atomic import unwritable

FOLDER = ".aot-cache-pull"
_TRIES = 3
_PIECE = 1 << 20  # bytes


@dataclass(frozen=True)
class Blob:
    """Bytes that are elsewhere.

    Args:
        id: names them, and no other bytes: 64 hex digits.
        size: how many there are.
        read: the bytes from an offset on. May raise RemoteError, and may then be asked again.
    """

    id: str
    size: int
    read: Callable[[int], Iterator[bytes]]


class Incoming:
    """The hidden folder. Made by `into`."""

    def __init__(self, out: Path) -> None:
        self.out, self._folder = out, out / FOLDER

    def room(self, size: int) -> None:
        """Raises StoreUnwritable if there is no space for `size` bytes."""
        free = shutil.disk_usage(self.out).free
        if size > free:
            found = f"{free:,} bytes"
            raise StoreUnwritable(
                f"{size:,} free bytes in {self.out}", found, "free some space or choose another folder"
            )

    @contextmanager
    def unpacked(self, id: str) -> Iterator[Path]:
        """A folder that is there while what came is checked."""
        folder = self._folder / id
        shutil.rmtree(folder, ignore_errors=True)  # of a pull that was killed
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def fetched(self, blob: Blob, is_right: Callable[[Path], bool], progress: Progress) -> Iterator[tuple[Path, bool]]:
        """A file with the blob, and whether `is_right` says so of it. It is gone afterwards, right or wrong.

        Bytes that an earlier pull has left may be damaged: if the whole is not right, it is fetched once more from the start.

        Raises:
            RemoteError: the bytes do not come. Those that have come stay, for the next pull.
            StoreUnwritable: they cannot be written.
        """
        part = self._folder / f"{blob.id}.part"
        left = part.stat().st_size if part.exists() else 0
        try:
            self._fetch(blob, part, progress)
            right = is_right(part)
            if left and not right:
                part.unlink()
                self._fetch(blob, part, progress)
                right = is_right(part)
        except OSError as error:
            raise unwritable(part, error) from error
        try:
            yield part, right
        finally:
            part.unlink(missing_ok=True)

    def _fetch(self, blob: Blob, part: Path, progress: Progress) -> None:
        tries = _TRIES
        self.room(blob.size - (part.stat().st_size if part.exists() else 0))
        with part.open("ab", buffering=0) as file:
            here = file.tell()
            if here > blob.size:
                here = file.truncate(0)
            while here < blob.size:
                began = here
                try:
                    for piece in blob.read(here):
                        file.write(piece[: blob.size - here])
                        here = file.tell()
                        progress(here)
                    if here < blob.size:
                        raise RemoteError(
                            f"{blob.size:,} bytes of {blob.id[:16]}", f"{here:,}", "pull it again to go on"
                        )
                except (RemoteDenied, RemoteMissing):
                    raise
                except RemoteError:
                    tries = _TRIES if here > began else tries - 1
                    if not tries:
                        raise


@contextmanager
def into(out: Path) -> Iterator[Incoming]:
    """The hidden folder of `out`, alone. Both are made if they are missing.

    Raises:
        StoreUnwritable: no permission, no space, ...
    """
    from filelock import FileLock

    folder = out / FOLDER
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(folder / "lock")
            lock.acquire()
        except FileNotFoundError:  # the pull before this one has just removed the folder
            continue
        except OSError as error:
            raise unwritable(folder, error) from error
        break
    try:
        yield Incoming(out)
    finally:
        # While it is held: who waits for it sees that the file has gone, and makes a new one.
        if not any(folder.glob("*.part")):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        with suppress(OSError):
            folder.rmdir()


def sha256(path: Path) -> str:
    """The sha256 of a file, as 64 hex digits."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            found.update(piece)
    return found.hexdigest()
