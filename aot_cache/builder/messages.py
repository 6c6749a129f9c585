"""The messages between a build and its worker processes: one JSON object per line, each with a type here.

A job is written to a worker's stdin, and its events are read from its stdout. Only this module knows their JSON form.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias, TypeVar

from aot_cache.artifact.manifest import Graph, NativeModule, graph_from_json, plain
from aot_cache.artifact.plan import FailedCase, Failure
from aot_cache.artifact.target import Target
from aot_cache.builder.fingerprint import Inputs
from aot_cache.misses.file import Miss
from aot_cache.recipes.dimensions import Point
from aot_cache.store import JsonObject

Stage = Literal["kernels", "graphs"]
Part = Literal["kernels", "models"]


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A missed point at which the recipe's code cannot run. Unlike a declared point, it may fail without failing the case."""

    case: str
    point: Point
    why: str


@dataclass(frozen=True, kw_only=True)
class Job:
    """The job of one worker process.

    Args:
        stage: trace and compile Triton kernels, or the graphs of compiled functions.
        target: the target that the process becomes.
        recipe: name or `module:object` with options; None if there are only `plans`.
        plans: paths of plan files, whose kernels are built, too.
        plan_out: path to which the plan is written; a later worker of the same rank reads it.
        calls: file with the calls of compiled functions at every point, for the worker that traces them.
        ranges: dimension → text, which replaces the declared range.
        store: the store's folder; remote_store: URL of the store behind it, if there is one.
        line_info, pythons, workers: see `pipeline.Request`.
        show_plan: trace, and compile nothing.
        misses: what serving processes missed.
        refused: missed points to leave out.
        failed_cases: cases that another worker could not run.
        ranks: the world size; `ranks_given`: whether the user gave it.
        rank: this process's rank.
        also: paths of plans of other ranks, to be compiled with this one's.
        cases: the cases that call compiled functions; None if not known yet.
        neighbours: also build what is beside recorded specializations, see `builder.neighbours`.
        waits: the whole job comes on a second line, or nothing does; until then the process only gets ready for it.
    """

    stage: Stage
    target: Target
    recipe: str | None
    plan_out: str
    calls: str
    store: str
    remote_store: str | None = None
    plans: Sequence[str] = field(default_factory=list)
    ranges: Mapping[str, str] = field(default_factory=dict)
    line_info: bool = False
    pythons: Sequence[str] = field(default_factory=list)
    workers: int | None = None
    show_plan: bool = False
    misses: Sequence[Miss] = field(default_factory=list)
    refused: Sequence[Refused] = field(default_factory=list)
    failed_cases: Sequence[FailedCase] = field(default_factory=list)
    ranks: int = 1
    ranks_given: bool = False
    rank: int = 0
    also: Sequence[str] = field(default_factory=list)
    cases: Sequence[str] | None = None
    neighbours: bool = True
    waits: bool = False

    def written(self) -> str:
        return json.dumps({**plain(self), "target": self.target.properties()})

    @classmethod
    def read(cls, text: str) -> Job:
        data = json.loads(text)
        data |= {
            "target": _target(data["target"]),
            "misses": [Miss(**one) for one in data["misses"]],
            "refused": [Refused(**one) for one in data["refused"]],
            "failed_cases": [FailedCase(**one) for one in data["failed_cases"]],
        }
        return cls(**data)


@dataclass(frozen=True, kw_only=True)
class StartJob:
    """The job of a worker process in which an engine starts on the virtual device, see `builder.engine_worker`.

    Args:
        part: log what it launches, or let it compile its own models.
        engine: the adapter's name, see `engine_worker.adapter`.
        arguments: the engine's own command line.
        target: the target that the process becomes.
        rank: the rank that the process becomes, on the GPU with that number.
        ranks: how many there are. If the engine wants another number, the worker answers `NeedsRanks`.
        out: path for what is found: a plan, or the file with the engine's caches.
    """

    part: Part
    engine: str
    arguments: Sequence[str]
    target: Target
    rank: int
    ranks: int
    out: str

    def written(self) -> str:
        return json.dumps({**plain(self), "target": self.target.properties()})


def read_job(text: str) -> Job | StartJob:
    """The job of a worker process."""
    data = json.loads(text)
    if "stage" in data:
        return Job.read(text)
    return StartJob(**{**data, "target": _target(data["target"])})


def _target(found: Mapping[str, Any]) -> Target:
    return Target(**{**found, "capability": tuple(found["capability"])})


@dataclass(frozen=True, kw_only=True)
class Warned:
    """Something that the user should know, and that does not stop the build."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Progressed:
    """Progress of a stage: `done` of `total`."""

    stage: str
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class NeedsRanks:
    """The recipe or the engine is for world size `ranks`, and the worker was started with another one. Nothing is done yet."""

    ranks: int


class OtherRanks(Exception):
    """Raised in the worker where it finds that out, and in its parent when the answer `NeedsRanks` arrives."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks


@dataclass(frozen=True, kw_only=True)
class Raised:
    """The worker failed with an error of `aot_cache.errors`, given by its class name and its texts."""

    type: str
    expected: str
    found: str
    hint: str


