"""Hints for errors inside a recipe: users can fix their own recipes, but not the shipped ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from aot_cache import tested

_SHIPPED = "aot_cache.models"
YOURS = "fix the recipe, or narrow its range"


def is_shipped(module: str) -> bool:
    """Whether the recipes in this module are shipped with aot-cache."""
    return module == _SHIPPED or module.startswith(f"{_SHIPPED}.")


def what_to_do(make: Callable[..., object], yours: str = YOURS) -> str:
    """The hint for an error in code that the case function `make` runs."""
    while isinstance(make, partial):
        make = make.func
    return to_do_in(str(getattr(make, "__module__", "")), yours)


def to_do_in(module: str, yours: str = YOURS) -> str:
    """The hint for an error in a recipe's module; `yours` is the hint for a recipe of the user's own."""
    return known_to_work() if is_shipped(module) else yours


def known_to_work() -> str:
    """Text: the recipe is shipped, the releases that it works with, and the installed ones."""
    table = tested.table()
    pairs = ", ".join(pair.text for pair in table.pairs if not (pair.broken or pair.failed))
    releases = table.transformers()
    span = f"{releases[0]} to {releases[-1]}" if len(releases) > 1 else "".join(releases)
    works = f"torch × triton {pairs or 'none'} and transformers {span or 'none'}"
    return f"this recipe is aot-cache's own: it works with {works}, and here is {tested.here()}; install those, or report it"
