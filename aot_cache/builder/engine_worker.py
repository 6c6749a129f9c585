"""What a worker process does for `build --engine`: it starts the engine on the virtual device, and writes down what it found.

An adapter is a module with what `Adapter` has: `aot_cache.engines.NAME.virtual_start`, or one of the user's own. It goes the
engine's own way, in one process.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

from aot_cache.artifact import engine_cache
from aot_cache.artifact.engine_cache import Caches
from aot_cache.artifact.key import function_of
from aot_cache.artifact.plan import Plan
from aot_cache.artifact.specialization import parameter_names
from aot_cache.builder import engine_names, fingerprint
from aot_cache.builder.messages import Started, StartJob
from aot_cache.errors import DeclarationError

if TYPE_CHECKING:
    from aot_cache.upstream.hooks.triton_launches import LaunchLog

Progress = Callable[[str, int, int], None]
_CONFIGURATION = ("*.json", "*.py", "*.yaml")
"""Files of a model's folder that decide what an engine does. Weights do not."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """How far an engine could be used.

    Args:
        requests: the kinds of requests that were sent, in words, in the order in which `progress("requests", …)` was called.
        answered: how many of them were answered.
        unreached: what it could not be made to do, in words.
    """

    requests: Sequence[str]
    answered: int
    unreached: Sequence[str]


@dataclass(frozen=True)
class Process:
    """The process of an engine that this one becomes.

    Args:
        folder: for its caches.
        rank: its rank.
        ranks: how many there are. An engine that wants another number raises `messages.OtherRanks`.
    """

    folder: Path
    rank: int = 0
    ranks: int = 1


class Adapter(Protocol):
    """An engine.

    Args:
        PACKAGE: the package that must be installed.
        TRIED: its versions with which the adapter was tried.
        ENVIRONMENT: variables that are set for `run`.
        AT_START: constants of kernels that are known only when a server starts.
    """

    PACKAGE: str
    TRIED: Sequence[str]
    ENVIRONMENT: Mapping[str, str]
    AT_START: Sequence[str]

    def version(self) -> str:
        """The engine's version. Raises ImportError if it is not installed."""

    def run(self, arguments: Sequence[str], process: Process, progress: Progress) -> Run:
        """Start the engine, and use it."""

    def compile_models(
        self, arguments: Sequence[str], process: Process, keep: Callable[[Caches], None], progress: Progress
    ) -> list[str]:
        """Let the engine compile its models, and keep its caches. Returns the models' names."""

    def model_folder(self, arguments: Sequence[str]) -> Path | None:
        """The folder with the model's configuration."""


def adapter(name: str) -> Adapter:
    """The adapter of the engine `name`: one of ours, or, with a dot in it, a module of the user's.

    Raises:
        DeclarationError: there is none, or the engine is not installed.
    """
    module = engine_names.module_of(name)
    try:
        found = cast(Adapter, importlib.import_module(module))
    except ModuleNotFoundError as error:
        if not f"{module}.".startswith(f"{error.name}."):
            raise
        raise engine_names.unknown(name) from None
    try:
        found.version()
    except ImportError:
        package = found.PACKAGE
        raise DeclarationError(f"{package} beside aot-cache", "none", f"install {package} here") from None
    return found


def doubt(engine: Adapter) -> str:
    """Why the engine's version is doubtful; empty if it was tried."""
    if not engine.TRIED or engine.version() in engine.TRIED:
        return ""
    return f"{engine.PACKAGE} {engine.version()} was not tried on the virtual device; {', '.join(engine.TRIED)} were"


def started(job: StartJob, progress: Progress) -> Started:
    """Do the job.

    Raises:
        AotCacheError: the engine cannot be started so.
        OtherRanks: it is for another world size.
    """
    from aot_cache.upstream.virtual import this_gpu

    this_gpu.become(job.rank, job.ranks)
    return _kernels(job, progress) if job.part == "kernels" else _models(job, progress)


