"""The record of a bundle's rehearsals, in a file beside it (`X.safetensors` → `X.rehearsed.json`).

It is not inside the bundle because servers pin the bundle's digest. The file is not authenticated: it is for information, and
nothing is loaded or trusted because of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from aot_cache.store import Json, json_in, write_atomic

FORMAT = "aot-cache rehearsed"
SCHEMA = 1
_MOST_BYTES = 4 << 20


@dataclass(frozen=True)
class CaseRun:
    """How much of a case was run.

    Args:
        name: the case's name.
        run: number of points that were run; all of them hit.
        declared: number of points that the case has.
        distance: the largest distance from eager.
    """

    name: str
    run: int
    declared: int
    distance: float


@dataclass(frozen=True)
class Run:
    """One rehearsal in which every chosen point hit and was close to eager.

    Args:
        digest: the bundle's digest.
        device: the GPU's name, or `cpu`.
        date: in UTC.
        versions: of aot-cache, python, torch and triton.
        cases: all cases of the bundle; one that was left out has 0 points run.
    """

    digest: str
    device: str
    date: str
    versions: Mapping[str, str]
    cases: tuple[CaseRun, ...]

    @property
    def run(self) -> int:
        return sum(case.run for case in self.cases)

    @property
    def declared(self) -> int:
        return sum(case.declared for case in self.cases)

    @property
    def proved(self) -> bool:
        """Whether every declared point was run."""
        return bool(self.cases) and all(case.run == case.declared for case in self.cases)

    def text(self) -> str:
        """`proved 9 points on cpu`, or `rehearsed 16 of 2560 points on NVIDIA H200`."""
        points = f"{self.declared} point{'' if self.declared == 1 else 's'} on {self.device}"
        return f"proved {points}" if self.proved else f"rehearsed {self.run} of {points}"

    def to_json(self) -> dict[str, Json]:
        return {**asdict(self), "versions": dict(self.versions)}


@dataclass(frozen=True)
class Stamp:
    """The contents of the file beside a bundle.

    Args:
        runs: rehearsals of exactly this bundle, one per device.
        ignored: why the file, or a run in it, was ignored; empty if nothing was.
    """

    runs: tuple[Run, ...] = ()
    ignored: str = ""

    def of(self, device: str) -> Run | None:
        """The run on `device`, or None."""
        return next((run for run in self.runs if run.device == device), None)

    def facts(self) -> dict[str, Json]:
        """The stamp as plain values, with display texts."""
        rows = [{**run.to_json(), "text": run.text(), "proved": run.proved} for run in self.runs]
        return {"rehearsed": rows, "stamp_ignored": self.ignored}


NO_STAMP = Stamp()


def path_of(bundle: Path) -> Path:
    """Path of the file beside a bundle."""
    return bundle.with_suffix(".rehearsed.json")


def read(bundle: Path, digest: str) -> Stamp:
    """Read the runs of the bundle at this path with this digest. Never raises: a bad file is `Stamp.ignored`."""
    path = path_of(bundle)
    try:
        with path.open("rb") as file:
            data = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        return Stamp()
    except OSError as error:
        return Stamp(ignored=f"{path} cannot be read: {error.strerror or error}")
    try:
        runs = _runs(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return Stamp(ignored=f"{path} is not the record of a rehearsal: {type(error).__name__}: {error}"[:300])
    mine = tuple(run for run in runs if run.digest == digest)
    return Stamp(mine, "" if mine or not runs else f"{path} is about another bundle")


def _runs(data: bytes) -> list[Run]:
    if len(data) > _MOST_BYTES:
        raise ValueError(f"more than {_MOST_BYTES} bytes")
    document = json_in(data)
    if document[FORMAT] != SCHEMA:
        raise ValueError(f"expected schema {SCHEMA}, found {document[FORMAT]!r}")
    return [_run(found) for found in document["runs"]]


def _run(found: Mapping[str, Json]) -> Run:
    cases = tuple(_case(case) for case in found["cases"])
    versions = {str(name): str(version) for name, version in found["versions"].items()}
    return Run(_text(found["digest"]), _text(found["device"]), _text(found["date"]), versions, cases)


def _case(found: Mapping[str, Json]) -> CaseRun:
    run, declared, distance = found["run"], found["declared"], found["distance"]
    for count in (run, declared):
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ValueError(f"expected a count, found {count!r}")
    if run > declared or isinstance(distance, bool) or not isinstance(distance, (int, float)):
        raise ValueError(f"{run} of {declared} points at distance {distance!r}")
    return CaseRun(_text(found["name"]), run, declared, float(distance))


def _text(value: Json) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected text, found {value!r}")
    return value


def add(bundle: Path, run: Run) -> Stamp:
    """Write a run beside its bundle, replacing an earlier run on the same device; returns the new contents.

    An earlier run with the same versions that covers at least the same points is kept, with the new date.

    Raises:
        StoreUnwritable: it cannot be written.
    """
    before = read(bundle, run.digest)
    old = before.of(run.device)
    if old is not None and dict(old.versions) == dict(run.versions) and _covers(old, run):
        run = replace(old, date=run.date)
    return _write(bundle, [*(one for one in before.runs if one.device != run.device), run])


def _covers(old: Run, new: Run) -> bool:
    had = {case.name: case.run for case in old.cases}
    return old.declared == new.declared and all(had.get(case.name, -1) >= case.run for case in new.cases)


def remove(bundle: Path, digest: str, device: str) -> Stamp:
    """Remove the run of a device on which the bundle no longer hits.

    Raises:
        StoreUnwritable: it cannot be written.
    """
    before = read(bundle, digest)
    if before.of(device) is None:
        return before
    return _write(bundle, [run for run in before.runs if run.device != device])


def _write(bundle: Path, runs: Iterable[Run]) -> Stamp:
    kept = tuple(sorted(runs, key=lambda run: run.device))
    document = {FORMAT: SCHEMA, "runs": [run.to_json() for run in kept]}
    write_atomic(path_of(bundle), (json.dumps(document, indent=1) + "\n").encode())
    return Stamp(kept)
