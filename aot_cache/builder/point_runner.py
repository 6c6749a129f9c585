"""Runs points of a recipe's cases in forked children. Each child starts as a server does: models are made, nothing was called."""

from __future__ import annotations

import contextlib
import multiprocessing
import sys
from collections.abc import Iterator, MutableSequence, Sequence
from typing import Any

from aot_cache.builder import fingerprint, fork_map, one_point
from aot_cache.builder.call_signatures import seen_call
from aot_cache.builder.one_point import Broken
from aot_cache.builder.point_groups import TraceJob, TraceResult
from aot_cache.recipes.declare import Case
from aot_cache.recipes.dimensions import Point
from aot_cache.upstream.hooks import dynamo_frames, inductor_artifact
from aot_cache.upstream.hooks.dynamo_frames import Frame
from aot_cache.upstream.virtual import dynamo_inputs, process_settings
from aot_cache.upstream.virtual.torch_fake import NEEDS_VALUES, host_mode, without_launches


class PointRunner:
    """Runs points, which are named by the numbers of their case and of themselves. The process must have become the target.

    Attributes:
        skipped: functions seen so far that are compiled with another backend than Inductor.
        late_modules: module → file of what host code imported while it ran in children.
    """

    def __init__(self, cases: Sequence[Case], points: Sequence[Sequence[Point]], device: str) -> None:
        self._cases, self._points, self._device = cases, points, device
        self._host = host_mode(device)
        self._modules: frozenset[str] = frozenset()
        self.skipped: set[str] = set()
        self.late_modules: dict[str, str] = {}

    def make_arguments(self) -> None:
        """Make the arguments of all cases, and call nothing. Models that are made with them are shared by the children."""
        if self._modules:
            return
        self._modules = frozenset(sys.modules)
        for number, case in enumerate(self._cases):
            self._make(case, self._points[number][self.hint_first(number, range(len(self._points[number])))[0]])

    def _make(self, case: Case, point: Point) -> None:
        """Make the arguments of one point twice. A process-wide setting that only the first time changes is kept: it came
        with a model that is cached, and a server has it, too."""
        # Errors are reported where the point is run.
        with contextlib.suppress(Exception, SystemExit):
            with self._modes(case), process_settings.kept() as settings:
                case.call(point)
                first = settings.changed()
            if not first.values:
                return
            with self._modes(case), process_settings.kept() as settings:
                case.call(point)
                again = settings.changed()
            once = first.without(again)
            once.make()
            one_point.sets.setdefault(case.name, set()).update(once.names)

    def trace(self, jobs: Sequence[TraceJob]) -> Iterator[tuple[TraceJob, TraceResult | Broken]]:
        """Yield what each job's child saw, or why it could not run a point. Each job has a child of its own.

        Compiled functions run as plain Python, which is quick. Where that fails (`.numpy()` of a tensor without memory),
        the job is run again with Dynamo's graphs of them.
        """
        failed: list[tuple[TraceJob, Broken]] = []
        for job, found in self._in_children(jobs, traced=False):
            if isinstance(found, Broken):
                failed.append((job, found))
            else:
                yield job, found
        why = {id(job): broken for job, broken in failed}
        for job, found in self._in_children([job for job, _ in failed], traced=True):
            yield job, why[id(job)] if isinstance(found, Broken) else found

    def _in_children(self, jobs: Sequence[TraceJob], traced: bool) -> Iterator[tuple[TraceJob, TraceResult | Broken]]:
        at = multiprocessing.RawArray("q", max(1, len(jobs)))

        for index, found in fork_map.run(
            lambda number: self._trace(jobs[number], number, at, traced),
            range(len(jobs)),
            fresh=True,
        ):
            job = jobs[index]
            case = self._cases[job.group.case]
            if isinstance(found, fork_map.Died):
                yield job, one_point.died(case.name, self._points[job.group.case][at[index]], found.why)
                continue
            self.skipped |= found.skipped
            self.late_modules.update(found.modules)
            one_point.sets.setdefault(case.name, set()).update(found.sets)
            yield job, found.broken or found

    def _trace(self, job: TraceJob, number: int, here: MutableSequence[int], traced: bool) -> TraceResult:
        """Run a job's points; `here[number]` is always the current one, for whoever finds this process dead. Never raises.

        Compiled functions run as Dynamo's graphs if `traced`, else as plain Python.
        """
        case, seen = self._cases[job.group.case], TraceResult()

        def look(frame: Frame, compile_frame: Any) -> Any:
            if frame.wrapping is None:
                seen.skipped.add(f"{frame.module}:{frame.code.co_name}")
            else:
                seen.calls[-1][1].append(seen_call(frame, mode_of(case)))
            return compile_frame(None) if traced else dynamo_frames.run_without_compiling()

        with _uncompiled() if traced else contextlib.nullcontext(), dynamo_frames.hooked(look):
            for at in (job.first, *job.points):
                if traced:
                    dynamo_inputs.forget()  # else a call that was traced at another point is not seen here
                here[number] = at
                seen.calls.append((at, []))
                seen.broken = self.run(job.group.case, at)
                if seen.broken is not None:
                    break
        seen.modules = fingerprint.imported_since(self._modules)
        seen.sets = one_point.sets.get(case.name, set())
        return seen

    def run(self, case: int, point: int) -> Broken | None:
        """Run one point in this process. Returns why that failed, or None."""
        whole = self._cases[case]
        return one_point.run(whole, self._points[case][point], lambda: self._modes(whole), NEEDS_VALUES)

    @contextlib.contextmanager
    def tensors(self, case: Case) -> Iterator[None]:
        """The modes in which a case's tensors are made."""
        with self._host, case.modes(self._device):
            yield

    @contextlib.contextmanager
    def _modes(self, case: Case) -> Iterator[None]:
        with self._host, without_launches(), case.modes(self._device):
            yield

    def hint_first(self, number: int, mine: Sequence[int]) -> list[int]:
        """Points, first the one nearest to the declared hint: its sizes guide Inductor's choices."""
        case, points = self._cases[number], self._points[number]

        def distance(at: int) -> tuple[int, ...]:
            return tuple(abs(points[at][dim] - case.hint_of(dim)) for dim in case.dims)

        return sorted(mine, key=distance)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Let Dynamo trace, and run its graphs without a compiler."""

    def run(_wrapper: Any, _backend: Any, graph: Any, _inputs: Any, **_: Any) -> Any:
        return graph.forward

    with dynamo_inputs.session({}, most_graphs=8), inductor_artifact.instead(run):
        yield


def mode_of(case: Case) -> str:
    """Grad mode and autocast, as a plan has them."""
    return case.mode if case.autocast is None else f"{case.mode} {case.autocast}"
