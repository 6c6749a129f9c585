"""Who can have written a file: its own owner and mode, and those of every folder above it.

A bundle is code. Its hashes show that it is the one that was built only if they come from elsewhere: from a pinned digest or a
signature. Without either, everybody who can write the file, or put another one in its place, can run code in the server. So
these must be the server's user and root alone, as sshd and sudo ask of their files. The same holds for the files of trusted keys,
and for a store, which bundles are made from.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from aot_cache.errors import Untrusted

FOLDERS = "AOT_CACHE_TRUSTED_FOLDERS"
_MOST_LINKS = 40  # as in Linux; a circle of links has been refused when the file was opened


def require_own(path: Path, status: os.stat_result, how: str = "pin its digest (AOT_CACHE_DIGEST), sign it, ") -> None:
    """Check that only this user and root can have written a file, unless a folder of `AOT_CACHE_TRUSTED_FOLDERS` holds it.

    Args:
        path: the file, as it was named.
        status: of the open file, because another may be at `path` by now.
        how: what else could be done about it, for the hint.

    Raises:
        Untrusted: others can have written it; the message says why.
    """
    why = why_others(path, status)
    if why:
        hint = f"{how}change that, or name its folder in {FOLDERS}"
        raise Untrusted(f"{path} can have been written by others: {why}", hint=hint)


def why_others(path: Path, status: os.stat_result) -> str:
    """Why others than this user and root can have written a file or folder. Empty if they cannot, or if a folder of
    `AOT_CACHE_TRUSTED_FOLDERS` is or holds it."""
    if os.name != "posix" or _is_named(path / "any file" if stat.S_ISDIR(status.st_mode) else path):
        return ""
    return _open_to_others(path, status) or next(filter(None, map(_open_folder, _folders(path))), "")


def _is_named(path: Path) -> bool:
    named = [Path(os.path.abspath(folder)) for folder in os.environ.get(FOLDERS, "").split(os.pathsep) if folder]
    here = Path(os.path.abspath(path))
    return any(folder in here.parents for folder in named)


def _folders(path: Path) -> Iterator[Path]:
    """Each folder that decides which file `path` names: from the root down, and again from the target of each link."""
    rest = list(Path(os.path.abspath(path)).parts)
    at, links = Path(rest.pop(0)), 0
    yield at
    while rest:
        step = at / rest.pop(0)
        if step.is_symlink() and links < _MOST_LINKS:
            links += 1
            target = Path(os.path.normpath(at / os.readlink(step)))
            rest = [*target.parts[1:], *rest]
            at = Path(target.parts[0])
        elif rest:
            at = step
            yield at


def _open_folder(folder: Path) -> str:
    status = folder.stat()
    if status.st_mode & stat.S_ISVTX and status.st_uid in _own_users():
        return ""  # as /tmp: others can add files, but not replace ours
    return _open_to_others(folder, status)


def _open_to_others(path: Path, status: os.stat_result) -> str:
    """Why others can write this file or folder; empty if they cannot."""
    if status.st_uid not in _own_users():
        return f"{path} belongs to user {status.st_uid}, and this process runs as {os.geteuid()}"
    if status.st_mode & stat.S_IWOTH:
        return f"everybody can write {path}"
    if status.st_mode & stat.S_IWGRP and not _is_private(status.st_gid, status.st_uid):
        return f"group {status.st_gid} can write {path}"
    return ""


def _own_users() -> Iterable[int]:
    return (0, os.geteuid())


def _is_private(group: int, owner: int) -> bool:
    """Whether a group is its user's own, of the same name and without others: with it the umask is often 002."""
    import grp  # imported here: few files are writable by a group
    import pwd

    try:
        name, members = grp.getgrgid(group).gr_name, grp.getgrgid(group).gr_mem
        return name == pwd.getpwuid(owner).pw_name and set(members) <= {name}
    except KeyError:
        return False
