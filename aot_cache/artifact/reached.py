"""The points that reach something: of each case some, as boxes."""

from __future__ import annotations

import json
from collections.abc import Iterable

from aot_cache.recipes import dimensions

Reached = dict[str, list[dict[str, str]]]
"""Case name → boxes of points (see `dimensions.describe`)."""


def together(parts: Iterable[Reached]) -> Reached:
    """The points that any of `parts` has, in as few boxes as one of them."""
    boxes: dict[str, list[list[dict[str, str]]]] = {}
    for part in parts:
        for case, found in part.items():
            if found not in boxes.setdefault(case, []):
                boxes[case].append(found)
    return {case: found[0] if len(found) == 1 else _union(found) for case, found in boxes.items()}


def _union(several: Iterable[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Boxes that may overlap, as disjoint ones. Each is expanded alone: all at once may be more than `expand` takes."""
    boxes = {json.dumps(box): box for found in several for box in found}.values()
    points = {tuple(point.items()) for box in boxes for point in dimensions.expand([box])}
    return dimensions.describe(map(dict, points), next(iter(boxes)))
