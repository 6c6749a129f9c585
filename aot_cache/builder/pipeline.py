"""`build` from end to end: recipe, plans and misses → workers (trace, compile) → bundle. Imports neither torch nor Triton."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from aot_cache import tested
from aot_cache.artifact import engine_cache, key, plan_of_ranks
from aot_cache.artifact.at_start import Mark
from aot_cache.artifact.engine_cache import Caches
from aot_cache.artifact.manifest import plain, split
from aot_cache.artifact.plan import Plan
from aot_cache.artifact.target import Target
from aot_cache.builder import engine_start, fingerprint, workers
from aot_cache.builder.assemble import assemble, covered
from aot_cache.builder.engine_start import NO_START, Engine, EngineStart
from aot_cache.builder.fingerprint import Inputs
from aot_cache.builder.workers import BuildResult
from aot_cache.errors import AotCacheError, DeclarationError, StoreChanged, TraceError
from aot_cache.files import scratch
from aot_cache.misses import file as miss_file
from aot_cache.misses.describe import asked
from aot_cache.misses.file import GRAPH, Misses
from aot_cache.recipes import declare as declaring
from aot_cache.recipes import options
from aot_cache.store import INCOMPLETE, Store, read_bundle, signature, trust, use, write_bundle

Progress = Callable[[str, int, int], None]
STAMPS = "stamps"
PLAN = ".plan.json"
_ATTEMPTS = 3
RECORDED = "recorded"
"""The recipe that makes the calls of a recorded plan again; its option `config` is the plan's file."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to build.

    Args:
        model: a recipe's name or `module:object`, with its options (see `declare.load`); None if there are only plans.
        plans: plan files (recorded, merged or edited), whose kernels are built, too. They need no recipe.
        target: the target.
        store: the store's folder.
        remote_store: URL of a store that builders share, behind the folder (see `remote.shared_store`); None: there is none.
        ranges: dimension → text, which replaces the declared range.
        out: the bundle's path; default `STORE/bundles/MODEL-OPTIONS-TARGET.safetensors` (see `options.file_name`).
        line_info: keep line numbers for profilers (binaries then hold paths).
        pythons: further interpreters to build C modules for.
        workers: number of processes; default: one per core.
        misses: misses files of serving processes; what they list is built, too.
        ranks: the world size; graphs that depend on the rank are built for each rank (see `graphs_per_rank`). None: the recipe's.
        at_start: constants of kernels that are known only when the server starts, see `artifact.at_start.Mark`.
        neighbours: also build what is beside recorded and missed specializations, see `builder.neighbours`.
        engine: an engine with its own command line, which is started on the virtual device (see `builder.engine_start`).
    """

    target: Target
    store: Path
    remote_store: str | None = None
    model: str | None = None
    plans: tuple[Path, ...] = ()
    ranges: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None
    line_info: bool = False
    pythons: tuple[str, ...] = ()
    workers: int | None = None
    misses: tuple[Path, ...] = ()
    ranks: int | None = None
    at_start: tuple[str, ...] = ()
    neighbours: bool = True
    engine: Engine | None = None


@dataclass(kw_only=True)
class Built:
    """What a build did, and where its bundle is. `misses` says what became of the given misses.

    `digest` is empty if everything failed: then no bundle was written, and an existing one was not changed.
    Of `declared` points, `points` were run on the virtual device; for `covered` of these everything that they reach was built.
    The bundle is for world size `ranks`.
    """

    target: str
    path: Path
    digest: str
    size: int
    units: int
    graphs: int
    compiled: int
    pruned: int
    failed: list[dict[str, Any]]
    sampled: list[str]
    points: int
    seconds: float
    nothing_to_do: bool = False
    misses: dict[str, Any] = field(default_factory=dict)
    per_rank: dict[str, str] = field(default_factory=dict)
    """Function whose graphs are built for each rank → why."""
    apart: dict[str, str] = field(default_factory=dict)
    """Kernel with specializations that only some ranks launch → how many, and which ranks."""
    sets: dict[str, list[str]] = field(default_factory=dict)
    """Case → process-wide settings that it changes while it makes arguments."""
    declared: int = 0
    covered: int = 0
    ranks: int = 1
    neighbours: int = 0
    """Of the units, how many were neither declared nor recorded, see `builder.neighbours`."""
    not_built: list[str] = field(default_factory=list)
    """Compiled functions that plans have recorded, and that the recipe beside them does not call."""
    engine: dict[str, Any] = field(default_factory=dict)
    """Of an engine that was started on the virtual device: its `name` and `version`, the `models` that it compiled itself, how
    many kinds of `requests` it answered, what launched each kernel `first`, what is `unreached`, and where it read values that
    nobody knows (`assumed`: place → what)."""
    untested: str = ""
    """Why the releases of torch, Triton and transformers that built it are doubtful; empty if they are fine."""
    warnings: list[str] = field(default_factory=list)
    """What else a person should know, such as a remote store that did not answer, or a store that others can write."""

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "path": str(self.path)}


def build(request: Request, progress: Progress = lambda *_: None) -> Built:
    """Build one bundle.

    Raises:
        UnknownName, DeclarationError, TraceError: the request is wrong, or nothing can be built from it. No bundle was written.
        StoreUnwritable: the store cannot be written, and is unchanged.
    """
    store = Store(request.store)
    with store.in_use():
        return _build(request, store, progress)


def _build(request: Request, store: Store, progress: Progress) -> Built:
    began = time.perf_counter()
    store.check_writable()
    unreached = _unreached(request)
    warnings = [*filter(None, [unreached, _written_by_others(store)])]
    if unreached:
        request = replace(request, remote_store=None)
    if request.model is not None:
        declaring.resolve(request.model)
    misses = miss_file.read(request.misses)
    marks = [Mark.parse(text) for text in request.at_start]
    question = _question(request, misses)
    before = store.get_record(STAMPS, question)
    if before is not None and not fingerprint.changed(Inputs(**before["inputs"])):
        same = _still_there(before)
        if same is not None:
            same.seconds, same.warnings = time.perf_counter() - began, warnings
            return same
    with scratch.folder() as folder:
        started = _start(request, store, folder, progress)
        request, marks = _with(request, started, store), [*marks, *(Mark.parse(text) for text in started.at_start)]
        caches = engine_cache.of_plans(request.plans)
        result, built = _compile(request, folder, store, misses, marks, caches, progress)
    built.engine = _told(request.engine, started)
    built.untested = "; ".join(filter(None, (built.untested, started.untested)))
    inputs = fingerprint.together([result.inputs, started.inputs])
    built.misses = _became(misses, result.missed, request.target)
    built.warnings = [*warnings, *result.warnings]
    built.seconds = time.perf_counter() - began
    if not built.failed:
        with store.writer():
            store.put_record(STAMPS, question, {"inputs": asdict(inputs), "built": built.to_json()})
    return built


def _written_by_others(store: Store) -> str:
    """What is wrong with the store's place; empty if only this user and root can write there."""
    why = trust.why_others(store.root, store.root.stat())
    if not why:
        return ""
    what = f"the store {store.root} can have been written by others, and what they compiled is built into bundles"
    return f"{what}: {why} (change that, or name its folder in {trust.FOLDERS})"


