"""Compiles a plan's units for the target, in forked children, into the store."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from aot_cache.artifact import key
from aot_cache.artifact.key import IR, NATIVE, UNITS
from aot_cache.artifact.manifest import NativeModule
from aot_cache.artifact.plan import Failure, Pair, Plan, Unit
from aot_cache.artifact.target import Target
from aot_cache.builder import fork_map, stored
from aot_cache.builder.kernels_trace import functions_at
from aot_cache.errors import TargetError, one_line
from aot_cache.recipes import dimensions
from aot_cache.recipes.declare import Recipe
from aot_cache.store import JsonValue, Store
from aot_cache.upstream.codec import triton_jit
from aot_cache.upstream.hooks import triton_launcher
from aot_cache.upstream.virtual import triton_compile

Progress = Callable[[str, int, int], None]


@dataclass
class Outcome:
    """The result of compiling a plan: `keys[i]` is the store key of `plan.units[i]`."""

    keys: list[str]
    memory_keys: list[str | None]
    compiled: int = 0
    native: list[NativeModule] = field(default_factory=list)
    failed: list[Failure] = field(default_factory=list)
    toolchain: dict[str, JsonValue] = field(default_factory=dict)


def toolchain(target: Target, line_info: bool) -> dict[str, JsonValue]:
    """The parts of the key that all kernels of this build share."""
    import triton

    return key.toolchain_parts(
        triton=triton.__version__,
        target={"backend": target.backend, "arch": target.arch, "warp_size": target.warp_size},
        toolkit=triton_compile.toolkit(target),
        environment=triton_compile.code_environment(),
        line_info=line_info,
    )


def compile_plan(
    plan: Plan,
    recipe: Recipe | None,
    target: Target,
    store: Store,
    *,
    line_info: bool,
    pythons: list[triton_launcher.Python],
    progress: Progress,
    workers: int | None = None,
    unclear: Mapping[str, str] | None = None,
) -> Outcome:
    """Compile the units that the store lacks. A unit that fails is listed in `failed`, and the others are still compiled.

    Args:
        unclear: kernel → why it is not compiled (see `kernels_trace.Trace`).
    """
    unclear = unclear or {}
    shared = toolchain(target, line_info)
    keys = [
        key.unit_key(
            key.unit_parts(key.function_of(u.kernel), u.source, u.specialization, u.options, u.overrides, shared)
        )
        for u in plan.units
    ]
    outcome = Outcome(keys, [_memory_key(unit) for unit in plan.units], toolchain=shared)
    first: dict[str, int] = {}
    for number, unit_key in enumerate(keys):
        first.setdefault(unit_key, number)
    # A plan file may be of another source than the installed one. Its units could not be loaded, so they fail even if stored.
    # This also imports the kernels in this process, and not only in a child, so that their source is part of the stamp.
    stale = set() if recipe is not None else {name for name in plan.closures if _differs(name, plan)}
    # In the order of their hashes: units that turn out to have equal IR are neighbours in the plan, and two children that
    # compile them at the same time would both do the full work.
    store.fetch(UNITS, first, _named)
    missing = [
        number
        for unit_key, number in sorted(first.items())
        if plan.units[number].kernel in {*stale, *unclear} or not _stored(store, unit_key)
    ]

    def run(number: int) -> _Result:
        if plan.units[number].kernel in unclear:
            return _Result(error=unclear[plan.units[number].kernel])

        def known(ir: str) -> object:
            record = store.get_record(IR, _ir_key(plan.units[number], ir, shared))
            return record if record is not None and store.holds(record["object"]) else None

        return _compile(plan, number, recipe, target, None if line_info else known)

    progress("compile", 0, len(missing))
    for done, (index, result) in enumerate(fork_map.run(run, missing, workers), 1):
        number = missing[index]
        if isinstance(result, fork_map.Died):
            result = _Result(error=result.why)
        _keep(store, plan.units[number], keys[number], result, outcome, shared)
        progress("compile", done, len(missing))
    if target.backend == "cuda":
        _build_native(plan, outcome, store, pythons, progress, workers)
    return outcome


def _differs(name: str, plan: Plan) -> str:
    """How an installed kernel differs from the plan's; empty if it does not, or is not installed."""
    function = triton_jit.unwrap(triton_jit.find(key.function_of(name)))
    return triton_jit.closure_differs(function, plan.closures[name]) if function is not None else ""


