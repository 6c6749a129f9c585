"""A store that builders on many machines share: a folder here, and behind it one in an object store, laid out in the same way.

Only what is worth the way is shared: records of compiled kernels, launchers and graphs, and the objects that these name. Stamps
and engine starts name paths of one machine.

What comes from there is hostile until it is checked: a record must hash to what it says, an object to its name. What is damaged
there counts as absent: it is made again, and written over. Whoever may write there may also write other code with a right hash:
see docs/sharing.md.

Objects are written before the record that names them, and each name has one content, so that many may write at the same time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from aot_cache.artifact.key import GRAPHS, NATIVE, UNITS
from aot_cache.errors import RemoteError, StoreError
from aot_cache.remote.folders import RemoteFolder
from aot_cache.store import Store
from aot_cache.store.objects import DIGEST, LAYOUT, Named, facts_in

SHARED = frozenset({UNITS, NATIVE, GRAPHS})
"""Kinds of records that are shared."""

_LOG = logging.getLogger(__name__)
_AT_ONCE = 64  # files; some object stores answer them side by side


def open_store(root: str | Path, remote: str | None) -> Store:
    """The store in the folder `root`, shared through the folder at the URL `remote` if there is one."""
    return SharedStore(root, remote) if remote else Store(root)


class SharedStore(Store):
    """A store with another one behind it. Without that one it goes on as a `Store`, and `problem` says why.

    Children that are forked use the folder here only: the clients of object stores do not survive a fork.

    Args:
        root: the folder here.
        remote: URL of the folder there.
    """

    def __init__(self, root: str | Path, remote: str) -> None:
        super().__init__(root)
        self._there: RemoteFolder | None = None
        try:
            self._there = RemoteFolder(remote)
        except RemoteError as error:
            self._give_up(error)

    def check_remote(self) -> None:
        """Find out whether the folder there answers, before the work that relies on it. `problem` says if it does not."""
        self._read([f"{LAYOUT}/records/units/none.json"])

    def fetch(self, kind: str, keys: Collection[str], named: Named) -> None:
        """Copy records, and the objects that they name, from there to here where they are missing or damaged here, and from here
        to there where a record is missing or damaged there.

        Args:
            named: digests of the objects that a record names.
        """
        if kind not in SHARED or self._there is None or not keys:
            return
        names = {key: self._name(self._record(kind, key)) for key in keys}
        found = self._read([*names.values()])
        there = {key: facts_in(found.get(name, b""), kind, key) for key, name in names.items()}
        here = {key: self.get_record(kind, key) for key in keys}
        lacking: set[str] = set()
        for key in keys:
            record = here[key] or there[key]
            try:
                lacking |= (
                    {digest for digest in named(record) if not self.holds(digest)} if record is not None else set()
                )
            except (KeyError, TypeError, ValueError, AttributeError):  # it has a right seal, and another form
                there[key] = None
        self._fetch_objects(sorted(lacking))
        for key in keys:
            mine, theirs = here[key], there[key]
            if mine is None and theirs is not None:
                super().put_record(kind, key, theirs)  # whether its objects have come, the builder asks anyway
            elif mine is not None and theirs is None:
                self._publish(kind, key, mine)

    def put_record(self, kind: str, key: str, value: dict[str, Any]) -> None:
        super().put_record(kind, key, value)
        if kind in SHARED:
            self._publish(kind, key, value)

    def _fetch_objects(self, digests: Sequence[str]) -> None:
        names = {digest: self._name(self._object(digest)) for digest in digests if DIGEST.fullmatch(digest)}
        for begin in range(0, len(digests), _AT_ONCE):  # not all at once: they may be larger than the memory
            part = digests[begin : begin + _AT_ONCE]
            found = self._read([names[digest] for digest in part if digest in names])
            for digest in part:
                data = found.get(names.get(digest, ""), b"")
                if hashlib.sha256(data).hexdigest() == digest:
                    self.put(data)

    def _publish(self, kind: str, key: str, record: Mapping[str, Any]) -> None:
        """Copy a record, and first its objects, from here to there."""
        try:
            for digest in sorted({*_digests(record)}):
                if self.holds(digest):  # a record may also have digests that are no object's name
                    self._write(self._object(digest), self.get(digest))
            path = self._record(kind, key)
            self._write(path, path.read_bytes())
        except (StoreError, OSError):  # another process removes what is here: the build that needs it will say so
            return

    def _read(self, names: Sequence[str]) -> dict[str, bytes]:
        """The bytes of those files there that exist."""
        found: dict[str, bytes] = {}
        for begin in range(0, len(names), _AT_ONCE):
            if self._there is not None:
                try:
                    found |= self._there.read_all(names[begin : begin + _AT_ONCE])
                except RemoteError as error:
                    self._give_up(error)
        return found

    def _write(self, path: Path, data: bytes) -> None:
        if self._there is not None:
            try:
                self._there.write(self._name(path), data)
            except RemoteError as error:
                self._give_up(error)

    def _give_up(self, error: RemoteError) -> None:
        """Once, and not at every file: each would wait for the same time limit."""
        self._there, self.problem = None, f"the remote store is not used any more: {error.message}"
        _LOG.warning("%s", self.problem)

    def _name(self, path: Path) -> str:
        return str(path.relative_to(self.root))


def _digests(value: object) -> Iterator[str]:
    if isinstance(value, str):
        if DIGEST.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _digests(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _digests(inner)
