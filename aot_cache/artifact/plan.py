"""The plan: every unit that a recipe can launch, with the points that reach it. Readable, diffable JSON; no torch.

The builder makes it on the virtual device, from a recipe or an engine's start, `aot-cache record` on a real GPU; the format is
the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar

from aot_cache.artifact import compiled_function
from aot_cache.artifact.compiled_function import CompiledFunction
from aot_cache.artifact.key import function_of, told_apart, variant
from aot_cache.artifact.reached import Reached, together
from aot_cache.errors import DeclarationError
from aot_cache.recipes.dimensions import Point, point_text
from aot_cache.store import JsonObject, JsonValue, write_atomic

if TYPE_CHECKING:
    from aot_cache.recipes.declare import Case
    from aot_cache.recipes.dimensions import Enumeration

SCHEMA = 1
T = TypeVar("T")
Origin = Literal["traced", "recorded", "started"]
"""By a recipe's points, by a program on a GPU, or by an engine on the virtual device."""
Encoded: TypeAlias = JsonValue
"""An argument of a kernel launch as JSON, see `upstream.codec.triton_jit.encode`."""
Pair: TypeAlias = Mapping[str, Sequence[Any]]
"""`{"t": [type, value]}`: the specialization of one kernel parameter, encoded."""
Config: TypeAlias = Mapping[str, Encoded]
"""The launch arguments that an autotuner's config sets."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One specialization of one kernel.

    Args:
        kernel: `module:qualname`; with `@` and the start of the source digest where several kernels share it (`key.variant`).
        source: digest of the kernel's source closure.
        specialization: Triton's (type, value) for each parameter, encoded.
        options: launch options in the order in which they were passed.
        overrides: backend options that are also kernel parameters.
        via: `[tuning, candidate]` pairs through which it is launched; `[-1, -1]` is a launch without a tuner.
        reached: the points that reach it.
        ranks: the ranks that launch it; empty if all do.
    """

    kernel: str
    source: str
    specialization: Sequence[Pair]
    options: Mapping[str, Encoded]
    overrides: Mapping[str, Encoded] = field(default_factory=dict)
    via: Sequence[Sequence[int]] = field(default_factory=list)
    reached: Reached = field(default_factory=dict)
    ranks: Sequence[int] = field(default_factory=list)

    @property
    def id(self) -> str:
        """Short, stable id of what is compiled: covers the source, not the target."""
        options = list(self.options.items())  # their order is part of Triton's key
        return _digest([function_of(self.kernel), self.source, self.specialization, options, self.overrides])[:16]

    def launched_without_tuner(self) -> bool:
        return not self.via or [-1, -1] in self.via


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One choice that an autotuner makes: between `candidates`, under `key`.

    Args:
        kernel: `module:qualname` of the kernel.
        tuner: index of the autotuner among those around the kernel.
        key: the tuner's key, encoded.
        candidates: each config's launch arguments, after pruning, in order.
        choice: the config that was measured fastest; None if unmeasured, then the first that fits is used.
        measured: device, method and spread of the measurement; empty without one.
        reached: the points that need it.
        ranks: the ranks that need it; empty if all do.
    """

    kernel: str
    tuner: int
    key: Sequence[Encoded]
    candidates: Sequence[Config]
    choice: Config | None = None
    measured: JsonObject = field(default_factory=dict)
    reached: Reached = field(default_factory=dict)
    ranks: Sequence[int] = field(default_factory=list)

    @property
    def id(self) -> str:
        return _digest([self.kernel, self.tuner, self.key])[:16]


@dataclass(frozen=True, kw_only=True)
class CasePlan:
    """One case as it was enumerated."""

    name: str
    dims: Mapping[str, str]
    points: int
    total: int
    sampled: Sequence[str]
    mode: str = "inference"
    autocast: str | None = None
    missed: Sequence[Point] = field(default_factory=list)
    """Points outside `dims` that were visited because a serving process missed them."""
    doc: str = ""
    """The case's description, one line."""
    sets: Sequence[str] = field(default_factory=list)
    """Process-wide settings that the case changes while it makes arguments; its calls are built under them."""

    @classmethod
    def of(cls, case: Case, points: Enumeration) -> CasePlan:
        """The plan of `case`, of which `points` are enumerated."""
        return cls(
            name=case.name,
            dims={name: dim.text for name, dim in case.dims.items()},
            points=len(points.points),
            total=points.total,
            sampled=list(points.sampled),
            mode=case.mode,
            autocast=case.autocast,
            missed=points.points[len(points.points) - points.added :],
            doc=case.doc,
        )


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that the bundle lacks because its build failed: a kernel's unit, a compiled call, a C module, or a case.

    Args:
        kernel: its name; `case NAME` for a case.
        unit: id of the unit or of the call; for a case, the point.
        error: the reason, as text.
        reached: the points that lack it; None if unknown.
    """

    kernel: str
    unit: str
    error: str
    reached: Reached | None = None

    def text(self) -> dict[str, str]:
        """The fields that are printed, also by `--json`."""
        return {"kernel": self.kernel, "unit": self.unit, "error": self.error}


@dataclass(frozen=True, kw_only=True)
class FailedCase:
    """A case that could not be run. The other cases are built without it.

    Args:
        case: its name.
        point: the first point at which it failed.
        place: `file:line` in the recipe author's code; empty if unknown.
        why: the error.
        rank: `, as rank 2` if the process was one of several ranks.
    """

    case: str
    point: Point
    place: str
    why: str
    rank: str = ""

    @property
    def name(self) -> str:
        """Its name in lists of failures, which also hold kernels and functions."""
        return f"case {self.case}"

    @property
    def text(self) -> str:
        """The failure in one line."""
        return f"at {self.where}{self.rank}: {self.why}" + (f" ({self.place})" if self.place else "")

    @property
    def where(self) -> str:
        return point_text(self.point)

    def failure(self) -> Failure:
        """The entry for the bundle's list of failures."""
        return Failure(kernel=self.name, unit=self.where, error=self.text)


