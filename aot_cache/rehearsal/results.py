"""Results of a rehearsal, by point and by case."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from aot_cache.artifact.rehearsed import CaseRun, Run
from aot_cache.recipes.dimensions import Point, point_text
from aot_cache.store import Json

HIT, MISS, DIFFERS, FAILED, CANNOT, CONTRADICTS = "hit", "miss", "differs", "failed", "cannot run", "contradicts"
"""Status of a point, in order: it hit and is close to eager · something missed · it hit and is not close · it raised, and eager
did not · it cannot be run or compared (eager raises, too, for one) · the two counts of events contradict each other."""


@dataclass(frozen=True)
class Missed:
    """One miss.

    Args:
        name: `module:qualname` of the function or kernel.
        why: how the call differs from what the bundle has.
    """

    name: str
    why: str


@dataclass(frozen=True)
class PointResult:
    """The result of one point.

    Args:
        status: one of the words above.
        misses: what missed.
        events: count of the ledger's events that a hit must not cause, by kind; and of `late_install`, which a hit may cause (see
            `runtime.ledger`).
        second: the second count of events, by family.
        distance: the largest distance from eager; None if there was nothing to compare.
        where: path of the value with this distance, such as `result[0]`.
        why: the error, with file and line if known; empty for a hit.
        captured: whether it was run inside a CUDA graph capture.
        seconds: duration, including the eager run.
    """

    case: str
    point: Point
    status: str
    misses: tuple[Missed, ...] = ()
    events: Mapping[str, int] | None = None
    second: Mapping[str, int] | None = None
    distance: float | None = None
    where: str = ""
    why: str = ""
    captured: bool = False
    seconds: float = 0.0

    @classmethod
    def from_json(cls, found: Mapping[str, Json]) -> PointResult:
        return cls(**{**found, "misses": tuple(Missed(**one) for one in found["misses"])})

    def to_json(self) -> dict[str, Json]:
        return asdict(self)

    def reasons(self) -> list[tuple[str, str]]:
        """(function or case, reason) for each function that missed, or for the failure; empty for a hit."""
        if self.status == MISS:
            return [(missed.name, missed.why) for missed in self.misses]
        return [] if self.status == HIT else [(f"{self.case}: {self.status}", self.why)]


@dataclass(frozen=True)
class CaseResult:
    """The results of one case.

    Args:
        declared: number of points that it has.
        chosen: number of points to run; 0 if the case is left out.
        not_captured: why it is called outside of captures on a GPU; empty if it is captured, or no capture was tried.
    """

    name: str
    declared: int
    chosen: int
    points: tuple[PointResult, ...]
    not_captured: str = ""

    def count(self, status: str) -> int:
        """Number of points with this status."""
        return sum(point.status == status for point in self.points)

    @property
    def passed(self) -> bool:
        """Whether all chosen points were run, hit and were close."""
        return self.count(HIT) == len(self.points) == self.chosen

    @property
    def different(self) -> set[str]:
        """The distinct points that were run, on any rank."""
        return {point_text(result.point) for result in self.points}

    @property
    def seconds(self) -> float:
        return sum(point.seconds for point in self.points)

    @property
    def events(self) -> dict[str, int]:
        """The counts in `PointResult.events`, summed over all points."""
        total: Counter[str] = Counter()
        for point in self.points:
            total.update(point.events or {})
        return dict(total)

    @property
    def worst(self) -> PointResult | None:
        """The point with the largest distance from eager."""
        compared = [point for point in self.points if point.distance is not None]
        return max(compared, key=lambda point: point.distance or 0.0, default=None)

    def to_json(self) -> dict[str, Json]:
        worst = self.worst
        return {
            "name": self.name,
            "declared": self.declared,
            "chosen": self.chosen,
            "run": len(self.different),
            "hits": self.count(HIT),
            "passed": self.passed,
            "not_captured": self.not_captured,
            "events": self.events,
            "distance": _finite(worst.distance) if worst is not None else None,
            "where": f"{worst.where} at {point_text(worst.point)}" if worst is not None and worst.where else "",
            "seconds": round(self.seconds, 3),
            "points": [{**point.to_json(), "distance": _finite(point.distance)} for point in self.points],
        }


@dataclass(frozen=True)
class Rehearsal:
    """What a fresh process with only a bundle did at the chosen points.

    Args:
        path, digest: of the bundle.
        device: the GPU's name, or `cpu`.
        versions: of aot-cache, python, torch and triton.
        date: in UTC.
        cases: all cases of the bundle.
        not_ready: the error of `ready(strict=True)`; empty if there was none.
        died: how the process ended early, and at which point; empty if it finished.
        seconds: total duration.
    """

    path: Path
    digest: str
    device: str
    versions: Mapping[str, str]
    date: str
    cases: tuple[CaseResult, ...]
    not_ready: str = ""
    died: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether at least one point was chosen, and all of them hit and were close to eager."""
        return not self.died and all(case.passed for case in self.cases) and any(case.chosen for case in self.cases)

    @property
    def hits(self) -> int:
        return sum(case.count(HIT) for case in self.cases)

    @property
    def chosen(self) -> int:
        return sum(case.chosen for case in self.cases)

    def reasons(self) -> list[str]:
        """The failures, one line for each function or case, with the number of points and the first of them."""
        found: dict[str, list[tuple[str, PointResult]]] = {}
        for point in (point for case in self.cases for point in case.points):
            for about, why in point.reasons():
                found.setdefault(about, []).append((why, point))
        return [*(_line(about, mine) for about, mine in found.items()), *filter(None, [self.died])]

    def run(self) -> Run:
        """The record of a passed rehearsal, which is written beside the bundle."""
        cases = [CaseRun(c.name, len(c.different), c.declared, _distance(c)) for c in self.cases]
        return Run(self.digest, self.device, self.date, self.versions, tuple(cases))

    def to_json(self) -> dict[str, Json]:
        return {
            "path": str(self.path.absolute()),
            "digest": self.digest,
            "device": self.device,
            "versions": dict(self.versions),
            "date": self.date,
            "passed": self.passed,
            "chosen": self.chosen,
            "hits": self.hits,
            "not_ready": self.not_ready,
            "died": self.died,
            "reasons": self.reasons(),
            "cases": [case.to_json() for case in self.cases],
            "seconds": round(self.seconds, 3),
        }


def _finite(value: float | None) -> float | str | None:
    """The distance as a JSON value: JSON has no infinity."""
    return value if value is None or math.isfinite(value) else "infinite"


def _line(about: str, found: Sequence[tuple[str, PointResult]]) -> str:
    """The failures of one function or case in one line: the first reason, and how many more there are."""
    why, point = found[0]
    others = len({text for text, point in found if point.status == MISS}) - 1
    more = [f"{len(found) - 1} more"] * (len(found) > 1) + [f"for {others} other reasons, too"] * (others > 0)
    first = ", ".join(filter(None, (point.case, point_text(point.point))))
    return f"{about}: {why} ({' and '.join([f'at {first}', *more[:1]])}{''.join(f', {text}' for text in more[1:])})"


def _distance(case: CaseResult) -> float:
    return case.worst.distance or 0.0 if case.worst is not None else 0.0
