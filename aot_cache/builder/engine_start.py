"""`build --engine`: what an engine launches and compiles from its command line alone, found in processes without a GPU.

Two workers run at the same time, two for each rank if the engine uses several GPUs: one starts the engine on the virtual device
and sends it requests, the other lets it compile its own models (see `builder.engine_worker`). Their results are what a recording
has: a plan, and the engine's caches beside it. They are kept in the store, and found again until something changes. Imports
neither torch nor Triton.
"""

from __future__ import annotations

import os
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from threading import Semaphore
from typing import TYPE_CHECKING, Any

from aot_cache.artifact import engine_cache, key, plan_of_ranks
from aot_cache.artifact.plan import Plan, merge
from aot_cache.artifact.target import Target
from aot_cache.builder import engine_names, fingerprint
from aot_cache.builder.fingerprint import NO_INPUTS, Inputs
from aot_cache.builder.messages import OtherRanks, Part, Started, StartJob, answer_of
from aot_cache.builder.worker_pool import Progress, WorkerPool
from aot_cache.errors import AotCacheError, DeclarationError
from aot_cache.store import Store, use

if TYPE_CHECKING:
    from concurrent.futures import Future

STARTS = "starts"
"""The store's records of engine starts."""
_LEAST_AT_ONCE = 2
"""A rank's two workers run at the same time, also on one core."""


@dataclass(frozen=True)
class Engine:
    """An engine, and its own command line.

    Args:
        name: the adapter's name, see `engine_worker.adapter`.
        arguments: what the engine's own command takes: the model, and options.
    """

    name: str
    arguments: Sequence[str] = ()

    @property
    def label(self) -> str:
        """The engine and the model, for names of files."""
        model = next((one for one in self.arguments if not one.startswith("-")), "model")
        return f"{self.name}-{Path(model).name or 'model'}-{key.digest(list(self.arguments))[:8]}"


@dataclass(frozen=True, kw_only=True)
class EngineStart:
    """What was found. `plan` is the path of the plan, with the engine's caches beside it.

    Args:
        ranks: as how many ranks it was started.
        version, untested, requests, first, unreached, assumed, at_start, models: see `messages.Started`.
    """

    plan: Path
    version: str = ""
    untested: str = ""
    ranks: int = 1
    requests: int = 0
    first: Mapping[str, str] = field(default_factory=dict)
    unreached: Sequence[str] = ()
    assumed: Mapping[str, str] = field(default_factory=dict)
    at_start: Sequence[str] = ()
    models: Sequence[str] = ()
    inputs: Inputs = NO_INPUTS


NO_START = EngineStart(plan=Path())
"""There is no engine."""


def start(engine: Engine, target: Target, store: Store, scratch: Path, progress: Progress) -> EngineStart:
    """Start the engine for a target, or find what an earlier start has found.

    Raises:
        DeclarationError: there is no such engine here, or it does not take its command line.
        AotCacheError: it cannot be started without a GPU.
    """
    engine_names.module_of(engine.name)  # before a worker has imported torch for nothing
    if target.backend == "cpu":
        raise DeclarationError("a GPU target for an engine", "cpu", "name a GPU with --target")
    question = key.digest(
        {
            "engine": engine.name,
            "arguments": list(engine.arguments),
            "target": target.properties(),
            "environment": fingerprint.environment(),
        }
    )
    path = store.root / STARTS / f"{engine.label}-{target.id}.plan.json"
    before = store.get_record(STARTS, question)
    if before is not None:
        found = _from_json(before, path)
        if not fingerprint.changed(found.inputs) and _is_whole(path):
            use.note(path)
            return found
    found = _started(engine, target, store, path, scratch, progress)
    with store.writer():
        store.put_record(STARTS, question, {**asdict(found), "plan": ""})
    return found


def together(start: Path, plans: Sequence[Path], store: Store) -> Path:
    """The plan of a start with other plans in it, such as recordings of the same engine; its path.

    Raises:
        DeclarationError: a file is no plan, is for another target, or its caches are missing.
    """
    if not plans:
        return start
    every = [start, *plans]
    texts = key.digest([path.read_text() for path in every])
    out = start.with_name(f"{start.name.removesuffix('.plan.json')}-with-{texts[:8]}.plan.json")
    caches = engine_cache.of_plans(every)
    with store.writer():
        engine_cache.write_plan(merge([Plan.read(path) for path in every]), caches, out)
    return out


def _from_json(record: Mapping[str, Any], path: Path) -> EngineStart:
    return EngineStart(**{**record, "plan": path, "inputs": Inputs(**record["inputs"])})


