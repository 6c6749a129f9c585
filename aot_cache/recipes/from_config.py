"""Finds the recipe for a transformers `config.json` by its `model_type`. Imports no recipe.

A package that ships recipes maps model types to them in the entry-point group `aot_cache.model_types`:
`qwen3_5 = package.module:function`. The function is called with the file's path as its option `config`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from aot_cache.errors import DeclarationError, UnknownName, did_you_mean
from aot_cache.recipes import declare as declaring
from aot_cache.recipes import options

ENTRY_POINTS = "aot_cache.model_types"
FILE = "config.json"
"""Name of the config file in a model's folder."""


def names() -> dict[str, str]:
    """Model types that recipes are installed for: `model_type` → `module:object`."""
    return {entry.name: entry.value for entry in metadata.entry_points(group=ENTRY_POINTS)}


def is_config(text: str) -> bool:
    """Whether `text`, given as a model, is a config file: it ends in `.json`, or it is not the name of a recipe but of a
    file, or of a folder with a config file."""
    name, mark, _ = text.partition("?")
    if text.endswith(".json") and not mark:
        return True
    if ":" in name or name in declaring.names():
        return False
    return Path(text).is_file() or (bool(text) and (Path(text) / FILE).is_file())


def spec_of(model: str, given: Mapping[str, str]) -> str:
    """The spec for the value of `--model` (a recipe, or a model's config file or folder) with the `given` options.

    Raises:
        AotCacheError: see `spec_for` and `options.added`.
    """
    return options.added(spec_for(model) if is_config(model) else model, given)


def spec_for(path: str) -> str:
    """The spec of the recipe for the config file at `path`: `qwen3.5?config=PATH`; `module:object` if the recipe has no name.

    Args:
        path: the file, or a folder in which it is called `config.json`.

    Raises:
        DeclarationError: there is no such file, or it is not a model's config.
        UnknownName: no installed recipe is for its `model_type`.
    """
    if Path(path).is_dir():
        path = str(Path(path) / FILE)
    try:
        found = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise DeclarationError(f"cannot read config file {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise DeclarationError(
            f"config file {path} is not JSON: {error}", hint="give transformers' config.json"
        ) from error
    wanted = found.get("model_type") if isinstance(found, dict) else None
    if not isinstance(wanted, str):
        raise DeclarationError(
            f'a "model_type" in {path}', "none" if wanted is None else repr(wanted), "give transformers' config.json"
        )
    known = names()
    if wanted not in known:
        raise UnknownName(
            f"no recipe for model_type {wanted!r} of {path}; known: {', '.join(sorted(known)) or 'none'}",
            hint=did_you_mean(wanted, known, "name a recipe: `aot-cache models` lists them"),
        )
    called = {value: name for name, value in sorted(declaring.names().items(), reverse=True)}
    return options.text(called.get(known[wanted], known[wanted]), {options.CONFIG: path})
