"""`aot-cache push` and `aot-cache pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aot_cache.cli.command import AsJson
from aot_cache.cli.render import terminal

Ref = Annotated[
    str,
    typer.Argument(
        metavar="REF",
        help="An image in a registry (registry.example.com/team/name:tag) or a folder (s3://…, gs://…, az://…, file://…).",
    ),
]


def push(
    paths: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Bundle files.")],
    ref: Ref,
    as_json: AsJson = False,
) -> None:
    """Send bundles to a registry, an object store or a folder, with the files that belong to them."""
    from aot_cache.remote.push import push as run

    with terminal.Progress() as progress:
        done = run(paths, ref, progress)
    if as_json:
        terminal.document(done.to_json())
        return
    _rows(done.to_json(), "sent", "was there")
    if done.digest:
        terminal.line(f"image: {done.ref.rpartition(':')[0]}@{done.digest}")


def pull(
    ref: Ref,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the bundles.")] = Path(),
    digest: Annotated[
        str | None, typer.Option(metavar="SHA256", help="Fetch the bundle with this digest, and no other.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Fetch bundles from a registry, an object store or a folder.

    A bundle gets its name when it was checked. What an interrupted pull has left is continued.
    """
    from aot_cache.remote.pull import pull as run

    with terminal.Progress() as progress:
        done = run(ref, out, digest, progress)
    if as_json:
        terminal.document(done.to_json())
    else:
        _rows(done.to_json(), "received", "was there")


def _rows(facts: dict[str, Any], moved: str, same: str) -> None:
    rows = [
        (one["name"], one["target"], "" if one["complete"] else "incomplete", one["digest"], terminal.size(one["size"]))
        + (f"{moved} {terminal.size(one['moved'])}" if one["moved"] else same,)
        for one in facts["bundles"]
    ]
    terminal.table(("bundle", "target", "", "digest", "size", facts["ref"]), rows, right=("size",))
