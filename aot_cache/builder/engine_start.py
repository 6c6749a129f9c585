"""`build --engine`: what an engine launches and compiles from its command line alone, found in processes without a GPU.

Two workers run at the same time: one starts the engine on the virtual device and sends it requests, the other lets it compile its
own models (see `builder.engine_worker`). Their results are what a recording has: a plan, and the engine's caches beside it. They
are kept in the store, and found again as long as nothing has changed. Imports neither torch nor Triton.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aot_cache.artifact import engine_cache, key
from aot_cache.artifact.plan import Plan, merge
from aot_cache.artifact.target import Target
from aot_cache.builder import fingerprint
from aot_cache.builder.fingerprint import NO_INPUTS, Inputs
from aot_cache.builder.messages import Part, Started, StartJob, answer_of
from aot_cache.builder.worker_pool import Progress, WorkerPool
from aot_cache.errors import AotCacheError, DeclarationError
from aot_cache.store import Store

if TYPE_CHECKING:
    from concurrent.futures import Future

STARTS = "starts"
"""The store's records of engine starts."""


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
        version, untested, requests, first, unreached, assumed, at_start, models: see `messages.Started`.
    """

    plan: Path
    version: str = ""
    untested: str = ""
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
    plan_file, caches_file = scratch / path.name, scratch / "caches.safetensors"

    def job(part: Part, out: Path) -> StartJob:
        return StartJob(part=part, engine=engine.name, arguments=list(engine.arguments), target=target, out=str(out))

    with WorkerPool(progress) as pool:

        def run(part: Part, out: Path) -> Future[Started]:
            def worker() -> Started:
                answer = answer_of(Started, pool.run(job(part, out), _environment(scratch / part)))
                assert answer is not None
                return answer

            return pool.submit(worker)

        kernels, models = run("kernels", plan_file), run("models", caches_file)
        launched, compiled = kernels.result(), models.result()
    plan = replace(Plan.read(plan_file), launchers=tuple(map(tuple, compiled.launchers)))
    caches = engine_cache.read(caches_file)
    with store.writer():  # another build of the same engine would write the one file between this one's two
        path.parent.mkdir(parents=True, exist_ok=True)
        engine_cache.write_plan(plan, caches, path)
    return EngineStart(
        plan=path,
        version=launched.version,
        untested=launched.untested,
        requests=launched.requests,
        first=dict(launched.first),
        unreached=list(launched.unreached),
        assumed=dict(launched.assumed),
        at_start=list(launched.at_start),
        models=list(compiled.models),
        inputs=fingerprint.together([launched.inputs, compiled.inputs]),
    )


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