def _memory_key(unit: Unit) -> str | None:
    """Triton's in-memory key of a unit; None if only the serving process can compute it."""
    if triton_jit.names_a_function(unit.specialization):
        return None
    options = {name: triton_jit.decode(value) for name, value in unit.options.items()}
    return triton_jit.memory_key([triton_jit.decode_pair(pair) for pair in unit.specialization], options)


@dataclass
class _Result:
    binary: bytes = b""
    metadata: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    pruned: str = ""
    ir: str = ""
    same: dict[str, Any] | None = None
    """The record of another unit with equal IR."""


def _ir_key(unit: Unit, ir: str, shared: dict[str, Any]) -> str:
    return key.digest({**shared, "kernel": key.function_of(unit.kernel), "source": unit.source, "ir": ir})


def _named(record: Mapping[str, Any]) -> list[str]:
    """The object that a record of a unit or of a C module names."""
    return [record["object"]] if "pruned" not in record else []


def _stored(store: Store, unit_key: str) -> bool:
    record = store.get_record(UNITS, unit_key)
    return record is not None and ("pruned" in record or store.holds(record["object"]))


def _compile(
    plan: Plan, number: int, recipe: Recipe | None, target: Target, known: Callable[[str], object] | None
) -> _Result:
    unit = plan.units[number]
    try:
        function = _function(unit, plan, recipe)
        if function is None:
            return _Result(error="no kernel of this name can be reached: is its module installed here?")
        differs = triton_jit.closure_differs(function, plan.closures[unit.kernel])
        if differs:
            return _Result(error=f"the plan is of other source: {differs}")
        specialization = [triton_jit.decode(pair) for pair in unit.specialization]
        kwargs = {k: triton_jit.decode(v) for k, v in {**unit.overrides, **unit.options}.items()}
        compiled = triton_compile.compile_specialization(function, specialization, kwargs, target, known)
    except triton_compile.Known as found:
        return _Result(same=found.value)
    except Exception as error:
        if not unit.launched_without_tuner() and triton_compile.is_pruned_like_triton(error):
            return _Result(pruned=one_line(error))
        return _Result(error=one_line(error))
    return _Result(compiled.binary, compiled.metadata, ir=compiled.ir)


def made_by_host_code(unit: Unit, plan: Plan) -> bool:
    """Whether no module has the unit's kernel under its name, so that only running host code makes it."""
    function = _by_name(unit)
    return function is None or bool(triton_jit.closure_differs(function, plan.closures[unit.kernel]))


def integer_classes(unit: Unit, at: int) -> list[Pair]:
    """What Triton specializes a unit's parameter for, over integers of all classes. Empty if no module has the kernel."""
    function = _by_name(unit)
    return [] if function is None else triton_jit.integer_classes(function, at)


def _by_name(unit: Unit) -> Any:
    name = key.function_of(unit.kernel)
    function = triton_jit.unwrap(triton_jit.find(name))
    return function if function is not None and triton_jit.name_of(function) == name else None


def _function(unit: Unit, plan: Plan, recipe: Recipe | None) -> object:
    name, function = key.function_of(unit.kernel), _by_name(unit)
    if recipe is None or not made_by_host_code(unit, plan):
        return function
    # Made inside a function: run the host code that makes it. A missed unit may have no point, so another unit's point is used.
    others = (other.reached for other in plan.units if other.kernel == unit.kernel and other.reached)
    for case_name, boxes in (unit.reached or next(others, {})).items():
        case = next(c for c in recipe.cases if c.name == case_name)
        made = functions_at(case, dimensions.expand(boxes[:1])[0])
        return made.get(key.variant(name, unit.source), function)
    return function


