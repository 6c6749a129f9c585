"""Trace and compile the graphs of a recipe: run its host code at every declared point on tensors without memory.

First all compiled functions run as plain Python, and what they are called with is looked at (`calls`). Then each kind of
call is a job for a forked child: it runs the points of that kind again with Dynamo on, compiles what Dynamo asks for with
Inductor, and answers Dynamo with the graph itself, run on tensors without memory. A point at which the guards of what
was compiled do not hold is compiled again, so that at the end every declared point has hit one of the graphs.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
import traceback
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from aot_cache import shapes
from aot_cache.build import pool
from aot_cache.build.calls import Kind, Survey, structure_of
from aot_cache.errors import AotCacheError, DeclarationError, TraceError
from aot_cache.recipe import Case, Recipe
from aot_cache.shapes import Point, Values
from aot_cache.upstream import dynamo_frames, dynamo_globals, dynamo_guards, dynamo_inputs, inductor_artifact, python_code
from aot_cache.upstream.dynamo_frames import Frame
from aot_cache.upstream.dynamo_package import CompiledFrame, Package
from aot_cache.upstream.torch_fake import NEEDS_VALUES, HostMode, without_launches

Progress = Callable[[str, int, int], None]
Json = Any
MOST_GRAPHS = 64
"""Graphs that one kind of call may split into before the build gives up on it."""


@dataclass
class Graph:
    """One frame's bytecode with its guards and the compiled graphs that it runs.

    Args:
        facts: what is said of it in the plan and the manifest, JSON.
        objects: sha256 → bytes of guards, bytecode, resume functions and Inductor's artifacts.
        points: case number → points that run it.
    """

    facts: dict[str, Json]
    objects: dict[str, bytes]
    points: dict[int, set[int]] = field(default_factory=dict)


@dataclass
class Traced:
    """All graphs of a recipe, and what could not be traced."""

    graphs: list[Graph] = field(default_factory=list)
    failed: list[dict[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)


def trace(recipe: Recipe, device: str, progress: Progress, workers: int | None = None) -> Traced:
    """Trace and compile every graph of `recipe`. The process must have become the target (`inductor_target.become`).

    Args:
        device: `cuda` or `cpu`, where the recipe's tensors are.

    Raises:
        DeclarationError: the recipe's own code raises at a point.
        TraceError: host code needs values that tensors here do not have.
    """
    runs = _Runs(recipe, device)
    began = time.perf_counter()
    kinds = runs.survey(progress)
    out = Traced(seconds={"survey": time.perf_counter() - began})
    out.skipped = sorted(runs.skipped)
    jobs = sorted(kinds.values(), key=lambda kind: -sum(map(len, kind.points.values())))
    if not jobs:
        return out
    dynamo_inputs.warm_up(device)
    progress("graphs", 0, len(jobs))
    known = {kind.structure for kind in jobs}
    found: dict[str, Graph] = {}
    for done, (index, answer) in enumerate(pool.run(lambda kind: runs.compile(kind, known), jobs, workers), 1):
        kind = jobs[index]
        graphs, failed = ([], answer.why) if isinstance(answer, pool.Died) else answer
        if failed:
            out.failed.append({"kernel": f"{kind.module}:{kind.function}", "unit": kind.id, "error": failed})
        for graph in graphs:
            same = found.setdefault(hashlib.sha256(repr(sorted(graph.facts.items())).encode()).hexdigest(), graph)
            for case, points in graph.points.items():
                same.points.setdefault(case, set()).update(points)
        progress("graphs", done, len(jobs))
    out.graphs = sorted(found.values(), key=lambda g: repr(sorted(g.facts.items())))
    out.seconds["graphs"] = time.perf_counter() - began - out.seconds["survey"]
    return out


class _Runs:
    """Runs a recipe's cases on tensors without memory."""

    def __init__(self, recipe: Recipe, device: str) -> None:
        self.recipe, self.device = recipe, device
        self.points = [shapes.enumerate_points(case.dims).points for case in recipe.cases]
        self.skipped: set[str] = set()

    def survey(self, progress: Progress) -> dict[str, Kind]:
        """Every kind of call that the recipe makes."""
        kinds: dict[str, Kind] = {}
        total, done = sum(map(len, self.points)), 0
        progress("calls", 0, total)
        for number, case in enumerate(self.recipe.cases):
            for group in _by_values(case, self.points[number]):
                survey = Survey()
                at = 0

                def look(frame: Frame, _compile: Any) -> Any:
                    if frame.wrapping is None:
                        self.skipped.add(f"{frame.module}:{frame.code.co_name} is not compiled by Inductor")
                    else:
                        survey.add(frame, _mode(case), at)  # noqa: B023  # run in this turn of the loop only
                    return dynamo_frames.run_without_compiling()

                with _hook(look):
                    for at in group:
                        survey.next_point()
                        self.run(case, self.points[number][at])
                        done += 1
                        progress("calls", done, total)
                for kind in survey.kinds(number).values():
                    same = kinds.setdefault(kind.id, kind)
                    same.points[number] = sorted({*same.points.get(number, ()), *kind.points[number]})
        return kinds

    def run(self, case: Case, point: Point) -> None:
        """Run one point.

        Raises:
            DeclarationError, TraceError: as `trace` says.
        """
        where = ", ".join(f"{k}={v}" for k, v in point.items())
        try:
            with HostMode(self.device), without_launches(), case.modes(self.device):
                case.call(point)()
        except AotCacheError:
            raise
        except NEEDS_VALUES as error:
            raise TraceError(
                f"case {case.name!r} to run at {where}",
                f"{_place(error)} reads the values of a tensor ({error})",
                "hand the number in as an argument",
            ) from error
        except Exception as error:
            raise DeclarationError(
                f"case {case.name!r} to run at {where}",
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''} ({_place(error)})",
                "fix the recipe, or narrow its range",
            ) from error

    def compile(self, kind: Kind, known: set[str]) -> tuple[list[Graph], str]:
        """Everything that calls of one kind need; and why that is not all, empty when it is. Runs in a child."""
        job = _Job(kind, known)
        try:
            with dynamo_inputs.session(kind.dynamic(), MOST_GRAPHS), dynamo_guards.writing() as written:
                job.written = written
                with job.graphs_answered():
                    for number, points in kind.points.items():
                        case = self.recipe.cases[number]
                        for point in _hint_first(case, self.points[number], points):
                            job.at = (number, point)
                            job.mode = _mode(case)
                            with _hook(job.handle):
                                self.run(case, self.points[number][point])
                            if job.failed:
                                return job.results(), job.failed
        except Exception as error:
            return job.results(), job.failed or _one_line(error)
        return job.results(), job.failed


