"""Trace and compile the graphs of a recipe: run its host code at every declared point on tensors without memory.

First all compiled functions run as plain Python, and what they are called with is looked at (`call_kinds`). This process only
makes the recipe's arguments and models: host code runs in forked children, each of which begins as a server does, with its
models made and nothing called. The first call may go another way there than all others (a cache that is made when it is
first written to, a registry that is filled), and is looked at and traced apart. Then each kind of
call is a job for a forked child: it runs the points of that kind again with Dynamo on, compiles what Dynamo asks for with
Inductor, and answers Dynamo with the graph itself, run on tensors without memory. A point at which the guards of what
was compiled do not hold is compiled again, so that at the end every declared point has hit one of the graphs.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from aot_cache.artifact import key
from aot_cache.artifact.manifest import plain
from aot_cache.artifact.plan import CallPlan, CasePlan, Failure, Plan
from aot_cache.artifact.target import Target
from aot_cache.builder import fingerprint, fork_map, graph_results, one_point, point_groups
from aot_cache.builder.call_kinds import Kind, follows
from aot_cache.builder.fingerprint import Inputs
from aot_cache.builder.graph_results import Answer, Made, order, stored, together
from aot_cache.builder.graphs_capture import Job
from aot_cache.builder.messages import Refused, TracedGraph
from aot_cache.builder.one_point import Broken
from aot_cache.builder.point_groups import Group, Look, Seen, by_values
from aot_cache.builder.point_runner import Looker, mode_of
from aot_cache.builder.recorded_calls import Recorded
from aot_cache.errors import one_line
from aot_cache.recipes import dimensions
from aot_cache.recipes.declare import Recipe
from aot_cache.store import Store
from aot_cache.upstream.codec import dynamo_globals, dynamo_guards
from aot_cache.upstream.hooks import dynamo_frames
from aot_cache.upstream.hooks.dynamo_frames import Frame
from aot_cache.upstream.virtual import dynamo_inputs

Progress = Callable[[str, int, int], None]
MOST_GRAPHS = 64
"""Graphs that one kind of call may split into before the build gives up on it."""


def empty_plan(recipe: Recipe, target: str) -> Plan:
    """The plan of a recipe without its units: for a target that has no Triton kernels."""
    cases = [CasePlan.of(case, case.points()) for case in recipe.cases]
    return Plan(recipe=recipe.name, target=target, cases=cases)


class Runs:
    """Runs a recipe's cases on tensors without memory. The process must have become the target.

    Args:
        cases: names of the cases that call compiled functions; None for all.
        recorded: the calls at every point, where somebody has noted them.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        cases: Sequence[str] | None = None,
        recorded: Recorded | None = None,
    ) -> None:
        self.cases = [case for case in recipe.cases if cases is None or case.name in cases]
        self._recorded = recorded or Recorded({})
        enumerations = [case.points() for case in self.cases]
        self.points = [found.points for found in enumerations]
        self.kinds: dict[str, Kind] = {}
        self._trusted: set[tuple[str, int]] = set()
        """(kind, case) of which every call is recorded."""
        self.refused: list[Refused] = []
        self._missed = {
            (number, at)
            for number, found in enumerate(enumerations)
            for at in range(len(found.points) - found.added, len(found.points))
        }
        self.broken: dict[int, Broken] = {}
        """The cases that cannot be run: nothing of them is among the kinds."""
        self._groups = [
            Group(
                number,
                points,
                {at for at in points if (number, at) in self._missed} | self._telling(number, points),
            )
            for number, case in enumerate(self.cases)
            for points in by_values(case, self.points[number])
        ]
        self._target = target
        self._device = "cpu" if target.backend == "cpu" else "cuda"
        self._looker = Looker(self.cases, self.points, self._device)

    @property
    def skipped(self) -> set[str]:
        """Functions that were compiled with another backend than Inductor, as far as is seen."""
        return self._looker.skipped

    @property
    def late_modules(self) -> dict[str, str]:
        """Module → file of what host code imported while it ran in children: a build depends on it."""
        return self._looker.late_modules

    def survey(self, progress: Progress, also: Iterable[tuple[int, int]] = ()) -> None:
        """Find the kinds of calls that the recipe makes, at points where sizes are telling, and at those in `also`.

        A case that cannot be run at one of them is taken out, see `broken`.
        """
        extra = set(also)
        self._looker.make_arguments()
        self._refuse()
        self._look(
            {g: [at for at in g.points if at in g.telling or (g.case, at) in extra] for g in self._groups}, progress
        )
        self._look({group: self._strangers(group) for group in self._groups}, progress)
        self._look_at_first_calls()
        self._sort()

    def _look(self, wanted: Mapping[Group, Sequence[int]], progress: Progress) -> None:
        """Run points that nobody has looked at yet, each group's in a child of its own, its first one twice."""
        jobs = [Look(g, self._first_of(g), [at for at in points if at not in g.seen]) for g, points in wanted.items()]
        jobs = [job for job in jobs if job.points]
        total, done = sum(len(job.points) for job in jobs), 0
        if jobs:
            progress("calls", 0, total)
        for job, seen in self._look_in_children(jobs):
            job.group.seen.update(job.points)
            for at, calls in seen.calls:
                job.group.survey.add(calls, at)
            first, *others = seen.calls
            job.group.first |= {c.structure for c in first[1]} - {c.structure for _, calls in others for c in calls}
            done += len(job.points)
            progress("calls", done, total)

    def _look_at_first_calls(self) -> None:
        """Where a process's first call is one that it never makes again: how its sizes change, from the range's ends."""
        ends = [Look(g, at, []) for g in self._groups if g.first for at in {g.points[0], g.points[-1]} - g.ends]
        for job, seen in self._look_in_children(ends):
            for at, calls in seen.calls:
                job.group.survey.add(calls, at)
                job.group.ends.add(at)

    def _look_in_children(self, jobs: Sequence[Look]) -> Iterator[tuple[Look, Seen]]:
        """What children saw; a case that one of them could not run is taken out."""
        for job, found in self._looker.look(jobs):
            if isinstance(found, Broken):
                self._take_out(job.group.case, found)
            else:
                yield job, found

    def _first_of(self, group: Group) -> int:
        return self._looker.hint_first(group.case, group.points)[0]

    def _strangers(self, group: Group) -> list[int]:
        """Points at which what is noted of the calls is of no kind that was seen."""
        kinds = list(group.survey.kinds(group.case).values())
        return sorted(self._recorded.strangers(kinds, self.cases[group.case].name) & set(group.points))

    def _sort(self) -> None:
        """Put the calls that were seen into kinds."""
        self.kinds = {}
        for group in self._groups:
            for kind in group.survey.kinds(group.case).values():
                same = self.kinds.setdefault(kind.id, kind)
                often = kind.dynamic() and kind.structure not in group.first
                unseen = self._unseen(group, kind) if often else []
                points = {*same.points.get(group.case, ()), *kind.points[group.case], *unseen}
                same.points[group.case] = sorted(points)
                same.places.setdefault(group.case, set()).update(kind.places[group.case])

    def _telling(self, number: int, group: list[int]) -> set[int]:
        case = self.cases[number]
        few = self._recorded.knows(case.name, group[-1]) and len(case.dims) <= 2
        return point_groups.telling(
            case, self.points[number], group, point_groups.MOST_OF_RECORDED if few else point_groups.MOST
        )

    def _unseen(self, group: Group, kind: Kind) -> list[int]:
        """Points that nobody has looked at: those of the kind, if they are recorded, else all, to be run by it."""
        name, mine = self.cases[group.case].name, kind.points[group.case]
        unseen = [at for at in group.points if at not in group.seen]
        if not self._recorded.trusts(kind, name, group.seen, mine):
            return unseen
        self._trusted.add((kind.id, group.case))
        return [at for at in unseen if not self._recorded.knows(name, at) or self._recorded.at(kind, name, at)]

    def _refuse(self) -> None:
        """Leave out the missed points that the recipe's code cannot run at: a declared one has to run, these need not."""
        jobs = [Look(g, at, []) for g in self._groups for at in g.points if (g.case, at) in self._missed]
        self._missed.clear()
        for job, found in self._looker.look(jobs):
            if isinstance(found, Broken):
                self.refused.append(Refused(case=found.failed.case, point=found.failed.point, why=str(found.error)))
                job.group.points.remove(job.first)

    def _take_out(self, number: int, broken: Broken) -> None:
        """Go on without a case."""
        self.broken.setdefault(number, broken)
        self._groups = [group for group in self._groups if group.case != number]

    def calls(self) -> list[CallPlan]:
        """The kinds of calls, for the plan."""
        told = [
            follows([group.survey for group in self._groups if group.case == number], points)
            for number, points in enumerate(self.points)
        ]

        def follow(kind: Kind, number: int) -> list[Mapping[str, Sequence[object]]]:
            found = [told[number].get((kind.structure, n), {}) for n in sorted(kind.places[number])]
            return [f for n, f in enumerate(found) if f not in found[:n]]

        return [
            CallPlan(
                function=f"{kind.module}:{kind.function}",
                line=kind.line,
                id=kind.id,
                mode=mode_of(self.cases[min(kind.points)]),
                wrapping=kind.wrapping or {},
                dynamic=kind.dynamic(),
                hint={
                    self.cases[n].name: self.points[n][self._looker.hint_first(n, at)[0]]
                    for n, at in kind.points.items()
                },
                reached=self._reached({n: set(at) for n, at in kind.points.items()}),
                structure=kind.structure,
                follows={self.cases[n].name: follow(kind, n) for n in sorted(kind.places)},
            )
            for kind in sorted(self.kinds.values(), key=lambda kind: (kind.module, kind.function, kind.id))
        ]

    def compile_all(self, store: Store, inputs: Inputs, progress: Progress, workers: int | None = None) -> Made:
        """Compile what the store lacks; `inputs` is everything that this process imported (`fingerprint.inputs`)."""
        made = Made(key=dynamo_globals.bound_to(self._target.properties()))
        shared = {
            "bound": made.key,
            "inputs": plain(inputs),
            "environment": fingerprint.environment(),
            "schema": key.SCHEMA,
        }
        answers: dict[str, Answer] = {}
        while True:
            jobs = sorted(self.kinds.values(), key=lambda kind: (-len(kind.points), kind.id))
            self._answer(jobs, answers, shared, store, progress, workers)
            if self._took_out(jobs, answers):
                continue
            strange = {p for kind in jobs for p in answers[kind.id].strange if p[0] not in self.broken}
            if not strange:
                break
            known = set(self.kinds)
            self.survey(progress, strange)  # sizes go otherwise there than where they were looked at
            if set(self.kinds) <= known:
                made.failed += [self._unfit(point) for point in sorted(strange) if point[0] not in self.broken]
                jobs = [kind for kind in jobs if kind.id in self.kinds]
                break
        made.compiled = sum(answers[kind.id].fresh for kind in jobs)
        merged: dict[str, tuple[TracedGraph, dict[int, set[int]]]] = {}
        for kind in jobs:
            answer = answers[kind.id]
            if answer.failed:
                made.failed.append(self._failure(kind, answer.failed))
            for graph in answer.graphs:
                facts = replace(graph, points={})
                _, points = merged.setdefault(key.digest(plain(facts)), (facts, {}))
                for case, at in graph.points.items():
                    if int(case) not in self.broken:
                        points.setdefault(int(case), set()).update(at)
        made.graphs = [
            replace(graph, reached=self._reached(points))
            for _, (graph, points) in sorted(merged.items(), key=lambda one: order((one[0], one[1][0])))
            if points
        ]
        return made

    def _took_out(self, jobs: list[Kind], answers: dict[str, Answer]) -> bool:
        """Whether jobs came upon a case that cannot be run; what it is in is to be answered anew, without it."""
        found = [kind for kind in jobs if answers[kind.id].broken is not None]
        for kind in found:
            broken = answers.pop(kind.id).broken
            assert broken is not None
            self._take_out([case.name for case in self.cases].index(broken.failed.case), broken)
        if found:
            self._sort()
        return bool(found)

    def _failure(self, kind: Kind, why: Mapping[int, str]) -> Failure:
        """What a bundle says of calls that have no graph: of which cases, and where they are lost."""
        reasons: dict[str, list[str]] = {}
        for number in sorted(why):
            reasons.setdefault(why[number], []).append(self.cases[number].name)
        return Failure(
            kernel=f"{kind.module}:{kind.function}",
            unit=kind.id,
            error="; ".join(f"case {', '.join(names)}: {reason}" for reason, names in reasons.items()),
            reached=self._reached({number: set(kind.points[number]) for number in why}),
        )

    def _unfit(self, point: tuple[int, int]) -> Failure:
        case = self.cases[point[0]]
        where = dimensions.point_text(self.points[point[0]][point[1]])
        why = f"at {where} it calls a compiled function as it does nowhere when it is looked at"
        return Failure(kernel=f"case {case.name}", unit=where, error=why)

    def _answer(
        self,
        jobs: list[Kind],
        answers: dict[str, Answer],
        shared: Mapping[str, object],
        store: Store,
        progress: Progress,
        workers: int | None,
    ) -> None:
        """Fill `answers` for all `jobs`, from the store or by compiling."""
        keys = {kind.id: key.digest({**shared, "kind": kind.id, "points": self._reached_all(kind)}) for kind in jobs}
        for kind in jobs:
            found = stored(store, keys[kind.id]) if kind.id not in answers else None
            if found is not None:
                answers[kind.id] = found
        missing = [kind for kind in jobs if kind.id not in answers]
        progress("graphs", 0, len(missing))
        if missing:
            dynamo_inputs.warm_up(self._device)
        # A child for each: what Dynamo has compiled, and how often, shows in what it makes next.
        made = fork_map.run(lambda kind: self._compile(kind, jobs, store), missing, workers, fresh=True)
        for done, (index, found) in enumerate(made, 1):
            kind = missing[index]
            answer = answers[kind.id] = self._answered(kind, found)
            if not answer.failed and answer.broken is None:
                graph_results.put(store, keys[kind.id], answer)
            progress("graphs", done, len(missing))
        shared_kinds = [kind for kind in missing if answers[kind.id].failed and len(kind.points) > 1]
        for kind, answer in self._apart(shared_kinds, jobs, store, workers):
            answers[kind.id] = answer

    def _apart(
        self, kinds: Sequence[Kind], jobs: list[Kind], store: Store, workers: int | None
    ) -> Iterator[tuple[Kind, Answer]]:
        """Calls of several cases that could not be compiled together, each case alone: one may be to blame for all."""
        alone = [(kind, number) for kind in kinds for number in kind.points]
        parts = [replace(kind, points={n: kind.points[n]}, places={n: kind.places[n]}) for kind, n in alone]
        found: dict[str, list[Answer]] = {kind.id: [] for kind in kinds}
        for index, answer in fork_map.run(lambda kind: self._compile(kind, jobs, store), parts, workers, fresh=True):
            found[parts[index].id].append(self._answered(parts[index], answer))
        for kind in kinds:
            yield kind, together(found[kind.id])

    def _answered(self, kind: Kind, found: Answer | fork_map.Died) -> Answer:
        return self._failed(kind, (min(kind.points), -1), found.why) if isinstance(found, fork_map.Died) else found

    def _compile(self, kind: Kind, kinds: list[Kind], store: Store) -> Answer:
        """Everything that calls of one kind need. Runs in a child, and must not raise."""
        job = Job(kind, kinds)

        def handle(frame: Frame, compile_frame: object) -> Any:
            try:
                return job.handle(frame, compile_frame)
            except Exception as error:  # of ours, or Dynamo's: the case's own code has not raised it
                job.failed = job.failed or one_line(error)
                raise

        try:
            with dynamo_inputs.session(kind.dynamic(), MOST_GRAPHS), dynamo_guards.writing() as written:
                job.written = written
                with job.graphs_answered():
                    for number, points in kind.points.items():
                        job.mode = mode_of(self.cases[number])
                        first, *others = self._looker.hint_first(number, points)
                        for n, point in enumerate((first, first, *others)):
                            job.at = (number, point)
                            # Twice where it begins: the first call of all may have changed what the next one sees.
                            if n > 1 and self._hits(job, number, point):
                                continue
                            with dynamo_frames.hooked(handle):
                                broken = self._looker.run(number, point)
                            if job.failed:
                                return self._failed(kind, job.at, job.failed)
                            if broken is not None:
                                return Answer(broken=broken)
            if not job.met:
                why = "the call was made when it was looked at, and not when it was to be traced"
                return self._failed(kind, job.at, why)
            return Answer(job.results(store), strange=sorted(job.strange), fresh=True)
        except Exception as error:
            if os.environ.get("AOT_CACHE_DEBUG") == "1":
                traceback.print_exc()
            return self._failed(kind, job.at, job.failed or one_line(error))

    def _failed(self, kind: Kind, at: tuple[int, int], why: str) -> Answer:
        """Why calls could not be compiled, with the point where that was seen and the place in the user's code."""
        number, point = at if at[0] in kind.points else (min(kind.points), -1)
        where = self.points[number][point if point >= 0 else self._looker.hint_first(number, kind.points[number])[0]]
        file = getattr(sys.modules.get(kind.module), "__file__", None)
        place = f"{one_point.short(file)}:{kind.line}" if isinstance(file, str) else ""
        told = "" if not place or _PLACE.search(why) else f" ({place})"
        return Answer(failed=dict.fromkeys(kind.points, f"at {dimensions.point_text(where)}: {why}{told}"))

    def _hits(self, job: Job, number: int, point: int) -> bool:
        """Whether the guards of what was made say so of the calls that are recorded: then nothing has to run."""
        case = self.cases[number]
        if (job.kind.id, number) not in self._trusted or not self._recorded.knows(case.name, point):
            return False
        with self._looker.tensors(case):
            return job.hits(self._recorded.at(job.kind, case.name, point))

    def _reached(self, points: Mapping[int, Iterable[int]]) -> dict[str, list[dict[str, str]]]:
        return {
            self.cases[n].name: dimensions.describe((self.points[n][at] for at in points[n]), self.cases[n].dims)
            for n in sorted(points)
        }

    def _reached_all(self, kind: Kind) -> list[object]:
        return [
            sorted(
                (n, list(at)) for n, at in kind.points.items()
            ),  # what is in the store names points by their numbers
            self._reached({n: set(at) for n, at in kind.points.items()}),
            [self._looker.hint_first(n, at)[0] for n, at in kind.points.items()],
        ]


_PLACE = re.compile(r"\.py:\d+\)")
