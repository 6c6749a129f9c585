"""What a rehearsal found, point by point and case by case."""

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
"""How a point went: it hit and is close · something was not there · it hit and is not close · it raised, and eager does not ·
it raises in eager, too · the two counts of events contradict each other."""


@dataclass(frozen=True)
class Missed:
    """Something that was not there.

    Args:
        name: `module:qualname` of the function or kernel.
        why: what differs from what is there.
    """

    name: str
    why: str


@dataclass(frozen=True)
class PointResult:
    """One point.

    Args:
        case, point: which.
        status: one of the words above.
        misses: what was not there.
        events: the ledger's events that no hit has, by kind; and `late_install`, which one may have (see `runtime.ledger`).
        second: the second count's, by family.
        distance: the worst distance from eager, None where there is nothing to compare.
        where: what is that far away, such as `result[0]`.
        why: what went wrong, with file and line where there is one; empty for a hit.
        captured: whether it was run inside a CUDA graph capture.
        seconds: it took, eager's run included.
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
        """(what it is about, what is wrong) for each function that missed; none for a hit."""
        if self.status == MISS:
            return [(missed.name, missed.why) for missed in self.misses]
        return [] if self.status == HIT else [(f"{self.case}: {self.status}", self.why)]


@dataclass(frozen=True)
class CaseResult:
    """One case.

    Args:
        declared: points that it has.
        chosen: points that were to be run; 0 where the case was left out.
        not_captured: why it is called outside of captures on a GPU; empty where it is not, or no capture was tried.
    """

    name: str
    declared: int
    chosen: int
    points: tuple[PointResult, ...]
    not_captured: str = ""

    def count(self, status: str) -> int:
        """How many points went so."""
        return sum(point.status == status for point in self.points)

    @property
    def passed(self) -> bool:
        """Whether all chosen points were run, hit and were close."""
        return self.count(HIT) == len(self.points) == self.chosen

    @property
    def different(self) -> set[str]:
        """The points that were run, each once, whatever the number of ranks."""
        return {point_text(result.point) for result in self.points}

    @property
    def seconds(self) -> float:
        return sum(point.seconds for point in self.points)

    @property
    def events(self) -> dict[str, int]:
        """The ledger's events that no hit has, of all points together."""
        total: Counter[str] = Counter()
        for point in self.points:
            total.update(point.events or {})
        return dict(total)

    @property
    def worst(self) -> PointResult | None:
        """The point that is farthest from eager."""
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
    """What a fresh process with nothing but a bundle did at the chosen points.

    Args:
        path, digest: of the bundle.
        device: the GPU's name, or `cpu`.
        versions: of aot-cache, python, torch and triton.
        date: when, in UTC.
        cases: all of the bundle's.
        not_ready: what `ready(strict=True)` said against serving; empty where it said nothing.
        died: how the process ended before it was done, and at which point; empty where it was done.
        seconds: all of it.
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
        """Whether every chosen point hit and was close to eager, and any was chosen."""
        return not self.died and all(case.passed for case in self.cases) and any(case.chosen for case in self.cases)

    @property
    def hits(self) -> int:
        return sum(case.count(HIT) for case in self.cases)

    @property
    def chosen(self) -> int:
        return sum(case.chosen for case in self.cases)

    def reasons(self) -> list[str]:
        """What went wrong, one line for each function or case: at how many points, and the first of them."""
        found: dict[str, list[tuple[str, PointResult]]] = {}
        for point in (point for case in self.cases for point in case.points):
            for about, why in point.reasons():
                found.setdefault(about, []).append((why, point))
        return [*(_line(about, mine) for about, mine in found.items()), *filter(None, [self.died])]

    def run(self) -> Run:
        """What is written beside the bundle of a rehearsal that passed."""
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
    """JSON has no infinity."""
    return value if value is None or math.isfinite(value) else "infinite"


def _line(about: str, found: Sequence[tuple[str, PointResult]]) -> str:
    """All that is wrong with one function, or case: the first reason, and how many more there are."""
    why, point = found[0]
    others = len({text for text, point in found if point.status == MISS}) - 1
    more = [f"{len(found) - 1} more"] * (len(found) > 1) + [f"for {others} other reasons, too"] * (others > 0)
    first = ", ".join(filter(None, (point.case, point_text(point.point))))
    return f"{about}: {why} ({' and '.join([f'at {first}', *more[:1]])}{''.join(f', {text}' for text in more[1:])})"


def _distance(case: CaseResult) -> float:
    return case.worst.distance or 0.0 if case.worst is not None else 0.0