class _Job:
    """One kind of call in its child: what Dynamo asks for, and what was made."""

    def __init__(self, kind: Kind, known: set[str]) -> None:
        self.kind, self.known = kind, known
        self.at = (0, 0)
        self.mode = ""
        self.failed = ""
        self.written = dynamo_guards.Written()
        self._frames: list[tuple[CompiledFrame, dict[str, Json]]] = []
        self._artifacts: dict[str, bytes] = {}
        self._users: dict[str, dict[int, set[int]]] = {}

    def handle(self, frame: Frame, compile_frame: Any) -> Any:
        """Dynamo is about to compile `frame`."""
        structure, found = structure_of(frame, self.mode)
        mine = self.kind.fits(structure, found)
        if structure in self.known and not mine:
            return dynamo_frames.run_without_compiling()
        if mine:
            dynamo_inputs.mark(frame, self.kind.dynamic())
        package = Package(frame.code, frame.module)
        answer = compile_frame(package)
        self._keep(package.frame, frame, answer)
        return answer

    def _keep(self, made: CompiledFrame, frame: Frame, answer: Any) -> None:
        name = f"{frame.module}:{frame.code.co_name}"
        if answer.guarded_code is None:
            self.failed = f"Dynamo did not compile {name}: {answer.skip_reason or 'it gave no reason'}"
        elif made.bypassed or made.dynamo_code is None:
            self.failed = f"Dynamo cannot write {name} down ({made.bypassed})"
        elif self.written.nameless:
            self.failed = f"{name} depends on objects that have no name: {'; '.join(self.written.nameless)}"
        else:
            guards = dynamo_guards.expressions(answer.guarded_code.guard_manager)
            facts = {
                "identities": list(self.written.identities),
                "guards": guards,
                "wrapping": frame.wrapping,
                "mode": self.mode,
                "settings": dynamo_globals.settings(),
            }
            self._frames.append((made, facts))

    @contextlib.contextmanager
    def graphs_answered(self) -> Iterator[None]:
        """Inductor compiles and its artifact is kept; Dynamo gets the graph itself."""

        def compiled(wrapper: Any, backend: Any, graph: Any, inputs: Any, **kwargs: Any) -> Any:
            name = graph._backend_id
            self._artifacts[name] = inductor_artifact.compile_graph(wrapper, backend, graph, inputs, **kwargs)
            run = dynamo_inputs.answer(graph)

            def answer(*args: Any) -> Any:
                self._users.setdefault(name, {}).setdefault(self.at[0], set()).add(self.at[1])
                return run(*args)

            return answer

        with inductor_artifact.instead(compiled):
            yield

    def results(self) -> list[Graph]:
        """What was made, as data."""
        return [self._graph(made, facts) for made, facts in self._frames]

    def _graph(self, made: CompiledFrame, facts: dict[str, Json]) -> Graph:
        objects: dict[str, bytes] = {}

        def keep(data: bytes) -> str:
            digest = hashlib.sha256(data).hexdigest()
            objects[digest] = data
            return digest

        assert made.dynamo_code is not None
        graphs = {name: keep(self._artifacts[name]) for name in made.graphs}
        names = {name: f"__aot_graph_{digest[:24]}" for name, digest in graphs.items()}
        resumes = {}
        for name, (code, module) in made.resumes.items():
            data = python_code.dump(code, {}, f"<{module}>")
            digest = keep(data)
            names[name] = f"__aot_resume_{digest[:24]}"
            resumes[names[name]] = {"module": module, "code": digest, "free": bool(code.co_freevars)}
        bytecode = python_code.dump(made.dynamo_code, names, f"<{made.module}>")
        points: dict[int, set[int]] = {}
        for name in made.graphs:
            for case, at in self._users.get(name, {}).items():
                points.setdefault(case, set()).update(at)
        code = python_code.load(python_code.dump(made.code, {}, ""))
        return Graph(
            {
                **facts,
                "settings": keep(facts["settings"].encode()),
                "module": made.module,
                "function": getattr(made.code, "co_qualname", made.code.co_name),
                "line": made.code.co_firstlineno,
                "code": python_code.digest(code),
                "guard_state": keep(made.guards),
                "bytecode": keep(bytecode),
                "graphs": {names[name]: digest for name, digest in graphs.items()},
                "imports": dict(sorted(made.imports.items())),
                "resumes": resumes,
                "inlined": _inlined(made.inlined),
                "dynamic": self.kind.dynamic(),
            },
            objects,
            points,
        )


