"""The points that reach a unit, tuning or graph: for each case, a set of points as boxes."""

from __future__ import annotations

import json
from collections.abc import Iterable

from aot_cache.recipes import dimensions

Reached = dict[str, list[dict[str, str]]]
"""Case name → boxes of points (see `dimensions.describe`)."""


def together(parts: Iterable[Reached]) -> Reached:
    """The union of `parts`. A case whose boxes are the same in all of them keeps them as they are."""
    boxes: dict[str, list[list[dict[str, str]]]] = {}
    for part in parts:
        for case, found in part.items():
            if found not in boxes.setdefault(case, []):
                boxes[case].append(found)
    return {case: found[0] if len(found) == 1 else _union(found) for case, found in boxes.items()}


def _union(several: Iterable[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Overlapping boxes as disjoint ones. Each is expanded alone, because all together may exceed the limit of `expand`."""
    boxes = {json.dumps(box): box for found in several for box in found}.values()
    points = {tuple(point.items()) for box in boxes for point in dimensions.expand([box])}
    return dimensions.describe(map(dict, points), next(iter(boxes)))
