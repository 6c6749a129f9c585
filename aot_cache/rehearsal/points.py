"""Chooses the cases and points of a bundle to rehearse: all points that it was built for, or a spread of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from aot_cache.artifact.plan import CasePlan
from aot_cache.errors import DeclarationError, UnknownName
from aot_cache.recipes import dimensions
from aot_cache.recipes.declare import Case, Recipe
from aot_cache.recipes.dimensions import Point

MOST = 1_000_000
"""Maximum of points of a case with `--all`."""


@dataclass(frozen=True)
class Chosen:
    """A case, the points at which to run it, and the number of declared points."""

    case: Case
    points: Sequence[Point]
    declared: int


def choose(recipe: Recipe, built: Sequence[CasePlan], only: Sequence[str], most: int | None) -> list[Chosen]:
    """The cases and points to run, in the bundle's order. A case that is left out has no points.

    Args:
        recipe: the recipe as it is installed.
        built: the bundle's cases; the build may have narrowed ranges and added missed points.
        only: names of cases; empty for all.
        most: maximum of points per case; None for all declared points.

    Raises:
        UnknownName: the recipe no longer has a case.
        DeclarationError: a case has other dimensions now, or all its points are more than `MOST`.
    """
    return [_chosen(_as_built(recipe, case), most, not only or case.name in only) for case in built]


def _as_built(recipe: Recipe, built: CasePlan) -> Case:
    found = next((case for case in recipe.cases if case.name == built.name), None)
    if found is None:
        has = ", ".join(case.name for case in recipe.cases)
        raise UnknownName(
            f"recipe {recipe.name!r} no longer has the bundle's case {built.name!r}; known: {has}", hint=_AGAIN
        )
    if set(found.dims) != set(built.dims):
        expected = f"case {found.name!r} with the dimensions {', '.join(built.dims) or 'none'}, as it was built"
        raise DeclarationError(expected, ", ".join(found.dims) or "none", _AGAIN)
    dims = {name: dimensions.parse_dimension(str(text)) for name, text in built.dims.items()}
    return replace(found, dims=dims, missed=tuple(built.missed))


_AGAIN = "build it again: the recipe has changed"


def _chosen(case: Case, most: int | None, wanted: bool) -> Chosen:
    everything = case.points()
    if not wanted:
        return Chosen(case, (), everything.total)
    missed = everything.points[len(everything.points) - everything.added :]
    if most is None:
        if everything.total > MOST:
            raise DeclarationError(
                f"at most {MOST} points of case {case.name!r}", f"{everything.total}", "choose some with --points"
            )
        return Chosen(case, [*dimensions.enumerate_points(case.dims, MOST).points, *missed], everything.total)
    return Chosen(case, [*_spread(case.dims, most), *missed], everything.total)


def _spread(dims: Mapping[str, dimensions.Dimension], most: int) -> list[Point]:
    """At most `most` points: ends, ones, and where keys change first. If the ends alone are too many, evenly spaced corners."""
    try:
        return dimensions.enumerate_points(dims, most).points
    except DeclarationError:  # many dimensions: the ends alone are more points than that
        corners = dimensions.enumerate_points(dims, 2 ** len(dims)).points
        return [corners[round(n * (len(corners) - 1) / max(1, most - 1))] for n in range(most)]
