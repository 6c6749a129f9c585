"""What the file system that a folder is on does with locks."""

from __future__ import annotations

from pathlib import Path

_LOCAL_FUSE = ("fuse.fuse-overlayfs", "fuseblk")
_LOCAL_LOCKS = frozenset({"nolock", "local_lock=all", "local_lock=flock", "localflock", "nobrl"})


def unseen_locks(folder: Path) -> str:
    """Why other hosts may not see locks in a folder; empty if they do, or if it is on a disk of this host."""
    kind, options = _mount(folder)
    hidden = sorted(_LOCAL_LOCKS & set(options))
    if hidden:
        return f"it is on a {kind} file system that is mounted with {hidden[0]}, so other hosts do not see locks"
    if kind.startswith("fuse") and kind not in _LOCAL_FUSE:  # sshfs, gcsfuse, s3fs, ...
        return f"it is on a {kind} file system, where other hosts do not see locks"
    return ""


def _mount(folder: Path) -> tuple[str, list[str]]:
    """(type, options) of the file system that a folder is on; empty if unknown. Source: proc_pid_mountinfo(5)."""
    try:
        rows = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
        real = folder.resolve()
    except OSError:
        return "", []
    best: tuple[int, str, list[str]] = (-1, "", [])
    for row in rows:
        at = Path(row[4].encode().decode("unicode_escape"))  # a space is \040
        if real.is_relative_to(at) and len(at.parts) >= best[0]:  # a later mount hides an earlier one
            after = row.index("-")
            best = (len(at.parts), row[after + 1], [*row[5].split(","), *row[after + 3].split(",")])
    return best[1], best[2]