def _unreached(request: Request) -> str:
    """Why the request's remote store cannot be used; empty if it can, or there is none."""
    if request.remote_store is None:
        return ""
    from aot_cache.remote.shared_store import SharedStore

    store = SharedStore(request.store, request.remote_store)
    store.check_remote()
    return store.problem


def _compile(
    request: Request,
    within: Path,
    store: Store,
    misses: Misses,
    marks: Sequence[Mark],
    caches: Caches,
    progress: Progress,
) -> tuple[BuildResult, Built]:
    """Compile what the store lacks, and write the bundle. If the store has lost some of it by then, once more.

    Raises:
        StoreChanged: something is lost each time.
    """
    traced = replace(request, model=model_of(request))
    for again in range(_ATTEMPTS):
        folder = within / f"build-{again}"
        folder.mkdir()
        try:
            result = workers.run(traced, folder, misses, progress)
            return result, _finish(request, store, result, misses, marks, caches)
        except StoreChanged:
            if again == _ATTEMPTS - 1:
                raise
    raise AssertionError  # not reached


def _start(request: Request, store: Store, within: Path, progress: Progress) -> EngineStart:
    """What the request's engine launches and compiles; nothing without an engine."""
    if request.engine is None:
        return NO_START
    folder = within / "engine"
    folder.mkdir()
    return engine_start.start(request.engine, request.target, store, folder, progress)


