"""`build` from end to end: recipe or plan → worker (trace, compile) → bundle. Imports neither torch nor Triton."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import IO, Any

from aot_cache import errors, key, miss_file, recipe
from aot_cache.build import stamp
from aot_cache.build.bundles import assemble
from aot_cache.errors import AotCacheError, DeclarationError, TargetError
from aot_cache.manifest import split
from aot_cache.miss_file import GRAPH, Misses
from aot_cache.plan import Plan
from aot_cache.report_misses import asked
from aot_cache.store import Store, read_bundle, write_bundle
from aot_cache.target import Target

Json = Any
Progress = Callable[[str, int, int], None]
STAMPS = "stamps"


@dataclass(frozen=True)
class Request:
    """What to build.

    Args:
        model: a recipe's name or `module:object`; None when `plan` is given.
        plan: a plan file (recorded, or edited) to build instead.
        target: the GPU kind.
        store: the store's folder.
        ranges: dimension → text, in place of the declared one.
        out: the bundle's path; default `STORE/bundles/MODEL-TARGET.safetensors`.
        line_info: keep line numbers for profilers (binaries then hold paths).
        pythons: further interpreters to build C modules for.
        workers: processes; default all cores.
        misses: files of what serving processes missed; it is built with the model.
    """

    target: Target
    store: Path
    model: str | None = None
    plan: Path | None = None
    ranges: Mapping[str, str] = field(default_factory=dict)
    out: Path | None = None
    line_info: bool = False
    pythons: tuple[str, ...] = ()
    workers: int | None = None
    misses: tuple[Path, ...] = ()


@dataclass
class Built:
    """What a build did and where its bundle is; `misses` says what became of those that were given."""

    target: str
    path: Path
    digest: str
    size: int
    units: int
    graphs: int
    compiled: int
    pruned: int
    failed: list[dict[str, str]]
    sampled: list[str]
    points: int
    seconds: float
    nothing_to_do: bool = False
    misses: dict[str, Json] = field(default_factory=dict)

    def to_json(self) -> dict[str, Json]:
        return {**self.__dict__, "path": str(self.path)}


def build(request: Request, progress: Progress = lambda *_: None) -> Built:
    """Build one bundle.

    Raises:
        UnknownName, DeclarationError, TraceError: what was asked for is wrong; nothing was written.
        StoreUnwritable: the store cannot take it; it is as it was.
    """
    began = time.perf_counter()
    store = Store(request.store)
    store.check_writable()
    if request.model is not None:
        recipe.resolve(request.model)
    misses = miss_file.read(request.misses)
    question = _question(request, misses)
    before = store.get_record(STAMPS, question)
    if before is not None and not stamp.changed(before["inputs"]):
        same = _still_there(before)
        if same is not None:
            same.seconds = time.perf_counter() - began
            return same
    with tempfile.TemporaryDirectory(prefix="aot-cache-") as scratch:
        answer, plan = _run_workers(request, Path(scratch), misses, progress)
        built = _finish(request, store, plan, answer)
    built.misses = _became(misses, answer, request.target)
    built.seconds = time.perf_counter() - began
    if not built.failed:
        result = built.to_json()
        with store.writer():
            store.put_record(STAMPS, question, {"inputs": answer["inputs"], "built": result})
    return built


def plan_only(request: Request, progress: Progress = lambda *_: None) -> Plan:
    """Trace without compiling: what `build` would compile."""
    with tempfile.TemporaryDirectory(prefix="aot-cache-") as scratch:
        return _run_workers(request, Path(scratch), miss_file.read(request.misses), progress, show_plan=True)[1]


def bundle_path(request: Request, name: str) -> Path:
    """Where the bundle goes."""
    if request.out is not None:
        return request.out
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in name)
    return request.store / "bundles" / f"{safe}-{request.target.id}.safetensors"


def _question(request: Request, misses: Misses) -> str:
    """The stamp's key: everything about the request, and the environment."""
    plan = key.digest(request.plan.read_text()) if request.plan is not None and request.plan.is_file() else ""
    return key.digest(
        {
            "model": request.model,
            "plan": plan,
            "target": request.target.properties(),
            "ranges": dict(request.ranges),
            "out": str(request.out.absolute()) if request.out else "",
            "line_info": request.line_info,
            "pythons": list(request.pythons),
            "misses": asdict(misses),
            "environment": stamp.environment(),
        }
    )


def _still_there(before: Mapping[str, Json]) -> Built | None:
    built = Built(**{**before["built"], "path": Path(before["built"]["path"])})
    try:
        found = read_bundle(built.path)
    except AotCacheError:
        return None
    if found.digest != built.digest or found.check_all():
        return None
    built.nothing_to_do, built.compiled = True, 0
    return built


def _run_workers(
    request: Request, scratch: Path, misses: Misses, progress: Progress, show_plan: bool = False
) -> tuple[dict[str, Json], Plan]:
    """Kernels in one process, compiled graphs, if there are any, in another: libraries decide at import what they are in."""
    plan_out = scratch / "plan.json"
    job = {
        "target": request.target.properties(),
        "recipe": request.model if request.plan is None else None,
        "plan": str(request.plan) if request.plan is not None else None,
        "plan_out": str(plan_out),
        "ranges": dict(request.ranges),
        "store": str(request.store.absolute()),
        "line_info": request.line_info,
        "pythons": list(request.pythons),
        "workers": request.workers,
        "show_plan": show_plan,
        "misses": [asdict(miss) for miss in misses.found],
        "refused": [],
    }
    if request.plan is not None:
        _kernels_only(request.plan, request.target)
    environment = _environment(request, scratch)
    cpu = request.target.backend == "cpu"
    answer: dict[str, Json] = {"inputs": {}}
    if not cpu:
        _listen({**job, "stage": "kernels"}, environment, "traced" if show_plan else "compiled", answer, progress)
    calling = answer.get("calling", []) if not cpu else None  # on the CPU nobody has looked yet
    if request.plan is None and (cpu or calling):
        last = "surveyed" if show_plan else "graphs"
        graphs = {**job, "stage": "graphs", "cases": calling, "refused": answer.get("refused", [])}
        _listen(graphs, environment, last, answer, progress)
    return answer, Plan.read(plan_out)