def _inlined(codes: list[types.CodeType]) -> list[list[str]]:
    """[module, function, digest] of each traced function outside of torch and Python."""
    out = set()
    for code in codes:
        if code.co_name.startswith("torch_dynamo_resume_in"):
            continue  # the rest of a function that is checked itself
        module = dynamo_inputs.module_of(code)
        if module is None:
            continue
        found = python_code.place(code, module)
        if found is not None:
            out.add((module, found[0], python_code.digest(found[1])))
    return [list(item) for item in sorted(out)]


@contextlib.contextmanager
def _hook(handler: dynamo_frames.Instead) -> Iterator[None]:
    undo = dynamo_frames.instead_of_compiling(handler)
    try:
        yield
    finally:
        undo()


def _mode(case: Case) -> str:
    return case.mode if case.autocast is None else f"{case.mode} {case.autocast}"


def _by_values(case: Case, points: list[Point]) -> Iterator[list[int]]:
    """Points that differ in `Range`s only, as numbers."""
    static = [name for name, dim in case.dims.items() if isinstance(dim, Values)]
    groups: dict[tuple[int, ...], list[int]] = {}
    for number, point in enumerate(points):
        groups.setdefault(tuple(point[name] for name in static), []).append(number)
    yield from groups.values()


def _hint_first(case: Case, points: list[Point], mine: list[int]) -> list[int]:
    """The points of a kind, first the one nearest to the declared hint: its sizes guide Inductor's choices."""

    def distance(number: int) -> tuple[int, ...]:
        return tuple(abs(points[number][dim] - case.hint_of(dim)) for dim in case.dims)

    return sorted(mine, key=distance)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' / '.join(lines[:1] + lines[-1:] if len(lines) > 1 else lines)}"[:600]


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    outside = [f for f in frames if "/torch/" not in f.filename and "/aot_cache/" not in f.filename] or frames
    return f"{outside[-1].filename}:{outside[-1].lineno}"