@dataclass(frozen=True, kw_only=True)
class CallPlan:
    """One call signature of a compiled function, for which there is at least one graph.

    Args:
        function: `module:qualname`.
        line: its line in the source file, for display.
        id: digest of code, compile config, the arguments' structure and sizes.
        mode: grad mode and autocast.
        wrapping: the compile config: backend, options and dynamic of its `torch.compile`.
        dynamic: expression of an argument → [dimension, low, high] for each size that changes with the points; dimension -1
            is an integer argument itself.
        hint: case → the point at which it is traced first.
        reached: the points at which it is called.
        structure: digest of everything about the call but its sizes (see `misses.call_signature.structure_of`).
        follows: case → how the sizes, parameters' excepted, follow from its dimensions (see `misses.size_relations`); one entry
            for each call site with this signature.
    """

    function: str
    line: int
    id: str
    mode: str
    wrapping: JsonObject
    dynamic: Mapping[str, Sequence[Sequence[int]]]
    hint: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    reached: Reached = field(default_factory=dict)
    structure: str = ""
    follows: Mapping[str, Sequence[Mapping[str, Sequence[Any]]]] = field(default_factory=dict)


Signature = tuple["str | Signature", ...]
"""Triton's names of argument types, in order: `("*bf16", "i32", "constexpr")`. A tuple argument has a tuple."""


def signature(data: Sequence[Any]) -> Signature:
    """A signature from its JSON."""
    return tuple(one if isinstance(one, str) else signature(one) for one in data)