def _with(request: Request, started: EngineStart, store: Store) -> Request:
    """The request, with the plan of its engine's start: one of all plans, because recordings of it have the same functions."""
    if started is NO_START:
        return request
    return replace(request, plans=(engine_start.together(started.plan, request.plans, store),))


def _told(engine: Engine | None, started: EngineStart) -> dict[str, Any]:
    if engine is None:
        return {}
    names = ("version", "ranks", "models", "requests", "first", "unreached", "assumed")
    return {"name": engine.name, **{name: getattr(started, name) for name in names}}


def model_of(request: Request) -> str | None:
    """The recipe of a request: the one that it names, else what its plans have recorded of compiled functions.

    Raises:
        DeclarationError: several plans have such functions.
    """
    if request.model is not None:
        return request.model
    recorded = [path for path in request.plans if any(not f.why for f in Plan.read(path).functions)]
    if len(recorded) > 1:
        raise DeclarationError(
            "one plan with compiled functions",
            f"{len(recorded)}: {', '.join(map(str, recorded))}",
            "make one of them with `aot-cache merge`",
        )
    return options.text(RECORDED, {options.CONFIG: str(recorded[0])}) if recorded else None


@dataclass(frozen=True)
class Planned:
    """The plan that a build would compile, and of an engine what `Built.engine` says."""

    plan: Plan
    engine: Mapping[str, Any]


def plan_only(request: Request, progress: Progress = lambda *_: None) -> Planned:
    """Trace without compiling. An engine compiles its own models all the same: what it has compiled is kept for the build."""
    store = Store(request.store)
    in_use = (
        store.in_use() if request.engine is not None else contextlib.nullcontext()
    )  # else nothing is read or written
    with in_use, scratch.folder() as folder:
        started = _start(request, store, folder, progress)
        told = _told(request.engine, started)
        request = _with(request, started, store)
        request = replace(request, model=model_of(request))
        misses = miss_file.read(request.misses)
        return Planned(workers.run(request, folder, misses, progress, show_plan=True).plan, told)


def bundle_path(request: Request, name: str, spec: str = "", misses: Misses | None = None) -> Path:
    """Path of the bundle of the recipe called `name`.

    The options in `spec` are part of the file's name. So are ranges, ranks and misses of the request, because such a bundle must
    not replace the recipe's own. A bundle from plan files alone is named after these.
    """
    if request.out is not None:
        return request.out
    more = {f"range.{dim}": text for dim, text in sorted(request.ranges.items())}
    if request.model is None:
        file = "-".join(_stem(plan, request.target) for plan in request.plans)
        if misses is not None and misses.found:
            file = f"{file}-misses.{key.digest(asdict(misses))[:12]}"
    else:
        if request.plans:
            more["plans"] = "-".join(_stem(plan, request.target) for plan in request.plans)
        if request.ranks is not None:
            more["ranks"] = str(request.ranks)
        if misses is not None and misses.found:
            more["misses"] = key.digest(asdict(misses))[:12]
        file = options.file_name(name, spec, more)
    return request.store / "bundles" / f"{file}-{request.target.id}.safetensors"


def _not_built(request: Request, plan: Plan) -> list[str]:
    """Recorded functions of a request that names a recipe, without those that the recipe calls, too."""
    if request.model is None:
        return []
    recorded = {f.function for path in request.plans for f in Plan.read(path).functions if not f.why}
    return sorted(recorded - {call.function for call in plan.calls})


def _write_plan(request: Request, plan: Plan, bundle: Path) -> None:
    """Write what was built beside the bundle, but never over a plan that it was built from: the next build needs that one."""
    beside = bundle.with_suffix(PLAN)
    if not (beside.exists() and any(given.samefile(beside) for given in request.plans)):
        replace(plan, caches="").write(beside)  # the entries are in the bundle


def _stem(plan: Path, target: Target) -> str:
    return plan.name.removesuffix(".json").removesuffix(".plan").removesuffix(f"-{target.id}")


