"""Which engines `build --engine` knows, found without importing any of them."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from aot_cache.errors import DeclarationError

ROOM = "aot_cache.engines"
ADAPTER = "virtual_start"
"""The module of an engine's package that starts it on the virtual device."""


def known() -> list[str]:
    """The engines with an adapter of ours."""
    room = importlib.import_module(ROOM)
    packages = [found.name for found in pkgutil.iter_modules(room.__path__) if found.ispkg]
    return [name for name in packages if any(Path(path, name, f"{ADAPTER}.py").exists() for path in room.__path__)]


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
