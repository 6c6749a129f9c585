"""Which engines `build --engine` knows, found without importing any of them."""

from __future__ import annotations

import importlib
from pathlib import Path

from aot_cache.errors import DeclarationError

ROOM = "aot_cache.engines"
ADAPTER = "virtual_start"
"""The module of an engine's package that starts it on the virtual device."""


def known() -> list[str]:
    """The engines with an adapter of ours."""
    room = importlib.import_module(ROOM)
    return sorted(file.parent.name for path in room.__path__ for file in Path(path).glob(f"*/{ADAPTER}.py"))


def module_of(name: str) -> str:
    """The module of the adapter called `name`: one of ours, or, with a dot in it, a module of the user's.

    Raises:
        DeclarationError: it is none of ours, and no name of a module.
    """
    if "." in name:
        return name
    if name not in known():
        raise unknown(name)
    return f"{ROOM}.{name}.{ADAPTER}"


def unknown(name: str) -> DeclarationError:
    """The error for an engine that is not there."""
    return DeclarationError(f"an engine ({', '.join(known())}), or a module with an adapter", repr(name))