def _kernels(job: StartJob, progress: Progress) -> Started:
    from aot_cache.builder import virtual_gpu

    log_calls: list[Callable[..., None]] = []
    virtual_gpu.become(job.target, lambda *call: log_calls[0](*call))

    from aot_cache.recordings import plans
    from aot_cache.recordings.calls import CallLog
    from aot_cache.upstream.codec import call_arguments
    from aot_cache.upstream.hooks import triton_launches
    from aot_cache.upstream.virtual.torch_tensor import VirtualTensor

    engine = adapter(job.engine)
    os.environ.update(engine.ENVIRONMENT)
    log = triton_launches.LaunchLog()
    call_arguments.STAND_FOR_TENSORS.add(VirtualTensor)
    calls = CallLog(lambda: None)
    log_calls.append(calls.note)
    assumed: dict[str, str] = {}

    def assume(what: str, place: str) -> None:
        assumed.setdefault(place, what)

    def noted(stage: str, done: int, total: int) -> None:
        log.mark = (stage, done)
        progress(stage, done, total)

    with (
        virtual_gpu.tensors(),
        virtual_gpu.assuming(assume),
        triton_launches.intercept_launch(log, virtual_gpu.kernel_was_launched),
    ):
        run = engine.run(job.arguments, _process(job), noted)
    plan = plans.of_logs(
        log, calls, Path(job.out).name.removesuffix(".plan.json"), lambda _: job.target.id, origin="started"
    )
    plan.write(Path(job.out))
    return Started(
        version=engine.version(),
        untested=doubt(engine),
        requests=run.answered,
        first=_first(log, run),
        unreached=run.unreached,
        assumed=assumed,
        at_start=_marked(plan, engine.AT_START),
        launchers=(),
        models=(),
        inputs=_inputs(engine, job),
    )


def _first(log: LaunchLog, run: Run) -> dict[str, str]:
    """`module:qualname` of a kernel → the stage, or the kind of requests, that launched it first."""
    found: dict[str, str] = {}
    for unit, marks in zip(log.units, log.seen_units):
        stage, number = marks[0] or ("start", 0)
        kind = run.requests[number] if stage == "requests" and number < len(run.requests) else ""
        found.setdefault(function_of(str(unit["kernel"])), f"{stage}: {kind}" if kind else stage)
    return found


def _marked(plan: Plan, names: Sequence[str]) -> list[str]:
    """Those of `names` that are constants of kernels of the plan. In another release one may be an ordinary argument."""
    constants: set[str] = set()
    others: set[str] = set()
    for unit in plan.units:
        for name, pair in zip(parameter_names(unit.kernel, plan.closures[unit.kernel]), unit.specialization):
            (constants if pair["t"][0] == "constexpr" else others).add(name)
    return [name for name in names if name in constants - others]


def _models(job: StartJob, progress: Progress) -> Started:
    from aot_cache.builder import virtual_gpu
    from aot_cache.upstream.virtual import inductor_target

    launchers: set[tuple[object, ...]] = set()
    virtual_gpu.libraries(job.target)
    inductor_target.become(job.target, launchers.add)

    engine = adapter(job.engine)
    kept: list[Caches] = []
    models = engine.compile_models(job.arguments, _process(job), kept.append, progress)
    engine_cache.write(Path(job.out), engine_cache.merged(kept))
    return Started(
        version=engine.version(),
        untested="",
        requests=0,
        first={},
        unreached=(),
        assumed={},
        at_start=(),
        launchers=sorted(map(list, launchers), key=repr),
        models=models,
        inputs=_inputs(engine, job),
    )


def _process(job: StartJob) -> Process:
    return Process(Path(job.out).parent / job.part, job.rank, job.ranks)


def _inputs(engine: Adapter, job: StartJob) -> fingerprint.Inputs:
    folder = engine.model_folder(job.arguments)
    found = [path for pattern in _CONFIGURATION for path in (folder.glob(pattern) if folder is not None else ())]
    return fingerprint.inputs(read=[path for path in found if path.is_file()], made=Path(job.out).parent)