def _question(request: Request, misses: Misses) -> str:
    """The stamp's key: a digest of the request and the environment."""
    plans = [key.digest(plan.read_text()) for plan in request.plans if plan.is_file()]
    return key.digest(
        {
            "model": options.published(request.model) if request.model is not None else None,
            "plans": plans,
            "target": request.target.properties(),
            "ranges": dict(request.ranges),
            "out": str(request.out.absolute()) if request.out else "",
            "line_info": request.line_info,
            "pythons": list(request.pythons),
            "misses": asdict(misses),
            "ranks": request.ranks,
            "at_start": list(request.at_start),
            "neighbours": request.neighbours,
            "engine": [request.engine.name, *request.engine.arguments] if request.engine is not None else None,
            "environment": fingerprint.environment(),
        }
    )


def _still_there(before: Mapping[str, Any]) -> Built | None:
    built = Built(**{**before["built"], "path": Path(before["built"]["path"])})
    try:
        found = read_bundle(built.path)
    except AotCacheError:
        return None
    if found.digest != built.digest or found.check_all():
        return None
    use.note(built.path)
    built.nothing_to_do, built.compiled = True, 0
    return built


def _became(misses: Misses, why: Mapping[int, str], target: Target) -> dict[str, Any]:
    """What became of the misses that the build was given."""
    nobody = {GRAPH: "no declared case calls a compiled function"}
    rows = [
        {
            "kind": miss.kind,
            "name": miss.name,
            "asked": asked(miss),
            "count": miss.count,
            "why": why.get(number, nobody.get(miss.kind, f"it is not built for {target.id}")),
        }
        for number, miss in enumerate(misses.found)
    ]
    uncovered = [row for row in rows if row["why"]]
    return {
        "given": len(rows),
        "covered": len(rows) - len(uncovered),
        "uncovered": uncovered,
        "cut_off": misses.cut_off,
    }


def _finish(
    request: Request, store: Store, result: BuildResult, misses: Misses, marks: Sequence[Mark], caches: Caches
) -> Built:
    plan, spec = result.plan, options.published(result.spec)  # without options that have their default values
    manifest, objects = assemble(request.target, spec, result, store, marks, caches)
    path = bundle_path(request, plan.recipe, spec, misses)
    header, details = split(manifest)
    objects[header["details"]] = details
    digest = ""
    if manifest.units or manifest.graphs:
        with store.writer():
            aside = path.with_suffix(INCOMPLETE)
            if manifest.complete:
                for old in (aside, aside.with_suffix(PLAN), signature.beside(aside)):
                    old.unlink(missing_ok=True)
            elif _is_complete(path):
                path = aside
            digest = write_bundle(path, header, objects)
            _write_plan(request, plan, path)
    elif not manifest.failed:
        raise _nothing(plan, request.target)
    return Built(
        target=request.target.id,
        path=path,
        digest=digest,
        size=path.stat().st_size if digest else 0,
        units=len(manifest.units),
        graphs=len(manifest.graphs),
        compiled=result.compiled,
        pruned=len(manifest.pruned),
        failed=list(map(plain, manifest.failed)),
        sampled=plan.sampled,
        points=sum(case.points for case in plan.cases),
        seconds=0.0,
        per_rank=dict(result.per_rank),
        declared=sum(case.total for case in plan.cases),
        covered=covered(plan, manifest.failed),
        ranks=plan.ranks,
        neighbours=result.neighbours,
        not_built=_not_built(request, plan),
        apart=plan_of_ranks.apart(plan),
        sets={case.name: list(case.sets) for case in plan.cases if case.sets},
        untested=tested.doubt_here(request.target.backend == "cpu", _imported("transformers", result.inputs)),
    )


def _is_complete(path: Path) -> bool:
    """Whether there is a complete bundle."""
    try:
        return read_bundle(path).manifest.get("complete") is True
    except AotCacheError:
        return False


def _nothing(plan: Plan, target: Target) -> TraceError:
    points = sum(case.points for case in plan.cases)
    hint = "see `aot-cache build --show-plan`"
    if target.backend == "cpu":
        hint = "Triton kernels need a GPU: name one with --target (see `aot-cache targets`)"
    what = f"{plan.recipe} launches no Triton kernel and calls no compiled function"
    return TraceError(f"{what} for {target.id} at any of its {points} points", hint=hint)


def _imported(package: str, inputs: Inputs) -> bool:
    """Whether a build imported a package, installed or not."""
    files = (Path(path) for path in inputs.files)
    return package in inputs.packages or any(f.parts[-2:] == (package, "__init__.py") for f in files)