def _kernels_only(path: Path, target: Target) -> None:
    """A plan file says which kernels to compile; graphs are traced from the recipe's own code.

    Raises:
        DeclarationError: the plan cannot be all that is built.
    """
    plan = Plan.read(path)
    if plan.calls:
        names = ", ".join(sorted({call.function for call in plan.calls})[:3])
        raise DeclarationError(
            "a plan of Triton kernels only",
            f"{path} also has {len(plan.calls)} kinds of calls of compiled functions ({names})",
            "build from the recipe with --model: graphs are traced from its code",
        )
    if target.backend == "cpu":
        raise DeclarationError("a target that Triton compiles for", "cpu", "name a GPU with --target")


def _listen(
    job: Mapping[str, Json], environment: Mapping[str, str], last: str, answer: dict[str, Json], progress: Progress
) -> None:
    """Run one worker and add its events to `answer`; what it read is added to what others read."""
    for event in _talk(job, environment, last):
        if event["event"] == "progress":
            progress(event["stage"], event["done"], event["total"])
        elif event["event"] == "error":
            raise getattr(errors, event["type"])(event["wanted"], event["found"], event["do"])
        else:
            answer.update({**event, "inputs": stamp.both(answer["inputs"], event.get("inputs", {}))})


def _environment(request: Request, scratch: Path) -> dict[str, str]:
    """The worker's environment: nothing of this machine or of this moment may reach the bytes."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "TRITON_ALWAYS_COMPILE")}
    environment.update(
        CUDA_VISIBLE_DEVICES="",
        HIP_VISIBLE_DEVICES="",
        PYTHONHASHSEED="0",
        TRITON_CACHE_DIR=str(scratch / "triton"),
        TORCHINDUCTOR_CACHE_DIR=str(scratch / "inductor"),
        TRITON_STORE_BINARY_ONLY="1",
        TRITON_DISABLE_LINE_INFO="0" if request.line_info else "1",
    )
    here = os.getcwd()
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (here, environment.get("PYTHONPATH", "")) if p)
    return environment


def _talk(job: Mapping[str, Json], environment: Mapping[str, str], last: str) -> Any:
    """Start a worker, hand it the job, yield its events, of which `last` is the last."""
    worker = subprocess.Popen(
        [sys.executable, "-m", "aot_cache.build.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=dict(environment),
        text=True,
    )
    assert worker.stdin is not None and worker.stdout is not None and worker.stderr is not None
    last_words: deque[str] = deque(maxlen=20)
    listener = Thread(target=_drain, args=(worker.stderr, last_words), daemon=True)
    listener.start()
    finished = False
    try:
        worker.stdin.write(json.dumps(job) + "\n")
        worker.stdin.close()
        for line in worker.stdout:
            event = json.loads(line)
            finished = finished or event["event"] in ("error", last)
            yield event
    finally:
        if worker.poll() is None and not finished:
            worker.kill()  # the reader gave up (Ctrl-C, an error): nobody waits for what it would write
        worker.wait()
        listener.join()
        worker.stdout.close()
        worker.stderr.close()
    if not finished or (worker.returncode and not finished):
        words = [w.strip() for w in last_words if w.strip()]
        raise TargetError(
            "the build worker to finish", f"it ended with code {worker.returncode}: {words[-1] if words else 'no word'}"
        )


def _drain(stream: IO[str], into: deque[str]) -> None:
    show = os.environ.get("AOT_CACHE_DEBUG") == "1"
    for line in stream:
        into.append(line)
        if show:
            sys.stderr.write(line)


def _became(misses: Misses, answer: Mapping[str, Json], target: Target) -> dict[str, Json]:
    """What became of the misses that the build was given."""
    why = dict([*answer.get("missed_kernels", []), *answer.get("missed_calls", [])])
    nobody = {GRAPH: "no declared case calls a compiled function"}
    rows = [
        {
            "kind": miss.kind,
            "name": miss.name,
            "asked": asked(miss),
            "count": miss.count,
            "why": why.get(number, nobody.get(miss.kind, f"nothing is built of it for {target.id}")),
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


def _finish(request: Request, store: Store, plan: Plan, answer: Mapping[str, Json]) -> Built:
    manifest, objects = assemble(request.target, request.model or "", plan, store, answer)
    path = bundle_path(request, plan.recipe)
    lean, details = split(manifest)
    objects[lean["details"]] = details
    with store.writer():
        digest = write_bundle(path, lean, objects)
        plan.write(path.with_suffix(".plan.json"))
    return Built(
        target=request.target.id,
        path=path,
        digest=digest,
        size=path.stat().st_size,
        units=len(manifest["units"]),
        graphs=len(manifest["graphs"]),
        compiled=answer.get("compiled", 0) + answer.get("graphs_compiled", 0),
        pruned=len(manifest["pruned"]),
        failed=list(manifest["failed"]),
        sampled=plan.sampled,
        points=sum(case.points for case in plan.cases),
        seconds=0.0,
    )
