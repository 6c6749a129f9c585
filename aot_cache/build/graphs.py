"""Trace and compile the graphs of a recipe: run its host code at every declared point on tensors without memory.

First all compiled functions run as plain Python, and what they are called with is looked at (`calls`). Then each kind of
call is a job for a forked child: it runs the points of that kind again with Dynamo on, compiles what Dynamo asks for with
Inductor, and answers Dynamo with the graph itself, run on tensors without memory. A point at which the guards of what
was compiled do not hold is compiled again, so that at the end every declared point has hit one of the graphs.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aot_cache import key, shapes, shipped
from aot_cache.build import pool, stamp
from aot_cache.build.calls import Kind, Survey, follows
from aot_cache.build.graph_job import Job
from aot_cache.build.recorded import Recorded
from aot_cache.errors import AotCacheError, DeclarationError, TraceError, one_line
from aot_cache.key import GRAPHS
from aot_cache.plan import CallPlan, CasePlan, Plan
from aot_cache.recipe import Case, Recipe
from aot_cache.shapes import Point, Values
from aot_cache.store import Store
from aot_cache.target import Target
from aot_cache.upstream import (
    dynamo_frames,
    dynamo_globals,
    dynamo_guards,
    dynamo_inputs,
)
from aot_cache.upstream.dynamo_frames import Frame
from aot_cache.upstream.torch_fake import NEEDS_VALUES, HostMode, without_launches

Progress = Callable[[str, int, int], None]
Json = Any
MOST_GRAPHS = 64
"""Graphs that one kind of call may split into before the build gives up on it."""


@dataclass
class Made:
    """All graphs of a recipe, as JSON facts, and what could not be made.

    Args:
        graphs: one entry for each frame's bytecode; bytes are in the store.
        failed: kinds of calls of which something could not be compiled, with the reason.
        compiled: how many kinds of calls were compiled now, and not found in the store.
        key: what all graphs are bound to, see `key.graph_parts`.
    """

    graphs: list[dict[str, Json]] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    compiled: int = 0
    key: dict[str, Json] = field(default_factory=dict)


@dataclass
class _Answer:
    """What a child made of one kind of call."""

    graphs: list[dict[str, Json]] = field(default_factory=list)
    failed: str = ""
    strange: list[tuple[int, int]] = field(default_factory=list)
    """(case, point) where a call was seen that is of no known kind."""
    fresh: bool = False


def empty_plan(recipe: Recipe, target: str) -> Plan:
    """The plan of a recipe without its units: for a target that has no Triton kernels."""
    cases = [CasePlan.of(case, case.points()) for case in recipe.cases]
    return Plan(recipe.name, target, cases=cases)


@dataclass
class _Group:
    """Points of a case that differ in `Range`s only, and what was seen at some of them."""

    case: int
    points: list[int]
    telling: set[int]
    survey: Survey = field(default_factory=Survey)
    seen: set[int] = field(default_factory=set)


class Runs:
    """Runs a recipe's cases on tensors without memory. The process must have become the target.

    Args:
        cases: names of the cases that call compiled functions; None for all.
        recorded: the calls at every point, where somebody has noted them.
    """

    def __init__(
        self, recipe: Recipe, target: Target, cases: Sequence[str] | None = None, recorded: Recorded | None = None
    ) -> None:
        self.cases = [case for case in recipe.cases if cases is None or case.name in cases]
        self._recorded = recorded or Recorded({})
        enumerations = [case.points() for case in self.cases]
        self.points = [found.points for found in enumerations]
        self.kinds: dict[str, Kind] = {}
        self._trusted: set[tuple[str, int]] = set()
        """(kind, case) of which every call is recorded."""
        self.refused: list[tuple[str, Point, str]] = []
        """(case, point, why) of the missed points that the recipe's code cannot run at."""
        self._missed = {
            (number, at)
            for number, found in enumerate(enumerations)
            for at in range(len(found.points) - found.added, len(found.points))
        }
        self.skipped: set[str] = set()
        self._groups = [
            _Group(
                number,
                points,
                {at for at in points if (number, at) in self._missed} | self._telling(number, points),
            )
            for number, case in enumerate(self.cases)
            for points in _by_values(case, self.points[number])
        ]
        self._target = target
        self._device = "cpu" if target.backend == "cpu" else "cuda"
        self._host = HostMode(self._device)  # one for all: what a recipe keeps from point to point stays usable

    def survey(self, progress: Progress, also: Iterable[tuple[int, int]] = ()) -> None:
        """Find the kinds of calls that the recipe makes, at points where sizes are telling, and at those in `also`.

        Raises:
            DeclarationError: the recipe's own code raises at a point.
            TraceError: host code needs values that tensors here do not have.
        """
        extra = set(also)
        self._refuse()
        todo = [(g, at) for g in self._groups for at in g.points if at in g.telling or (g.case, at) in extra]
        progress("calls", 0, len(todo))
        for done, (group, at) in enumerate(todo, 1):
            if at not in group.seen:
                self._look(group, at)
            progress("calls", done, len(todo))
        for group in self._groups:
            kinds = list(group.survey.kinds(group.case).values())
            strange = self._recorded.strangers(kinds, self.cases[group.case].name)
            for at in sorted(strange & set(group.points) - group.seen):
                self._look(group, at)
        self.kinds = {}
        for group in self._groups:
            for kind in group.survey.kinds(group.case).values():
                same = self.kinds.setdefault(kind.id, kind)
                unseen = self._unseen(group, kind) if kind.dynamic() else []
                points = {*same.points.get(group.case, ()), *kind.points[group.case], *unseen}
                same.points[group.case] = sorted(points)
                same.places.setdefault(group.case, set()).update(kind.places[group.case])

    def _telling(self, number: int, group: list[int]) -> set[int]:
        case = self.cases[number]
        few = self._recorded.knows(case.name, group[-1]) and len(case.dims) <= 2
        return _telling(case, self.points[number], group, _TELLING_OF_RECORDED if few else _TELLING)

    def _unseen(self, group: _Group, kind: Kind) -> list[int]:
        """Points that nobody has looked at: those of the kind, if they are recorded, else all, to be run by it."""
        name, mine = self.cases[group.case].name, kind.points[group.case]
        unseen = [at for at in group.points if at not in group.seen]
        if not self._recorded.trusts(kind, name, group.seen, mine):
            return unseen
        self._trusted.add((kind.id, group.case))
        return [at for at in unseen if not self._recorded.knows(name, at) or self._recorded.at(kind, name, at)]

    def _refuse(self) -> None:
        """Leave out the missed points that the recipe's code cannot run at: a declared one has to run, these need not."""
        for group in self._groups:
            for at in [at for at in group.points if at not in group.seen and (group.case, at) in self._missed]:
                try:
                    with dynamo_frames.hooked(lambda *_: dynamo_frames.run_without_compiling()):
                        self.run(self.cases[group.case], self.points[group.case][at])
                except AotCacheError as error:
                    self.refused.append((self.cases[group.case].name, self.points[group.case][at], str(error)))
                    group.points.remove(at)

    def _look(self, group: _Group, at: int) -> None:
        """Run a point with all compiled functions as plain Python."""
        case = self.cases[group.case]

        def look(frame: Frame, _compile: Any) -> Any:
            if frame.wrapping is None:
                self.skipped.add(f"{frame.module}:{frame.code.co_name}")
            else:
                group.survey.add(frame, _mode(case), at)
            return dynamo_frames.run_without_compiling()

        group.seen.add(at)
        group.survey.next_point()
        with dynamo_frames.hooked(look):
            self.run(case, self.points[group.case][at])

    def calls(self) -> list[CallPlan]:
        """The kinds of calls, for the plan."""
        told = [
            follows([group.survey for group in self._groups if group.case == number], points)
            for number, points in enumerate(self.points)
        ]

        def follow(kind: Kind, number: int) -> list[dict[str, list[Json]]]:
            found = [told[number].get((kind.structure, n), {}) for n in sorted(kind.places[number])]
            return [f for n, f in enumerate(found) if f not in found[:n]]

        return [
            CallPlan(
                f"{kind.module}:{kind.function}",
                kind.line,
                kind.id,
                _mode(self.cases[min(kind.points)]),
                kind.wrapping or {},
                kind.dynamic(),
                {self.cases[n].name: self.points[n][self._hint_first(n, at)[0]] for n, at in kind.points.items()},
                self._reached({n: set(at) for n, at in kind.points.items()}),
                kind.structure,
                {self.cases[n].name: follow(kind, n) for n in sorted(kind.places)},
            )
            for kind in sorted(self.kinds.values(), key=lambda kind: (kind.module, kind.function, kind.id))
        ]

    def compile_all(self, store: Store, inputs: Json, progress: Progress, workers: int | None = None) -> Made:
        """Compile what the store lacks; `inputs` is everything that this process imported (`stamp.inputs`)."""
        made = Made(key=dynamo_globals.bound_to(self._target.properties()))
        shared = {"bound": made.key, "inputs": inputs, "environment": stamp.environment(), "schema": key.SCHEMA}
        answers: dict[str, _Answer] = {}
        while True:
            jobs = sorted(self.kinds.values(), key=lambda kind: (-len(kind.points), kind.id))
            self._answer(jobs, answers, shared, store, progress, workers)
            strange = {point for kind in jobs for point in answers[kind.id].strange}
            made.compiled += sum(answers[kind.id].fresh for kind in jobs)
            if not strange:
                break
            known = set(self.kinds)
            self.survey(progress, strange)  # sizes go otherwise there than where they were looked at
            if set(self.kinds) <= known:
                made.failed += [self._unfit(point) for point in sorted(strange)]
                break
        merged: dict[str, dict[str, Json]] = {}
        for kind in jobs:
            answer = answers[kind.id]
            if answer.failed:
                name = f"{kind.module}:{kind.function}"
                made.failed.append({"kernel": name, "unit": kind.id, "error": answer.failed})
            for graph in answer.graphs:
                facts = {name: value for name, value in graph.items() if name != "points"}
                same = merged.setdefault(key.digest(facts), {**facts, "points": {}})
                for case, at in graph["points"].items():
                    same["points"].setdefault(int(case), set()).update(at)
        made.graphs = [
            {**{k: v for k, v in graph.items() if k != "points"}, "reached": self._reached(graph["points"])}
            for _, graph in sorted(merged.items(), key=_order)
        ]
        return made

    def _unfit(self, point: tuple[int, int]) -> dict[str, str]:
        case = self.cases[point[0]]
        where = shapes.point_text(self.points[point[0]][point[1]])
        why = f"at {where} it calls a compiled function as it does nowhere when it is looked at"
        return {"kernel": f"case {case.name}", "unit": where, "error": why}

    def _answer(
        self,
        jobs: list[Kind],
        answers: dict[str, _Answer],
        shared: Json,
        store: Store,
        progress: Progress,
        workers: int | None,
    ) -> None:
        """Fill `answers` for all `jobs`, from the store or by compiling."""
        keys = {kind.id: key.digest({**shared, "kind": kind.id, "points": self._reached_all(kind)}) for kind in jobs}
        for kind in jobs:
            found = _stored(store, keys[kind.id]) if kind.id not in answers else None
            if found is not None:
                answers[kind.id] = found
        missing = [kind for kind in jobs if kind.id not in answers]
        progress("graphs", 0, len(missing))
        if missing:
            dynamo_inputs.warm_up(self._device)
        # A child for each: what Dynamo has compiled, and how often, shows in what it makes next.
        made = pool.run(lambda kind: self._compile(kind, jobs, store), missing, workers, fresh=True)
        for done, (index, answer) in enumerate(made, 1):
            kind = missing[index]
            answer = answers[kind.id] = _Answer(failed=answer.why) if isinstance(answer, pool.Died) else answer
            if not answer.failed:
                store.put_record(GRAPHS, keys[kind.id], {"graphs": answer.graphs, "strange": answer.strange})
            progress("graphs", done, len(missing))

    def run(self, case: Case, point: Point) -> None:
        """Run one point.

        Raises:
            DeclarationError, TraceError: as `trace` says.
        """
        where = ", ".join(f"{k}={v}" for k, v in point.items())
        try:
            with self._host, without_launches(), case.modes(self._device):
                case.call(point)()
        except AotCacheError:
            raise
        except NEEDS_VALUES as error:
            raise TraceError(
                f"case {case.name!r} to run at {where}",
                f"{_place(error)} reads the values of a tensor ({error})",
                shipped.what_to_do(case.make, "hand the number in as an argument"),
            ) from error
        except Exception as error:
            raise DeclarationError(
                f"case {case.name!r} to run at {where}",
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} ({_place(error)})",
                shipped.what_to_do(case.make),
            ) from error

    def _compile(self, kind: Kind, kinds: list[Kind], store: Store) -> _Answer:
        """Everything that calls of one kind need. Runs in a child, and must not raise."""
        job = Job(kind, kinds)
        try:
            with dynamo_inputs.session(kind.dynamic(), MOST_GRAPHS), dynamo_guards.writing() as written:
                job.written = written
                with job.graphs_answered():
                    for number, points in kind.points.items():
                        job.mode = _mode(self.cases[number])
                        for point in self._hint_first(number, points):
                            job.at = (number, point)
                            if self._hits(job, number, point):
                                continue
                            with dynamo_frames.hooked(job.handle):
                                self.run(self.cases[number], self.points[number][point])
                            if job.failed:
                                return _Answer(failed=job.failed)
            if not job.met:
                return _Answer(failed="the call was made when it was looked at, and not when it was to be traced")
            return _Answer(job.results(store), strange=sorted(job.strange), fresh=True)
        except Exception as error:
            if os.environ.get("AOT_CACHE_DEBUG") == "1":
                traceback.print_exc()
            return _Answer(failed=job.failed or one_line(error))

    def _hits(self, job: Job, number: int, point: int) -> bool:
        """Whether the guards of what was made say so of the calls that are recorded: then nothing has to run."""
        case = self.cases[number]
        if (job.kind.id, number) not in self._trusted or not self._recorded.knows(case.name, point):
            return False
        with self._host, case.modes(self._device):
            return job.hits(self._recorded.at(job.kind, case.name, point))

    def _hint_first(self, number: int, mine: Sequence[int]) -> list[int]:
        """Points, first the one nearest to the declared hint: its sizes guide Inductor's choices."""
        case, points = self.cases[number], self.points[number]

        def distance(at: int) -> tuple[int, ...]:
            return tuple(abs(points[at][dim] - case.hint_of(dim)) for dim in case.dims)

        return sorted(mine, key=distance)

    def _reached(self, points: Mapping[int, Iterable[int]]) -> dict[str, list[dict[str, str]]]:
        return {
            self.cases[n].name: shapes.describe((self.points[n][at] for at in points[n]), self.cases[n].dims)
            for n in sorted(points)
        }

    def _reached_all(self, kind: Kind) -> Json:
        return [
            sorted(
                (n, list(at)) for n, at in kind.points.items()
            ),  # what is in the store names points by their numbers
            self._reached({n: set(at) for n, at in kind.points.items()}),
            [self._hint_first(n, at)[0] for n, at in kind.points.items()],
        ]