def _lists(types: Sequence[Any]) -> list[Any]:
    """Signatures as JSON has them."""
    return [one if isinstance(one, str) else _lists(one) for one in types]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All units of a recipe for one target, or of a program or an engine, see `Origin`."""

    recipe: str
    target: str
    origin: Origin = "traced"
    triton: str = ""
    cases: Sequence[CasePlan] = field(default_factory=list)
    units: Sequence[Unit] = field(default_factory=list)
    tunings: Sequence[Tuning] = field(default_factory=list)
    closures: Mapping[str, JsonObject] = field(default_factory=dict)
    """Kernel → source closure (see `upstream.codec.triton_jit.closure`)."""
    calls: Sequence[CallPlan] = field(default_factory=list)
    """Calls of compiled functions."""
    ranks: int = 1
    """The world size that it is for."""
    failed: Sequence[FailedCase] = field(default_factory=list)
    """Cases that failed, so that the plan has nothing of them. They are in `cases`, too, because they are declared."""
    caches: str = ""
    """Digest of the file beside a recorded plan, with entries of the engine's own compile cache (see `engine_cache.beside`)."""
    launchers: Sequence[Signature] = ()
    """Recorded: the argument types of each kernel for which Triton built a launcher in C (up to Triton 3.6). Kernels inside
    compiled graphs need them, too, and are no units."""

    functions: Sequence[CompiledFunction] = field(default_factory=list)
    """Recorded: compiled functions and how they were called. The recipe `recorded` calls them again."""

    def to_json(self) -> dict[str, Any]:
        found = {"aot-cache plan": SCHEMA, **asdict(self), "launchers": _lists(self.launchers)}
        for name in ("caches", "launchers", "functions"):
            if not found[name]:
                del found[name]
        return found

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Plan:
        """Raises DeclarationError if `data` is not a plan of this schema."""
        if data.get("aot-cache plan") != SCHEMA:
            raise DeclarationError(
                f"a plan of schema {SCHEMA}",
                f"schema {data['aot-cache plan']!r}" if "aot-cache plan" in data else "none",
                "write the plan again with this version of aot-cache",
            )
        try:
            return cls(
                recipe=data["recipe"],
                target=data["target"],
                origin=data["origin"],
                triton=data["triton"],
                cases=[CasePlan(**c) for c in data["cases"]],
                units=[Unit(**u) for u in data["units"]],
                tunings=[Tuning(**t) for t in data["tunings"]],
                closures=dict(data["closures"]),
                calls=[CallPlan(**c) for c in data.get("calls", [])],
                ranks=data.get("ranks", 1),
                failed=[FailedCase(**f) for f in data.get("failed", [])],
                caches=data.get("caches", ""),
                launchers=tuple(signature(one) for one in data.get("launchers", ())),
                functions=[compiled_function.from_json(one) for one in data.get("functions", [])],
            )
        except (KeyError, TypeError) as error:
            raise DeclarationError(
                f"the plan is incomplete: {type(error).__name__}: {error}", hint="write it again"
            ) from error

    def write(self, path: Path) -> None:
        """Write the plan with one unit per line, so that a diff of two plans is readable."""
        data = self.to_json()
        lines = ["{"]
        for name, value in data.items():
            if name in ("units", "tunings", "cases", "calls", "failed", "launchers", "functions") and value:
                body = ",\n  ".join(json.dumps(v) for v in value)
                lines.append(f"{json.dumps(name)}: [\n  {body}\n],")
            else:
                lines.append(f"{json.dumps(name)}: {json.dumps(value)},")
        lines[-1] = lines[-1].rstrip(",")
        write_atomic(path, ("\n".join([*lines, "}"]) + "\n").encode())

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Raises DeclarationError if the file is not a plan."""
        try:
            data = json.loads(path.read_text())
        except OSError as error:
            raise DeclarationError(
                f"cannot read plan {path}: {error.strerror or error}", hint="correct the path"
            ) from error
        except (ValueError, RecursionError) as error:
            raise DeclarationError(f"plan {path} is not JSON: {error}", hint="give a plan or a bundle") from error
        if not isinstance(data, dict):
            raise DeclarationError(
                f"a JSON object in plan {path}", f"JSON of type {type(data).__name__}", "give a plan or a bundle"
            )
        return cls.from_json(data)

    @classmethod
    def read_kernels(cls, path: Path) -> Plan:
        """Read a plan that has kernels only: compiled functions are traced from a recipe's own code.

        Raises:
            DeclarationError: the file is not a plan, or has call signatures of compiled functions.
        """
        plan = cls.read(path)
        if plan.calls:
            names = ", ".join(sorted({call.function for call in plan.calls})[:3])
            raise DeclarationError(
                f"plan {path} has call signatures of compiled functions ({len(plan.calls)}: {names}), which need the recipe",
                hint="build from the recipe with --model: graphs are traced from its code",
            )
        return plan

    def without(self, cases: Collection[str]) -> tuple[Plan, list[int]]:
        """(the plan without what only these cases reach, the indices of the units that stay).

        A unit that no case reaches stays: it comes from a miss or a recording.
        """
        tunings = [n for n, tuning in enumerate(self.tunings) if _stays(tuning.reached, cases)]
        renumber = {-1: -1, **{old: new for new, old in enumerate(tunings)}}
        units = [n for n, unit in enumerate(self.units) if _stays(unit.reached, cases)]
        kept = [
            replace(
                unit,
                via=[[renumber[t], c] for t, c in unit.via if t in renumber],
                reached=_others(unit.reached, cases),
            )
            for unit in (self.units[n] for n in units)
        ]
        kernels = {unit.kernel for unit in kept}
        plan = replace(
            self,
            units=kept,
            tunings=[replace(t, reached=_others(t.reached, cases)) for t in (self.tunings[n] for n in tunings)],
            closures={name: closure for name, closure in self.closures.items() if name in kernels},
            calls=[
                replace(
                    call,
                    hint=_others(call.hint, cases),
                    reached=_others(call.reached, cases),
                    follows=_others(call.follows, cases),
                )
                for call in self.calls
                if _stays(call.reached, cases)
            ],
        )
        return plan, units

    def with_sets(self, by_case: Mapping[str, Iterable[str]]) -> Plan:
        """The plan, with the process-wide settings that each case changes while it makes arguments."""
        cases = [replace(case, sets=sorted({*case.sets, *by_case.get(case.name, ())})) for case in self.cases]
        return replace(self, cases=cases)

    @property
    def sampled(self) -> list[str]:
        """Dimensions that were sampled, as `case.dimension`; empty when everything declared was enumerated."""
        return [f"{case.name}.{dim}" for case in self.cases for dim in case.sampled]


def _others(by_case: Mapping[str, T], cases: Collection[str]) -> dict[str, T]:
    return {name: value for name, value in by_case.items() if name not in cases}


def _stays(reached: Reached, cases: Collection[str]) -> bool:
    return not reached or bool(_others(reached, cases))


@dataclass(frozen=True)
class Difference:
    """Units and tunings that only one of two plans has."""

    only_left: list[Unit]
    only_right: list[Unit]
    tunings_left: list[Tuning]
    tunings_right: list[Tuning]

    @property
    def same(self) -> bool:
        return not (self.only_left or self.only_right or self.tunings_left or self.tunings_right)


def diff(left: Plan, right: Plan) -> Difference:
    """Compare what two plans launch; the points that reach it are ignored."""
    units_left, units_right = {u.id: u for u in left.units}, {u.id: u for u in right.units}
    tunings_left = {tuning_identity(t, function_of(t.kernel)): t for t in left.tunings}
    tunings_right = {tuning_identity(t, function_of(t.kernel)): t for t in right.tunings}
    return Difference(
        [u for i, u in units_left.items() if i not in units_right],
        [u for i, u in units_right.items() if i not in units_left],
        [t for i, t in tunings_left.items() if i not in tunings_right],
        [t for i, t in tunings_right.items() if i not in tunings_left],
    )


def merge(plans: Iterable[Plan]) -> Plan:
    """Merge plans recorded by the processes of one program, or traced as the ranks of one job. A choice that is for some ranks
    only stays beside the others.

    Raises:
        DeclarationError: there is no plan, or they are for different targets.
    """
    parts = list(plans)
    if not parts:
        raise DeclarationError("there is no recorded plan to merge", hint="did the program launch a Triton kernel?")
    targets = sorted({p.target for p in parts})
    if len(targets) > 1:
        raise DeclarationError("recordings of one target", ", ".join(targets), "record each target on its own")
    units: dict[str, Unit] = {}
    tunings: dict[tuple[str, tuple[int, ...]], Tuning] = {}
    numbers: dict[tuple[str, tuple[int, ...]], int] = {}
    closures: dict[str, JsonObject] = {}
    for plan in (_renamed(p, {u.kernel: variant(function_of(u.kernel), u.source) for u in p.units}) for p in parts):
        renumber = {-1: -1}
        for number, tuning in enumerate(plan.tunings):
            whose = tuple(tuning.ranks) if tuning.choice is not None else ()
            identity = (tuning_identity(tuning, tuning.kernel), whose)
            known = tunings.setdefault(identity, tuning)
            tunings[identity] = replace(
                known,
                choice=known.choice or tuning.choice,  # some processes may not have tuned
                reached=together([known.reached, tuning.reached]),
            )
            renumber[number] = numbers.setdefault(identity, len(numbers))
        for unit in plan.units:
            via = [[renumber[t], c] for t, c in unit.via]
            same = units.get(unit.id, replace(unit, via=via))
            units[unit.id] = replace(
                same,
                via=[list(v) for v in sorted({tuple(v) for v in [*same.via, *via]})],
                reached=together([same.reached, unit.reached]),
            )
        closures.update(plan.closures)
    return named(
        Plan(
            recipe=parts[0].recipe,
            target=parts[0].target,
            origin=parts[0].origin,
            triton=parts[0].triton,
            units=list(units.values()),
            tunings=list(tunings.values()),
            closures=closures,
            failed=each_once(failed for plan in parts for failed in plan.failed),
            launchers=tuple(sorted({one for plan in parts for one in plan.launchers}, key=json.dumps)),
            functions=compiled_function.merged(one for plan in parts for one in plan.functions),
        )
    )


def named(plan: Plan) -> Plan:
    """`plan` with the shortest kernel names that are still unique."""
    kernels = [unit.kernel for unit in plan.units] + [tuning.kernel for tuning in plan.tunings]
    return _renamed(plan, told_apart([*kernels, *plan.closures]))


def _renamed(plan: Plan, names: Mapping[str, str]) -> Plan:
    return replace(
        plan,
        units=[replace(unit, kernel=names.get(unit.kernel, unit.kernel)) for unit in plan.units],
        tunings=[replace(tuning, kernel=names.get(tuning.kernel, tuning.kernel)) for tuning in plan.tunings],
        closures={names.get(name, name): closure for name, closure in plan.closures.items()},
    )


def each_once(failed: Iterable[FailedCase]) -> list[FailedCase]:
    """The first failure of each case."""
    found: dict[str, FailedCase] = {}
    for one in failed:
        found.setdefault(one.case, one)
    return list(found.values())


def extended(plan: Plan, parts: Iterable[Plan]) -> Plan:
    """`plan`, plus the units and tunings of `parts` that it lacks.

    Raises:
        DeclarationError: they are for different targets.
    """
    return replace(merge([plan, *parts]), cases=plan.cases, calls=plan.calls, ranks=plan.ranks)


def joined(plans: Sequence[Plan]) -> Plan:
    """The plans of a build or a merge as one: `extended`, of which the first gives everything but units and tunings."""
    first, *others = plans
    return extended(first, others) if others else first


def tuning_identity(tuning: Tuning, kernel: str) -> str:
    """Digest that identifies a tuning, of a kernel whose name is `kernel`."""
    return _digest([kernel, tuning.tuner, tuning.key, tuning.candidates])


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