def _keep(store: Store, unit: Unit, unit_key: str, result: _Result, outcome: Outcome, shared: dict[str, Any]) -> None:
    if result.error:
        outcome.failed.append(Failure(kernel=unit.kernel, unit=unit.id, error=result.error))
        return
    outcome.compiled += 1
    if result.pruned:
        store.put_record(UNITS, unit_key, {"pruned": result.pruned})
        return
    record = result.same
    if record is None:
        digest = store.put(result.binary)
        record = {"object": digest, "size": len(result.binary), "metadata": result.metadata}
        if result.ir:
            store.put_record(IR, _ir_key(unit, result.ir, shared), record)
    store.put_record(UNITS, unit_key, record)


# --- C modules ---------------------------------------------------------------------------------------------------------


class _NativeJob(NamedTuple):
    """One C module for one interpreter; `key` is Triton's digest of its source."""

    key: str
    source: str
    name: str
    python: triton_launcher.Python


def _build_native(
    plan: Plan,
    outcome: Outcome,
    store: Store,
    pythons: list[triton_launcher.Python],
    progress: Progress,
    workers: int | None,
) -> None:
    """The C modules that Triton would build with gcc when the kernels are loaded.

    Raises:
        StoreChanged: the store lacks a kernel that was compiled.
    """
    sources = {triton_launcher.source_key(s): (s, triton_launcher.UTILS) for s in [triton_launcher.utils_source()]}
    failed = {failure.unit for failure in outcome.failed}
    lost = {unit_key for unit, unit_key in zip(plan.units, outcome.keys) if unit.id in failed}
    made = [
        (u, stored.unit(store, u, unit_key)) for u, unit_key in zip(plan.units, outcome.keys) if unit_key not in lost
    ]
    launchers = [_launcher_source(unit, record["metadata"]) for unit, record in made if "pruned" not in record]
    launchers += [triton_launcher.launcher_source(types, None) for types in plan.launchers]
    for source in launchers:
        if source is not None:
            sources.setdefault(triton_launcher.source_key(source), (source, triton_launcher.LAUNCHER))
    jobs = [_NativeJob(k, s, name, python) for k, (s, name) in sorted(sources.items()) for python in pythons]
    store.fetch(NATIVE, [_native_key(job) for job in jobs], _named)
    records = {job: _native_stored(store, job) for job in jobs}
    todo = [job for job, record in records.items() if record is None]

    def run(job: _NativeJob) -> bytes | TargetError:
        try:
            return triton_launcher.build(job.source, job.name, job.python)
        except TargetError as error:
            return error

    for index, result in fork_map.run(run, todo, workers):
        job = todo[index]
        if isinstance(result, bytes):
            made_now = {"object": store.put(result), "size": len(result)}
            store.put_record(NATIVE, _native_key(job), made_now)
            records[job] = made_now
        else:
            message = result.why if isinstance(result, fork_map.Died) else str(result)
            kernel = f"{job.name} ({job.python.suffix})"
            outcome.failed.append(Failure(kernel=kernel, unit=job.key[:16], error=message))
    for job, record in records.items():
        if record is not None:
            outcome.native.append(
                NativeModule(name=job.name, source=job.key, suffix=job.python.suffix, object=record["object"])
            )


def _launcher_source(unit: Unit, metadata: dict[str, Any]) -> str | None:
    types = [triton_jit.decode(pair)[0] for pair in unit.specialization]
    return triton_launcher.launcher_source(types, metadata.get("tensordesc_meta"))


def _native_key(job: _NativeJob) -> str:
    return key.digest(
        {"schema": key.SCHEMA, "source": job.key, "suffix": job.python.suffix, "cc": os.environ.get("CC", "gcc")}
    )


def _native_stored(store: Store, job: _NativeJob) -> dict[str, Any] | None:
    record = store.get_record(NATIVE, _native_key(job))
    return record if record is not None and store.holds(record["object"]) else None
