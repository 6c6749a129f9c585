"""A folder through fsspec: on this machine, or in an object store with the package that it needs (s3fs, gcsfs, adlfs)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aot_cache.errors import AotCacheError, RemoteDenied, RemoteError, RemoteMissing, StoreUnwritable, one_line
from aot_cache.remote import INSTALL, Progress
from aot_cache.store.atomic import copy_atomic, write_atomic

_PIECE = 8 << 20  # bytes; each is a request of its own
_PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}


class RemoteFolder:
    """A folder of whole files. A file appears with all its bytes or not at all: object stores put so, and here it is renamed.

    Args:
        url: the folder's URL.

    Raises:
        RemoteError: fsspec or the package for this kind of URL is not installed, or nothing knows it.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        scheme = url.partition("://")[0]
        try:
            import fsspec
        except ImportError as error:
            raise RemoteError(f"{scheme}:// needs the package fsspec", hint=INSTALL) from error
        with self._said("open", url):
            try:
                self._files, self._root = fsspec.core.url_to_fs(url)
            except ImportError as error:
                package = _PACKAGES.get(scheme, "for it")
                hint = f"{INSTALL} {package}" if scheme in _PACKAGES else str(error)
                raise RemoteError(f"{scheme}:// needs the package {package}", hint=hint) from error
            except ValueError as error:
                hint = "file://, s3://, gs:// and az:// are known, and oci:// for registries"
                raise RemoteError(f"nothing here knows {scheme}://", hint=hint) from error
        self._local = scheme in ("file", "local")

    def names(self) -> list[str]:
        """Names of the folder's files, in order.

        Raises:
            RemoteMissing: there is no such folder.
            RemoteError: it cannot be read.
        """
        with self._said("read", self.url):
            self._files.invalidate_cache()
            found = self._files.ls(self._root, detail=True)
        return sorted(one["name"].rpartition("/")[2] for one in found if one["type"] == "file")

    def size(self, name: str) -> int:
        """Bytes of a file. Raises RemoteMissing, RemoteError."""
        with self._said("read", self._of(name)):
            self._files.invalidate_cache()
            return int(self._files.info(self._path(name))["size"])

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes of a file. Raises RemoteMissing, RemoteError."""
        with self._said("read", self._of(name)):
            data: bytes = self._files.cat_file(self._path(name), start=begin or None, end=end)
        return data

    def read_all(self, names: Sequence[str]) -> dict[str, bytes]:
        """The bytes of those small files that exist, by name. Raises RemoteError."""
        with self._said("read", self.url):
            paths = {self._path(name): name for name in names}
            found = self._files.cat([*paths], recursive=False, on_error="return") if paths else {}
            for answer in found.values():
                if isinstance(answer, Exception) and not isinstance(answer, (FileNotFoundError, IsADirectoryError)):
                    raise answer
            return {paths[path]: answer for path, answer in found.items() if isinstance(answer, bytes)}

    def pieces(self, name: str, begin: int, end: int) -> Iterator[bytes]:
        """The same, piece by piece. Another file of this name may come in between: check what was read."""
        while begin < end:
            data = self.read(name, begin, min(begin + _PIECE, end))
            yield data
            if not data:
                return
            begin += len(data)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file. Raises RemoteError."""
        with self._said("write", self._of(name)):
            if self._local:
                write_atomic(Path(self._path(name)), data)
            else:
                self._files.pipe_file(self._path(name), data)

    def send(self, name: str, source: Path, progress: Progress) -> None:
        """Write a file. Raises RemoteError."""
        with self._said("write", self._of(name)):
            if self._local:
                copy_atomic(source, Path(self._path(name)))
                progress(source.stat().st_size)
            else:
                self._files.put_file(str(source), self._path(name), callback=_callback(progress))

    def remove(self, name: str) -> None:
        """Remove a file, if it is there. Raises RemoteError."""
        with self._said("write", self._of(name)):
            if self._files.exists(self._path(name)):
                self._files.rm_file(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _of(self, name: str) -> str:
        return f"{self.url}/{name}"

    @contextmanager
    def _said(self, what: str, where: str) -> Iterator[None]:
        """Any error of a file system as one of ours."""
        try:
            yield
        except AotCacheError as error:
            if isinstance(error, StoreUnwritable):
                raise RemoteError(error.message, hint=error.hint) from error
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            raise RemoteMissing(f"there is nothing at {where}", hint="check the name") from error
        except PermissionError as error:
            hint = "give credentials in the object store's own way (such as AWS_PROFILE), as one who may do that"
            raise RemoteDenied(f"cannot {what} {where}: permission denied", hint=hint) from error
        except Exception as error:  # each store has errors of its own, without a common base
            if isinstance(error, OSError) and error.strerror and self._local:
                raise RemoteError(f"cannot {what} {where}: {error.strerror}", hint="choose another folder") from error
            if "Credential" in type(error).__name__:
                hint = "give credentials in the object store's own way (such as AWS_PROFILE)"
                raise RemoteDenied(f"cannot {what} {where}: there are no credentials", hint=hint) from error
            raise RemoteError(
                f"cannot {what} {where}: {one_line(error)}", hint="check the name and the network"
            ) from error


def _callback(progress: Progress) -> Any:
    from fsspec.callbacks import Callback

    class Told(Callback):  # type: ignore[misc]  # fsspec has no types
        def call(self, *_: object, **__: object) -> None:
            progress(self.value)

    return Told()
