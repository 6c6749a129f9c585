"""Housekeeping: what of a store nobody needs any more, and its removal.

What can go are records, with the objects that no other record names, and on request bundles. When a record was used last is its
file's time of change (`Store.get_record` sets it); a bundle's is when it was written, or found by a build that had nothing to do.
What a bundle in the store names was used as recently as that bundle, and stays as long as it does.

The order makes it safe to be killed at any moment: first what names objects, then the objects that nothing names.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from aot_cache.errors import StoreError
from aot_cache.files import scratch
from aot_cache.store.atomic import TEMPORARY, is_abandoned, unwritable
from aot_cache.store.bundle import read_bundle
from aot_cache.store.objects import DIGEST, LAYOUT, facts_in

HOUR, DAY = 3600.0, 86400.0
OLD_LAYOUT_DAYS = 30
_JUST_MADE = 10.0
"""Seconds. A file that was written to so recently may be one that its writer has not locked yet, or is about to rename."""
Progress = Callable[[str, int, int], None]
What = Literal["records", "objects", "bundles", "engine starts", "partial files", "old layouts", "temporary folders"]

_NAMED = re.compile(rb"(?<![0-9a-f])[0-9a-f]{64}(?![0-9a-f])")
"""Whatever looks like an object's name in a record keeps that object: what records mean is known to their writers only."""
_LAYOUT = re.compile(r"v(\d+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What may stay.

    Args:
        max_size: bytes of records, objects and engine starts, and with `bundles` of these; the least recently used go.
        older_than: seconds; what was not used for longer goes.
        keep: patterns (`fnmatch`) of names, or of paths in the store, that stay.
        bundles: whether bundles can go, too.
    """

    max_size: int | None = None
    older_than: float | None = None
    keep: Sequence[str] = ()
    bundles: bool = False


@dataclass(frozen=True)
class Removal:
    """Files (or folders) that go for one reason, and the bytes in them."""

    what: What
    why: str
    paths: tuple[Path, ...]
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What goes, in the order in which it goes, and what stays.

    Args:
        kept: kind of what stays → number.
        kept_bytes: their bytes.
        notes: what a person should know about it.
    """

    removals: tuple[Removal, ...]
    kept: Mapping[str, int]
    kept_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """A record, a bundle or an engine's start: the files that go together, and the objects that they name.

    Args:
        used: seconds since the epoch; infinity if it must stay.
        damaged: whether nothing can be made of it, so that it names nothing.
    """

    what: What
    paths: tuple[Path, ...]
    bytes: int
    used: float
    names: frozenset[str] = frozenset()
    damaged: bool = False


@dataclass
class _Found:
    """What is in a store."""

    entries: list[_Entry] = field(default_factory=list)
    objects: dict[str, tuple[Path, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


# --- what goes --------------------------------------------------------------------------------------------------------


def plan(root: Path, limits: Limits, progress: Progress = lambda *_: None) -> Plan:
    """What can be removed from the store at `root`, and what killed processes have left there and in the temporary folder.

    Only inside of `use.alone` does it stay true.

    Raises:
        StoreError: a file cannot be read.
    """
    now = time.time()
    found = _look(root, limits, progress)
    stay, go = _divided(found, limits, now)
    named = {name for entry in stay for name in entry.names}
    unnamed = [place for name, place in sorted(found.objects.items()) if name not in named]
    sizes = {name: size for name, (_, size) in found.objects.items()}
    kept_bytes = sum(entry.bytes for entry in stay if entry.what != "bundles" or limits.bundles)
    kept_bytes += sum(sizes.get(name, 0) for name in named)
    notes = list(found.notes)
    if limits.max_size is not None and kept_bytes > limits.max_size:
        more = "bundles in the store name it (--bundles removes those, too), or --keep does"
        notes.append(f"more than --max-size stays: {more}")
    removals = [
        *_grouped(go),
        Removal("objects", "nothing names them", tuple(path for path, _ in unnamed), sum(size for _, size in unnamed)),
        *_leftovers(root, limits, now),
    ]
    kept: Counter[str] = Counter(entry.what for entry in stay)
    kept["objects"] = len(found.objects) - len(unnamed)
    return Plan(
        removals=tuple(removal for removal in removals if removal.paths),
        kept=dict(kept),
        kept_bytes=kept_bytes,
        notes=tuple(notes),
    )


def _look(root: Path, limits: Limits, progress: Progress) -> _Found:
    found = _Found()
    home = root / LAYOUT
    for path in _files(home / "objects"):
        if DIGEST.fullmatch(path.name):
            found.objects[path.name] = (path, _size(path))
    files = [path for path in _files(root / "bundles") if path.suffix == ".safetensors"]
    bundles = [_bundle(path, found.notes) for path in files]
    found.entries += [entry if limits.bundles else _forever(entry) for entry in bundles]
    found.entries += _starts(root / "starts")
    records = [path for path in _files(home / "records") if path.suffix == ".json"]
    for done, path in enumerate(records, 1):
        found.entries.append(_record(path))
        if done == len(records) or done % 1000 == 0:
            progress("look at records", done, len(records))
    found.entries = [
        _forever(entry) if any(_is_kept(path, root, limits) for path in entry.paths) else entry
        for entry in found.entries
    ]
    return found


def _record(path: Path) -> _Entry:
    status = path.lstat()
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    if facts_in(data, path.parent.name, path.stem) is None:
        return _Entry("records", (path,), status.st_size, status.st_mtime, damaged=True)
    names = frozenset(name.decode() for name in _NAMED.findall(data))
    return _Entry("records", (path,), status.st_size, status.st_mtime, names)


def _bundle(path: Path, notes: list[str]) -> _Entry:
    """A bundle, and the record of its rehearsals. The plan beside it stays: it is kept like a lock file."""
    rest = tuple(path.parent.glob(f"{_literal(path.stem)}.rehearsed.json"))
    try:
        names = frozenset(map(str, read_bundle(path).manifest["objects"]))
    except StoreError as error:
        notes.append(f"what this bundle names is not known: {error.message}")
        names = frozenset()
    paths = (path, *rest)
    return _Entry("bundles", paths, sum(map(_size, paths)), path.lstat().st_mtime, names)


def _starts(folder: Path) -> Iterator[_Entry]:
    """What starts of an engine have found: a plan, and the engine's caches beside it."""
    for path in sorted(folder.glob("*.plan.json")):
        name = path.name.removesuffix(".plan.json")
        paths = (path, *folder.glob(f"{_literal(name)}.caches.safetensors"))
        yield _Entry("engine starts", paths, sum(map(_size, paths)), path.lstat().st_mtime)


def _divided(found: _Found, limits: Limits, now: float) -> tuple[list[_Entry], list[tuple[_Entry, str]]]:
    """(what stays, what goes and why)."""
    used: dict[str, float] = {}
    for entry in found.entries:
        if entry.what == "bundles":
            used.update({name: max(entry.used, used.get(name, 0.0)) for name in entry.names})
    last = {id(entry): max([entry.used, *(used.get(name, 0.0) for name in entry.names)]) for entry in found.entries}
    stay: list[_Entry] = []
    go: list[tuple[_Entry, str]] = []
    sizes = {name: size for name, (_, size) in found.objects.items()}
    counted: set[str] = set()
    total, full = 0, False
    # The latest first; of two that were used at one time, a bundle after the records that it keeps.
    for entry in sorted(found.entries, key=lambda entry: (-last[id(entry)], entry.what == "bundles", entry.paths)):
        must_stay = math.isinf(last[id(entry)])
        if entry.damaged and not must_stay:
            go.append((entry, "damaged"))
            continue
        if limits.older_than is not None and now - last[id(entry)] > limits.older_than:
            go.append((entry, "not used for longer than --older-than"))
            continue
        new = entry.names - counted
        more = entry.bytes if entry.what != "bundles" or limits.bundles else 0
        more += sum(sizes.get(name, 0) for name in new)
        full = full or (limits.max_size is not None and not must_stay and total + more > limits.max_size)
        if full and not must_stay:
            go.append((entry, "least recently used, beyond --max-size"))
            continue
        total += more
        counted |= new
        stay.append(entry)
    return stay, go


def _grouped(go: Iterable[tuple[_Entry, str]]) -> list[Removal]:
    groups: dict[tuple[What, str], list[_Entry]] = {}
    for entry, why in go:
        groups.setdefault((entry.what, why), []).append(entry)
    return [
        Removal(what, why, tuple(path for one in entries for path in one.paths), sum(one.bytes for one in entries))
        for (what, why), entries in groups.items()
    ]


# --- what killed processes have left ----------------------------------------------------------------------------------


def _leftovers(root: Path, limits: Limits, now: float) -> list[Removal]:
    home = root / LAYOUT
    # Only builds write there, and none is running. Elsewhere other commands may be writing a bundle.
    partial = [path for path in _files(home) if TEMPORARY.fullmatch(path.name)]
    for folder in (root, root / "bundles", root / "starts"):
        found = [path for path in _files(folder, deep=False) if TEMPORARY.fullmatch(path.name)]
        ages = {path: now - path.lstat().st_mtime for path in found}
        partial += [path for path, age in ages.items() if age > HOUR or (age > _JUST_MADE and is_abandoned(path))]
    with scratch.abandoned() as folders:
        temporary = tuple(folders)
    age = OLD_LAYOUT_DAYS * DAY if limits.older_than is None else limits.older_than
    layouts = [path for path in _old_layouts(root) if now - _newest(path) > age and not _is_kept(path, root, limits)]
    return [
        Removal("partial files", "their writer was killed", tuple(partial), sum(map(_size, partial))),
        Removal("old layouts", f"not written for {age / DAY:g} days", tuple(layouts), sum(map(_size_below, layouts))),
        Removal("temporary folders", "their process was killed", temporary, sum(map(_size_below, temporary))),
    ]


def _old_layouts(root: Path) -> list[Path]:
    """The folders of releases that laid the store out in another way. A newer release's are not touched."""
    here = int(LAYOUT[1:])
    numbers = {path: _LAYOUT.fullmatch(path.name) for path in sorted(root.glob("v*")) if path.is_dir()}
    return [path for path, number in numbers.items() if number is not None and int(number[1]) < here]


# --- removing it ------------------------------------------------------------------------------------------------------


def carry_out(plan: Plan, progress: Progress = lambda *_: None) -> None:
    """Remove what a plan says, in its order. Inside of `use.alone`.

    Raises:
        StoreUnwritable: no permission, a read-only file system, ... What was removed until then stays removed.
    """
    total = sum(len(removal.paths) for removal in plan.removals)
    done = 0
    for removal in plan.removals:
        if removal.what == "temporary folders":
            with scratch.abandoned() as folders:  # again: those that are still of dead processes
                for path in folders:
                    shutil.rmtree(path, ignore_errors=True)
            done += len(removal.paths)
            continue
        for path in removal.paths:
            try:
                if removal.what == "old layouts":
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            except OSError as error:
                raise unwritable(path, error) from error
            done += 1
            if done % 1000 == 0 or done == total:
                progress("remove", done, total)


# --- files ------------------------------------------------------------------------------------------------------------


def _files(folder: Path, deep: bool = True) -> Iterator[Path]:
    """The files in a folder, which need not exist, in the order of their names. Links are not followed."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise StoreError(f"cannot read {folder}: {error.strerror or error}") from error
    for entry in entries:
        if entry.is_file(follow_symlinks=False):
            yield Path(entry.path)
        elif deep and entry.is_dir(follow_symlinks=False):
            yield from _files(Path(entry.path))


def _size(path: Path) -> int:
    return path.lstat().st_size


def _size_below(folder: Path) -> int:
    return sum(map(_size, _files(folder)))


def _newest(folder: Path) -> float:
    return max((path.lstat().st_mtime for path in _files(folder)), default=folder.lstat().st_mtime)


def _literal(name: str) -> str:
    """A name as a pattern that matches only it."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _is_kept(path: Path, root: Path, limits: Limits) -> bool:
    inside = str(path.relative_to(root))
    return any(fnmatch(path.name, pattern) or fnmatch(inside, pattern) for pattern in limits.keep)


def _forever(entry: _Entry) -> _Entry:
    return _Entry(entry.what, entry.paths, entry.bytes, math.inf, entry.names, entry.damaged)