def _stored(store: Store, graph_key: str) -> _Answer | None:
    record = store.get_record(GRAPHS, graph_key)
    if record is None or not all(store.has(digest) for graph in record["graphs"] for digest in key.objects_of(graph)):
        return None
    return _Answer(record["graphs"], strange=[(case, at) for case, at in record["strange"]])


def _mode(case: Case) -> str:
    return case.mode if case.autocast is None else f"{case.mode} {case.autocast}"


def _by_values(case: Case, points: list[Point]) -> Iterator[list[int]]:
    """Points that differ in `Range`s only, as numbers."""
    static = [name for name, dim in case.dims.items() if isinstance(dim, Values)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, point in enumerate(points):
        groups.setdefault(tuple(point[name] for name in static), []).append(number)
    yield from groups.values()


def _order(item: tuple[str, dict[str, Json]]) -> tuple[str, ...]:
    digest, graph = item
    names = ("module", "function", "mode", "dynamic", "guards")  # for people first, and for a diff of two builds
    return (*(str(graph[name]) for name in names), digest)


_TELLING, _TELLING_OF_RECORDED = 40, 5


def _telling(case: Case, points: list[Point], group: list[int], most: int) -> set[int]:
    """Points of a group at which sizes are looked at: its ends, ones, powers of two, and a spread of others."""
    first = points[group[0]]
    dims = {name: Values(first[name]) if isinstance(dim, Values) else dim for name, dim in case.dims.items()}
    wanted = {tuple(point.items()) for point in shapes.enumerate_points(dims, most).points}
    return {at for at in group if tuple(points[at].items()) in wanted} | {group[0], group[-1]}


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if "/torch/" not in f.filename and "/aot_cache/" not in f.filename] or frames
    return f"{outside[-1].filename}:{outside[-1].lineno}"
