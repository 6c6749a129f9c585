"""`aot-cache gc`: removes from a store what nobody needs any more."""

from __future__ import annotations

import contextlib
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from aot_cache.cli.command import AsJson, Unfinished
from aot_cache.cli.facts import store as store_facts
from aot_cache.cli.render import store as render_store
from aot_cache.cli.render import terminal
from aot_cache.errors import AotCacheError, DeclarationError
from aot_cache.store import gc as housekeeping
from aot_cache.store import use

_UNITS = {"": 1, "B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{unit}B": size for unit, size in _UNITS.items() if len(unit) == 1 and unit != "B"}
_UNITS |= {f"{unit}I{end}": 1024**power for power, unit in enumerate("KMGT", 1) for end in ("", "B")}
_SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}


def gc(
    store: Annotated[Path, typer.Argument(metavar="[STORE]", help="Folder of the store.")] = Path("artifacts"),
    max_size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="Keep at most so much (500MB, 2GiB); what was used least recently goes."),
    ] = None,
    older_than: Annotated[
        str | None, typer.Option(metavar="AGE", help="Remove what was not used for so long (12h, 30d, 8w).")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB", help="Keep files with such a name, or path in the store, and what they name. Repeatable."
        ),
    ] = None,
    bundles: Annotated[
        bool, typer.Option("--bundles", help="Remove bundles, too; else all of them stay, and what they name.")
    ] = False,
    wait: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="Wait so long for builds that use the store.")
    ] = 0.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go, and remove nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove what nobody needs from a store, and what killed builds have left.

    Without --max-size and --older-than only what is of no use goes: objects that nothing names, damaged records, partial files,
    stores of old releases, and temporary folders of killed processes. Nothing goes while somebody builds with the store.
    """
    limits = housekeeping.Limits(
        max_size=None if max_size is None else _bytes(max_size),
        older_than=None if older_than is None else _seconds(older_than),
        keep=keep or (),
        bundles=bundles,
    )
    if not store.is_dir():
        raise DeclarationError("the folder of a store", f"none at {store}", "name the --store of `aot-cache build`")
    with contextlib.nullcontext() if dry_run else use.alone(store, wait), terminal.Progress() as progress:
        found = housekeeping.plan(store, limits, progress)
        facts = store_facts.removals(found, store, use.users(store) if dry_run else [], dry_run)
        if not as_json:
            render_store.removals(facts)
            sys.stdout.flush()
        if not dry_run:
            try:
                housekeeping.carry_out(found, progress)
            except AotCacheError as error:
                if as_json:
                    raise Unfinished(facts) from error
                raise
    if as_json:
        terminal.document(facts)


def _bytes(text: str) -> int:
    """A size: `1048576`, `500MB`, `2GiB`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if found is None or found[2].upper() not in _UNITS:
        raise DeclarationError("--max-size as a size", repr(text), "write it as 500MB or 2GiB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _seconds(text: str) -> float:
    """An age in seconds: `45m`, `12h`, `30d`, `8w`."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhdw])\s*", text, re.ASCII)
    if found is None:
        raise DeclarationError("--older-than as an age", repr(text), "write it as 12h, 30d or 8w")
    return float(found[1]) * _SECONDS[found[2]]