@dataclass(frozen=True, kw_only=True)
class ImportedCompiler:
    """The recipe's modules have imported torch's compiler, so that there are probably graphs. Kernels are not traced yet."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """Kernels are traced, and the plan is written.

    Args:
        spec: text that loads the recipe; empty for a plan file.
        units: number of units in the plan.
        calling: cases that call compiled functions.
        refused: missed points that could not be run.
        inputs: the packages and files that the process has imported.
    """

    spec: str
    units: int
    calling: Sequence[str]
    refused: Sequence[Refused]
    inputs: Inputs


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """Kernels are compiled. `keys` and `memory_keys` are in the order of the plan's units.

    Args:
        missed_kernels: number of each miss that asks for kernels → why it will miss again; empty if it will not.
        compiled: number of units that were compiled now, not found in the store.
        toolchain: what the bytes of all kernels depend on (`key.toolchain_parts`).
        neighbours: number of units that were neither declared nor recorded, see `builder.neighbours`.
        removed: ids of missed units and of neighbours that cannot be built; they are in none of the lists here.
    """

    keys: Sequence[str]
    memory_keys: Sequence[str | None]
    compiled: int
    native: Sequence[NativeModule]
    failed: Sequence[Failure]
    toolchain: JsonObject
    missed_kernels: Mapping[int, str]
    inputs: Inputs
    neighbours: int
    removed: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """Call signatures are surveyed, and the plan is written."""

    spec: str
    inputs: Inputs
    failed_cases: Sequence[FailedCase]


@dataclass(frozen=True, kw_only=True)
class TracedGraph(Graph):
    """A graph with what only the child that compiled it knows.

    Args:
        points: case number → numbers of the points that call it; `reached` has the same points as boxes.
        asks_rank: places in code that ask for the rank.
    """

    points: Mapping[str, Sequence[int]] = field(default_factory=dict)
    asks_rank: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class GraphsMade:
    """Graphs are compiled.

    Args:
        compiled: number of call signatures that were compiled now, not found in the store.
        key: what all graphs depend on (`key.graph_parts`).
        missed_calls: number of each miss of a graph → why it will miss again; empty if it will not.
    """

    graphs: Sequence[TracedGraph]
    failed: Sequence[Failure]
    compiled: int
    key: JsonObject
    failed_cases: Sequence[FailedCase]
    missed_calls: Mapping[int, str]


@dataclass(frozen=True, kw_only=True)
class Started:
    """An engine was started on the virtual device, and what was found is written.

    Args:
        version: the engine's.
        untested: why that version is doubtful.
        requests: how many kinds of requests it answered.
        first: kernel → the stage, or the kind of requests, that launched it first.
        unreached: see `engine_worker.Run`.
        assumed: place in code → the values that it read there and that nobody knows; it read ones.
        at_start: constants of its kernels that are known only when a server starts, see `artifact.at_start`.
        launchers: see `Plan.launchers`.
        models: names of the classes that the engine compiled itself.
        inputs: the packages and files that the process has imported, and the model's configuration.
    """

    version: str
    untested: str
    requests: int
    first: Mapping[str, str]
    unreached: Sequence[str]
    assumed: Mapping[str, str]
    at_start: Sequence[str]
    launchers: Sequence[Sequence[Any]]
    models: Sequence[str]
    inputs: Inputs


Answer: TypeAlias = ImportedCompiler | Traced | Compiled | Surveyed | GraphsMade | Started
Event: TypeAlias = Answer | Progressed | Warned | NeedsRanks | Raised
T = TypeVar("T")

_EVENTS: Mapping[str, type[Event]] = {
    kind.__name__: kind
    for kind in (
        Progressed,
        Warned,
        NeedsRanks,
        Raised,
        ImportedCompiler,
        Traced,
        Compiled,
        Surveyed,
        GraphsMade,
        Started,
    )
}


def last_of(job: Job | StartJob) -> type[Answer]:
    """The type of the last answer of a worker."""
    if isinstance(job, StartJob):
        return Started
    if job.stage == "kernels":
        return Traced if job.show_plan else Compiled
    return Surveyed if job.show_plan else GraphsMade


def written(event: Event) -> str:
    """An event as one line."""
    return json.dumps({"event": type(event).__name__, **plain(event)}) + "\n"


def read(line: str) -> Event:
    """The event of a line."""
    data: dict[str, Any] = json.loads(line)
    kind = _EVENTS[data.pop("event")]
    for name in {one.name for one in fields(kind)} & _READERS.keys():
        data[name] = _READERS[name](data[name])
    return kind(**data)


def answer_of(kind: type[T], answers: Iterable[object]) -> T | None:
    """The first answer of type `kind`, or None."""
    return next((one for one in answers if isinstance(one, kind)), None)


def _numbered(found: Mapping[str, str]) -> dict[int, str]:
    return {int(number): why for number, why in found.items()}


_READERS: Mapping[str, Any] = {
    "refused": lambda found: [Refused(**one) for one in found],
    "inputs": lambda found: Inputs(**found),
    "native": lambda found: [NativeModule(**one) for one in found],
    "failed": lambda found: [Failure(**one) for one in found],
    "failed_cases": lambda found: [FailedCase(**one) for one in found],
    "graphs": lambda found: [graph_from_json(TracedGraph, one) for one in found],
    "missed_kernels": _numbered,
    "missed_calls": _numbered,
}