def _is_whole(path: Path) -> bool:
    """Whether the plan and the caches beside it are there, and belong together."""
    try:
        engine_cache.of_plans([path])
    except (AotCacheError, OSError):
        return False
    return True


def _started(
    engine: Engine, target: Target, store: Store, path: Path, scratch: Path, progress: Progress
) -> EngineStart:
    try:
        found = _ranks(engine, target, path.name, 1, scratch, progress)
    except OtherRanks as other:
        found = _ranks(engine, target, path.name, other.ranks, scratch, progress)
    plan = merge([rank.launched_plan() for rank in found])
    caches = engine_cache.merged(engine_cache.read(rank.caches) for rank in found)
    with store.writer():  # another build of the same engine would write the one file between this one's two
        path.parent.mkdir(parents=True, exist_ok=True)
        engine_cache.write_plan(plan, caches, path)
    first = found[0].launched
    return EngineStart(
        plan=path,
        version=first.version,
        untested=first.untested,
        ranks=len(found),
        requests=min(rank.launched.requests for rank in found),
        first=dict(ChainMap(*(dict(rank.launched.first) for rank in found))),
        unreached=_unreached(found),
        assumed=dict(ChainMap(*(dict(rank.launched.assumed) for rank in found))),
        at_start=sorted({name for rank in found for name in rank.launched.at_start}),
        models=list(found[0].compiled.models),
        inputs=fingerprint.together([part.inputs for rank in found for part in (rank.launched, rank.compiled)]),
    )


@dataclass(frozen=True)
class _Rank:
    """What the two workers of a rank have found; `plan` and `caches` are their files."""

    plan: Path
    caches: Path
    launched: Started
    compiled: Started

    def launched_plan(self) -> Plan:
        """The plan, with the launchers that the compiled models need."""
        plan = Plan.read(self.plan)
        return replace(plan, launchers=(*plan.launchers, *map(tuple, self.compiled.launchers)))


def _ranks(engine: Engine, target: Target, name: str, ranks: int, scratch: Path, progress: Progress) -> list[_Rank]:
    """Start the engine as each of its ranks. All are started: their graphs differ (by the number of the GPU, and by constants
    such as the rank's part of the vocabulary), and their kernels may.

    Raises:
        OtherRanks: the engine wants another number of them.
    """
    free = Semaphore(max(_LEAST_AT_ONCE, os.cpu_count() or 1))
    with WorkerPool(progress) as pool:

        def run(part: Part, rank: int, out: Path) -> Future[Started]:
            out.parent.mkdir(parents=True, exist_ok=True)
            job = StartJob(
                part=part,
                engine=engine.name,
                arguments=list(engine.arguments),
                target=target,
                rank=rank,
                ranks=ranks,
                out=str(out),
            )

            def worker() -> Started:
                with free:
                    answer = answer_of(Started, pool.run(job, _environment(out.parent / part)))
                assert answer is not None
                return answer

            return pool.submit(worker)

        folders = [scratch / f"rank{rank}" for rank in range(ranks)]
        running = [
            (run("kernels", rank, folder / name), run("models", rank, folder / "caches.safetensors"))
            for rank, folder in enumerate(folders)
        ]
        return [
            _Rank(folder / name, folder / "caches.safetensors", kernels.result(), models.result())
            for folder, (kernels, models) in zip(folders, running)
        ]


def _unreached(ranks: Sequence[_Rank]) -> list[str]:
    """What all ranks could not be made to do, and what some could not, with those."""
    by_text: dict[str, list[int]] = {}
    for number, rank in enumerate(ranks):
        for text in rank.launched.unreached:
            by_text.setdefault(text, []).append(number)
    return [
        text if len(where) == len(ranks) else f"as {plan_of_ranks.ranks_text(where)}: {text}"
        for text, where in by_text.items()
    ]


def _environment(folder: Path) -> dict[str, str]:
    """A worker's environment: this one, as the server's is, but without a GPU, without us, and with caches of its own."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AOT_CACHE")}
    for kept in ("AOT_CACHE_UNTESTED", "AOT_CACHE_DEBUG"):
        if kept in os.environ:
            environment[kept] = os.environ[kept]
    here = os.getcwd()
    environment.update(
        CUDA_VISIBLE_DEVICES="",
        HIP_VISIBLE_DEVICES="",
        PYTHONHASHSEED="0",
        TRITON_CACHE_DIR=str(folder / "triton"),
        TORCHINDUCTOR_CACHE_DIR=str(folder / "inductor"),
        PYTHONPATH=os.pathsep.join(p for p in (here, environment.get("PYTHONPATH", "")) if p),
    )
    return environment
