"""Trace and compile the graphs of a recipe: run its host code at every declared point on tensors without memory.

1. Compiled functions run as plain Python, and their call signatures are recorded (`call_signatures`). This process only
   makes the recipe's arguments and models. Host code runs in forked children, each of which starts as a server does: models
   are made, nothing was called. The first call of a process may take a different code path (a cache that is allocated when
   it is first written to, a registry that is filled), and so it is recorded and traced apart.
2. Each call signature is a job for a forked child. It runs the points of that signature again with Dynamo on, compiles what
   Dynamo asks for with Inductor, and gives Dynamo the uncompiled graph, which runs on tensors without memory.
3. A point at which the guards of these graphs fail is compiled again. At the end every declared point hits a graph.
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
from aot_cache.artifact.key import GRAPHS
from aot_cache.artifact.manifest import plain
from aot_cache.artifact.plan import CallPlan, CasePlan, Failure, Plan
from aot_cache.artifact.target import Target
from aot_cache.builder import fingerprint, fork_map, graph_results, one_point, point_groups
from aot_cache.builder.call_signatures import CallSignature, follows
from aot_cache.builder.fingerprint import Inputs
from aot_cache.builder.graph_results import CompileResult, GraphBuildResult, merged, order, stored
from aot_cache.builder.graphs_capture import CompileJob
from aot_cache.builder.messages import Refused, TracedGraph
from aot_cache.builder.one_point import Broken
from aot_cache.builder.point_groups import Group, TraceJob, TraceResult, by_values
from aot_cache.builder.point_runner import PointRunner, mode_of
from aot_cache.builder.recorded_calls import RecordedCalls
from aot_cache.errors import one_line
from aot_cache.recipes import dimensions
from aot_cache.recipes.declare import Recipe
from aot_cache.store import Store
from aot_cache.upstream.codec import dynamo_globals, dynamo_guards
from aot_cache.upstream.hooks import dynamo_frames, dynamo_guard_timing
from aot_cache.upstream.hooks.dynamo_frames import Frame
from aot_cache.upstream.virtual import dynamo_inputs

Progress = Callable[[str, int, int], None]
MOST_GRAPHS = 64
"""How many graphs one call signature may need before the build gives up on it."""


def empty_plan(recipe: Recipe, target: str) -> Plan:
    """The plan of a recipe without its units: for a target that has no Triton kernels."""
    cases = [CasePlan.of(case, case.points()) for case in recipe.cases]
    return Plan(recipe=recipe.name, target=target, cases=cases)


class GraphBuilder:
    """Builds the graphs of a recipe's cases. The process must have become the target (`virtual_gpu.become`).

    Args:
        cases: names of the cases that call compiled functions; None for all.
        recorded: the calls at every point, as the kernel trace recorded them.
    """

    def __init__(
        self,
        recipe: Recipe,
        target: Target,
        cases: Sequence[str] | None = None,
        recorded: RecordedCalls | None = None,
    ) -> None:
        self.cases = [case for case in recipe.cases if cases is None or case.name in cases]
        self._recorded = recorded or RecordedCalls({})
        enumerations = [case.points() for case in self.cases]
        self.points = [found.points for found in enumerations]
        self.signatures: dict[str, CallSignature] = {}
        self._consistent: set[tuple[str, int]] = set()
        """(signature, case) pairs whose recorded calls agree with what Dynamo sees: these need not run at every point."""
        self.refused: list[Refused] = []
        self._missed = {
            (number, at)
            for number, found in enumerate(enumerations)
            for at in range(len(found.points) - found.added, len(found.points))
        }
        self.broken: dict[int, Broken] = {}
        """Cases that cannot be run, by number. None of their calls is among the signatures."""
        self._groups = [
            Group(
                number,
                points,
                {at for at in points if (number, at) in self._missed} | self._probe_points(number, points),
            )
            for number, case in enumerate(self.cases)
            for points in by_values(case, self.points[number])
        ]
        self._target = target
        self._device = "cpu" if target.backend == "cpu" else "cuda"
        self._runner = PointRunner(self.cases, self.points, self._device)

    @property
    def skipped(self) -> set[str]:
        """Functions seen so far that are compiled with another backend than Inductor."""
        return self._runner.skipped

    @property
    def late_modules(self) -> dict[str, str]:
        """Module → file of what host code imported while it ran in children: a build depends on it."""
        return self._runner.late_modules

    def survey(self, progress: Progress, also: Iterable[tuple[int, int]] = ()) -> None:
        """Find the call signatures of the recipe, at each group's probe points and at those in `also` (case, point).

        A case that cannot be run at one of them is dropped, see `broken`.
        """
        extra = set(also)
        self._runner.make_arguments()
        self._drop_failing_misses()
        self._trace(
            {g: [at for at in g.points if at in g.probe_points or (g.case, at) in extra] for g in self._groups},
            progress,
        )
        self._trace({group: self._unmatched(group) for group in self._groups}, progress)
        self._trace_first_calls()
        self._group_by_signature()

    def _trace(self, wanted: Mapping[Group, Sequence[int]], progress: Progress) -> None:
        """Run points that were not traced yet, each group's in a child of its own, its first one twice."""
        jobs = [
            TraceJob(g, self._first_of(g), [at for at in points if at not in g.seen]) for g, points in wanted.items()
        ]
        jobs = [job for job in jobs if job.points]
        total, done = sum(len(job.points) for job in jobs), 0
        if jobs:
            progress("calls", 0, total)
        for job, seen in self._trace_in_children(jobs):
            job.group.seen.update(job.points)
            for at, calls in seen.calls:
                job.group.trace.add(calls, at)
            first, *others = seen.calls
            job.group.first |= {c.structure for c in first[1]} - {c.structure for _, calls in others for c in calls}
            done += len(job.points)
            progress("calls", done, total)

    def _trace_first_calls(self) -> None:
        """Where the first call of a process has a signature that later calls never have, trace it at both ends of the range,
        to see which of its sizes change."""
        ends = [TraceJob(g, at, []) for g in self._groups if g.first for at in {g.points[0], g.points[-1]} - g.ends]
        for job, seen in self._trace_in_children(ends):
            for at, calls in seen.calls:
                job.group.trace.add(calls, at)
                job.group.ends.add(at)

    def _trace_in_children(self, jobs: Sequence[TraceJob]) -> Iterator[tuple[TraceJob, TraceResult]]:
        """Yield what each job's child saw. A case that a child could not run is dropped."""
        for job, found in self._runner.trace(jobs):
            if isinstance(found, Broken):
                self._drop_case(job.group.case, found)
            else:
                yield job, found

    def _first_of(self, group: Group) -> int:
        return self._runner.hint_first(group.case, group.points)[0]

    def _unmatched(self, group: Group) -> list[int]:
        """Points with a recorded call that matches none of the signatures seen so far."""
        signatures = list(group.trace.signatures(group.case).values())
        return sorted(self._recorded.unmatched_points(signatures, self.cases[group.case].name) & set(group.points))

    def _group_by_signature(self) -> None:
        """Collect the signatures of all groups."""
        self.signatures = {}
        for group in self._groups:
            for signature in group.trace.signatures(group.case).values():
                same = self.signatures.setdefault(signature.id, signature)
                often = signature.dynamic() and signature.structure not in group.first
                unseen = self._untraced(group, signature) if often else []
                points = {*same.points.get(group.case, ()), *signature.points[group.case], *unseen}
                same.points[group.case] = sorted(points)
                same.places.setdefault(group.case, set()).update(signature.places[group.case])

    def _probe_points(self, number: int, group: list[int]) -> set[int]:
        case = self.cases[number]
        few = self._recorded.knows(case.name, group[-1]) and len(case.dims) <= 2
        return point_groups.probe_points(
            case, self.points[number], group, point_groups.MAX_PROBES_RECORDED if few else point_groups.MAX_PROBES
        )

    def _untraced(self, group: Group, signature: CallSignature) -> list[int]:
        """Points that were not traced: those recorded with this signature, or all of them where the record cannot be used."""
        name, mine = self.cases[group.case].name, signature.points[group.case]
        unseen = [at for at in group.points if at not in group.seen]
        if not self._recorded.is_consistent(signature, name, group.seen, mine):
            return unseen
        self._consistent.add((signature.id, group.case))
        return [at for at in unseen if not self._recorded.knows(name, at) or self._recorded.at(signature, name, at)]

    def _drop_failing_misses(self) -> None:
        """Drop missed points at which the recipe's code fails. (A declared point must run; these need not.)"""
        jobs = [TraceJob(g, at, []) for g in self._groups for at in g.points if (g.case, at) in self._missed]
        self._missed.clear()
        for job, found in self._runner.trace(jobs):
            if isinstance(found, Broken):
                self.refused.append(Refused(case=found.failed.case, point=found.failed.point, why=str(found.error)))
                job.group.points.remove(job.first)

    def _drop_case(self, number: int, broken: Broken) -> None:
        """Continue without a case."""
        self.broken.setdefault(number, broken)
        self._groups = [group for group in self._groups if group.case != number]

    def calls(self) -> list[CallPlan]:
        """The call signatures, as a plan has them."""
        told = [
            follows([group.trace for group in self._groups if group.case == number], points)
            for number, points in enumerate(self.points)
        ]

        def follow(signature: CallSignature, number: int) -> list[Mapping[str, Sequence[object]]]:
            found = [told[number].get((signature.structure, n), {}) for n in sorted(signature.places[number])]
            return [f for n, f in enumerate(found) if f not in found[:n]]

        return [
            CallPlan(
                function=f"{signature.module}:{signature.function}",
                line=signature.line,
                id=signature.id,
                mode=mode_of(self.cases[min(signature.points)]),
                wrapping=signature.wrapping or {},
                dynamic=signature.dynamic(),
                hint={
                    self.cases[n].name: self.points[n][self._runner.hint_first(n, at)[0]]
                    for n, at in signature.points.items()
                },
                reached=self._reached({n: set(at) for n, at in signature.points.items()}),
                structure=signature.structure,
                follows={self.cases[n].name: follow(signature, n) for n in sorted(signature.places)},
            )
            for signature in sorted(
                self.signatures.values(), key=lambda signature: (signature.module, signature.function, signature.id)
            )
        ]

    def compile_all(
        self, store: Store, inputs: Inputs, progress: Progress, workers: int | None = None
    ) -> GraphBuildResult:
        """Compile what is not in the store yet. `inputs`: the files this process imported (`fingerprint.inputs`)."""
        made = GraphBuildResult(key=dynamo_globals.bound_to(self._target.properties()))
        shared = {
            "bound": made.key,
            "inputs": plain(inputs),
            "environment": fingerprint.environment(),
            "schema": key.SCHEMA,
        }
        answers: dict[str, CompileResult] = {}
        while True:
            jobs = sorted(self.signatures.values(), key=lambda signature: (-len(signature.points), signature.id))
            self._answer(jobs, answers, shared, store, progress, workers)
            if self._dropped_cases(jobs, answers):
                continue
            unmatched = {p for signature in jobs for p in answers[signature.id].unmatched if p[0] not in self.broken}
            if not unmatched:
                break
            known = set(self.signatures)
            self.survey(progress, unmatched)  # re-survey points whose sizes matched no signature
            if set(self.signatures) <= known:
                made.failed += [self._unfit(point) for point in sorted(unmatched) if point[0] not in self.broken]
                jobs = [signature for signature in jobs if signature.id in self.signatures]
                break
        made.compiled = sum(answers[signature.id].fresh for signature in jobs)
        merged: dict[str, tuple[TracedGraph, dict[int, set[int]]]] = {}
        for signature in jobs:
            answer = answers[signature.id]
            if answer.failed:
                made.failed.append(self._failure(signature, answer.failed))
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

    def _dropped_cases(self, jobs: list[CallSignature], answers: dict[str, CompileResult]) -> bool:
        """Drop cases that a job could not run, and the results of the jobs they are in. Returns whether there were any."""
        found = [signature for signature in jobs if answers[signature.id].broken is not None]
        for signature in found:
            broken = answers.pop(signature.id).broken
            assert broken is not None
            self._drop_case([case.name for case in self.cases].index(broken.failed.case), broken)
        if found:
            self._group_by_signature()
        return bool(found)

    def _failure(self, signature: CallSignature, why: Mapping[int, str]) -> Failure:
        """The failure that a bundle reports for calls without a graph: their cases, the reason, and the points lost."""
        reasons: dict[str, list[str]] = {}
        for number in sorted(why):
            reasons.setdefault(why[number], []).append(self.cases[number].name)
        return Failure(
            kernel=f"{signature.module}:{signature.function}",
            unit=signature.id,
            error="; ".join(f"case {', '.join(names)}: {reason}" for reason, names in reasons.items()),
            reached=self._reached({number: set(signature.points[number]) for number in why}),
        )

    def _unfit(self, point: tuple[int, int]) -> Failure:
        case = self.cases[point[0]]
        where = dimensions.point_text(self.points[point[0]][point[1]])
        why = f"at {where} it calls a compiled function as it does nowhere when it is looked at"
        return Failure(kernel=f"case {case.name}", unit=where, error=why)

    def _answer(
        self,
        jobs: list[CallSignature],
        answers: dict[str, CompileResult],
        shared: Mapping[str, object],
        store: Store,
        progress: Progress,
        workers: int | None,
    ) -> None:
        """Fill `answers` for all `jobs`, from the store or by compiling."""
        keys = {
            signature.id: key.digest({**shared, "signature": signature.id, "points": self._reached_all(signature)})
            for signature in jobs
        }
        store.fetch(
            GRAPHS, [keys[signature.id] for signature in jobs if signature.id not in answers], graph_results.named
        )
        for signature in jobs:
            found = stored(store, keys[signature.id]) if signature.id not in answers else None
            if found is not None:
                answers[signature.id] = found
        missing = [signature for signature in jobs if signature.id not in answers]
        progress("graphs", 0, len(missing))
        if missing:
            dynamo_inputs.warm_up(self._device)
        # A child for each: what Dynamo has compiled, and how often, shows in what it makes next.
        made = fork_map.run(lambda signature: self._compile(signature, jobs, store), missing, workers, fresh=True)
        for done, (index, found) in enumerate(made, 1):
            signature = missing[index]
            answer = answers[signature.id] = self._answered(signature, found)
            if not answer.failed and answer.broken is None:
                graph_results.put(store, keys[signature.id], answer)
            progress("graphs", done, len(missing))
        of_several_cases = [
            signature for signature in missing if answers[signature.id].failed and len(signature.points) > 1
        ]
        for signature, answer in self._apart(of_several_cases, jobs, store, workers):
            answers[signature.id] = answer

    def _apart(
        self, signatures: Sequence[CallSignature], jobs: list[CallSignature], store: Store, workers: int | None
    ) -> Iterator[tuple[CallSignature, CompileResult]]:
        """Calls of several cases that could not be compiled together, each case alone: one may be to blame for all."""
        alone = [(signature, number) for signature in signatures for number in signature.points]
        parts = [
            replace(signature, points={n: signature.points[n]}, places={n: signature.places[n]})
            for signature, n in alone
        ]
        found: dict[str, list[CompileResult]] = {signature.id: [] for signature in signatures}
        for index, answer in fork_map.run(
            lambda signature: self._compile(signature, jobs, store), parts, workers, fresh=True
        ):
            found[parts[index].id].append(self._answered(parts[index], answer))
        for signature in signatures:
            yield signature, merged(found[signature.id])

    def _answered(self, signature: CallSignature, found: CompileResult | fork_map.Died) -> CompileResult:
        return (
            self._failed(signature, (min(signature.points), -1), found.why)
            if isinstance(found, fork_map.Died)
            else found
        )

    def _compile(self, signature: CallSignature, signatures: list[CallSignature], store: Store) -> CompileResult:
        """Compile everything that calls of one signature need. Runs in a child, and never raises."""
        job = CompileJob(signature, signatures)

        def handle(frame: Frame, compile_frame: object) -> Any:
            try:
                return job.handle(frame, compile_frame)
            except Exception as error:  # of ours, or Dynamo's: the case's own code has not raised it
                job.failed = job.failed or one_line(error)
                raise

        try:
            with (
                dynamo_inputs.session(signature.dynamic(), MOST_GRAPHS),
                dynamo_guard_timing.skipped(),
                dynamo_guards.writing() as written,
            ):
                job.written = written
                with job.graphs_answered():
                    for number, points in signature.points.items():
                        job.mode = mode_of(self.cases[number])
                        first, *others = self._runner.hint_first(number, points)
                        for n, point in enumerate((first, first, *others)):
                            job.at = (number, point)
                            # Twice where it begins: the first call of all may have changed what the next one sees.
                            if n > 1 and self._hits(job, number, point):
                                continue
                            with dynamo_frames.hooked(handle):
                                broken = self._runner.run(number, point)
                            if job.failed:
                                return self._failed(signature, job.at, job.failed)
                            if broken is not None:
                                return CompileResult(broken=broken)
            if not job.met:
                why = "the call was made when it was looked at, and not when it was to be traced"
                return self._failed(signature, job.at, why)
            return CompileResult(job.results(store), unmatched=sorted(job.unmatched), fresh=True)
        except Exception as error:
            if os.environ.get("AOT_CACHE_DEBUG") == "1":
                traceback.print_exc()
            return self._failed(signature, job.at, job.failed or one_line(error))

    def _failed(self, signature: CallSignature, at: tuple[int, int], why: str) -> CompileResult:
        """Why calls could not be compiled, with the point where that was seen and the place in the user's code."""
        number, point = at if at[0] in signature.points else (min(signature.points), -1)
        where = self.points[number][
            point if point >= 0 else self._runner.hint_first(number, signature.points[number])[0]
        ]
        file = getattr(sys.modules.get(signature.module), "__file__", None)
        place = f"{one_point.short(file)}:{signature.line}" if isinstance(file, str) else ""
        told = "" if not place or _PLACE.search(why) else f" ({place})"
        return CompileResult(failed=dict.fromkeys(signature.points, f"at {dimensions.point_text(where)}: {why}{told}"))

    def _hits(self, job: CompileJob, number: int, point: int) -> bool:
        """Whether the guards of what was made say so of the calls that are recorded: then nothing has to run."""
        case = self.cases[number]
        if (job.signature.id, number) not in self._consistent or not self._recorded.knows(case.name, point):
            return False
        with self._runner.tensors(case):
            return job.hits(self._recorded.at(job.signature, case.name, point))

    def _reached(self, points: Mapping[int, Iterable[int]]) -> dict[str, list[dict[str, str]]]:
        return {
            self.cases[n].name: dimensions.describe((self.points[n][at] for at in points[n]), self.cases[n].dims)
            for n in sorted(points)
        }

    def _reached_all(self, signature: CallSignature) -> list[object]:
        return [
            sorted(
                (n, list(at)) for n, at in signature.points.items()
            ),  # what is in the store names points by their numbers
            self._reached({n: set(at) for n, at in signature.points.items()}),
            [self._runner.hint_first(n, at)[0] for n, at in signature.points.items()],
        ]


_PLACE = re.compile(r"\.py:\d+\)")
