"""Checks before the first capture that a bundle was built with the server's options. With another cache size or number of drafts,
every call would miss, and the misses would show only a shape.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from aot_cache.errors import AotCacheError, Incompatible
from aot_cache.models.qwen3_5.settings import Settings
from aot_cache.recipes import declare as declaring
from aot_cache.recipes import options
from aot_cache.runtime import loader


def check(spec: str, strict: bool = False) -> str:
    """Compare the options of the loaded bundles with the server's. Call it between `aot_cache.ready()` and the first capture.

    Args:
        spec: the server's recipe with its options, as made by `from_config.spec_of`.
        strict: raise instead of warning.

    Returns:
        The warning; empty if a bundle fits, none is loaded, or none was built from a recipe.

    Raises:
        Incompatible: with `strict`, if no bundle fits; the message has its options and the server's.
        AotCacheError: `spec` is not the spec of a recipe.
    """
    mine = declaring.load(spec)
    told = [_told(mine, spec, one.manifest.spec, one.bundle.path) for one in loader.loaded() if one.manifest.spec]
    if not told or None in told:
        return ""
    error = next(one for one in told if one is not None)
    if strict:
        raise error
    warnings.warn(f"aot-cache: {error}", loader.AotCacheWarning, stacklevel=2)
    return str(error)


def differences(mine: Settings, built: Settings) -> dict[str, tuple[str, str]]:
    """Option → (the server's value, the bundle's), for each difference because of which a server with `mine` would miss."""
    pairs: dict[str, tuple[object, object]] = {
        "--num-speculative-tokens": (mine.drafts, built.drafts),
        "--max-batch": (mine.max_batch, built.max_batch),
        "--tp": (mine.tp, built.tp),
        "--dtype": (mine.dtype, built.dtype),
    }
    out = {option: pair for option, pair in pairs.items() if pair[0] != pair[1]}
    if mine.text != built.text:
        out["--model"] = mine.name, built.name
    if mine.cache_len != built.cache_len and mine.drafts == built.drafts:  # else the drafts may be the reason
        out["--max-model-len"] = mine.max_model_len, built.max_model_len
    if mine.prefill_chunk > built.prefill_chunk:  # shorter chunks are in the bundle, too
        out["--prefill-chunk"] = mine.prefill_chunk, built.prefill_chunk
    return {option: (str(here), str(there)) for option, (here, there) in out.items()}


def _told(mine: declaring.Recipe, spec: str, built: str, path: Path) -> Incompatible | None:
    """The error for a bundle that does not fit, else None."""
    hint = f"start with the bundle's options, or build: aot-cache build --model '{spec}'"
    what = f"bundle {path} is for {built}, not for {options.published(spec)}"
    try:
        theirs = declaring.load(_with_file(built, spec)).settings
    except AotCacheError as error:
        return Incompatible(f"{what} ({error.message})", hint=hint)
    if not isinstance(theirs, Settings):
        return Incompatible(what, hint=hint)
    found = differences(mine.settings, theirs)
    if not found:
        return None
    if theirs.drafts and not mine.settings.drafts:
        hint = f"start with its --spec mtp, and --no-speculation; {hint}"
    said = ", ".join(f"{option} is {here} here and {there} there" for option, (here, there) in found.items())
    return Incompatible(f"{what}: {said}", hint=hint)


def _with_file(built: str, spec: str) -> str:
    """The bundle's spec, with the path of the server's config file if the bundle was built from the same file."""
    name, given = options.parse(built)
    own: Mapping[str, str] = options.parse(spec)[1]
    if options.CONFIG in own and options.parse(options.published(spec))[1][options.CONFIG] == given.get(options.CONFIG):
        given[options.CONFIG] = own[options.CONFIG]
    return options.text(name, given)
