"""Check in a fresh process that has only a bundle whether it hits: `aot-cache rehearse`.

It shares nothing with the builder: real tensors, the recipe's own code, the loader as a server uses it, and a second count of
events, independent of the ledger.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from aot_cache import errors
from aot_cache.artifact import manifest
from aot_cache.artifact.manifest import Manifest
from aot_cache.errors import DeclarationError, RehearsalFailed, TargetError, UnknownName, did_you_mean
from aot_cache.recipes.dimensions import point_text
from aot_cache.rehearsal import process
from aot_cache.rehearsal.results import CaseResult, Missed, PointResult, Rehearsal
from aot_cache.runtime import host_gpu
from aot_cache.store import Bundle, read_bundle
from aot_cache.tested import installed

__all__ = ["CaseResult", "Missed", "PointResult", "Rehearsal", "rehearse", "versions"]

Progress = Callable[[str, int, int], None]
POINTS = 64
"""Default number of points of each case."""


def rehearse(
    path: Path,
    *,
    digest: str | None = None,
    points: int | None = POINTS,
    cases: Sequence[str] = (),
    tolerance: float | None = None,
    timeout: float | None = None,
    compiler: bool = False,
    config: str | None = None,
    progress: Progress = lambda *_: None,
) -> Rehearsal:
    """Run a bundle's declared points in a fresh process that has only the bundle and the recipe's code.

    Args:
        path: the bundle.
        digest: the digest that it must have; None for any.
        points: maximum of points per case, spread over them; None for all declared points.
        cases: names of the cases to run; empty for all.
        tolerance: maximal distance of results from eager; None: by dtype (see `compare`).
        timeout: seconds that a point may take; None: no limit.
        compiler: leave a C compiler available, because the recipe's own code needs one.
        config: the recipe's config file; None: the one in AOT_CACHE_CONFIG.

    Returns:
        The results; `passed` says whether all are good.

    Raises:
        StoreError: there is no such bundle, or it is not sound.
        DeclarationError, UnknownName: the bundle has no recipe, or the recipe is not installed or has changed.
        TargetError: the bundle is for a GPU, and there is none.
        Incompatible: the bundle is not for this host.
        RehearsalFailed: the process died before its first point.
    """
    began = time.perf_counter()
    bundle = read_bundle(path, digest)
    whole = manifest.whole(bundle)
    _check(bundle, whole, cases)
    found = _Listener(bundle, progress)
    for rank in _ranks(whole):
        job = {
            "bundle": str(path.absolute()),
            "digest": bundle.digest,
            "cases": list(cases),
            "points": points,
            "tolerance": tolerance,
            "rank": rank,
            "ranks": whole.ranks,
            "config": config,
            "compiler": compiler,
        }
        found.listen(job, timeout)
    return replace(found.rehearsal(), seconds=time.perf_counter() - began)


def versions() -> dict[str, str]:
    """The versions that a rehearsal's result depends on."""
    packages = {name: installed(name) for name in ("torch", "triton")}
    return {"aot-cache": installed("aot_cache"), "python": platform.python_version(), **packages}


def _check(bundle: Bundle, whole: Manifest, cases: Sequence[str]) -> None:
    """Check what can be checked before a process starts.

    Raises:
        DeclarationError: the bundle is not from a recipe, or is empty.
        UnknownName: it has no such case.
        TargetError: it needs a GPU, and there is none.
    """
    if not whole.spec or whole.origin != "traced":
        hint = "build it with --model: a recorded plan says which kernels ran, not how to call them"
        raise DeclarationError(f"bundle {bundle.path} is built from a recorded plan, not from a recipe", hint=hint)
    if not (whole.units or whole.graphs):
        raise DeclarationError(f"bundle {bundle.path} has neither a kernel nor a graph to rehearse")
    known = [case.name for case in whole.cases]
    for name in cases:
        if name not in known:
            raise UnknownName(
                f"no case {name!r} in {bundle.path}; known: {', '.join(known)}", hint=did_you_mean(name, known)
            )
    target = whole.target
    if target["backend"] != "cpu" and not host_gpu.gpu_here():
        raise TargetError(
            f"no GPU here to rehearse {bundle.path} on, which is for {target['name']}", hint="run this where it serves"
        )


def _ranks(whole: Manifest) -> list[int]:
    """The ranks to rehearse: only the first, unless some graphs or kernels belong to certain ranks."""
    own = any(graph.rank is not None for graph in whole.graphs) or any(unit.ranks for unit in whole.units)
    return list(range(whole.ranks)) if own else [0]


class _Listener:
    """Collects the events of the rehearsal's processes."""

    def __init__(self, bundle: Bundle, progress: Progress) -> None:
        self._bundle, self._progress = bundle, progress
        self._ready: Mapping[str, Any] | None = None
        self._cases: dict[str, CaseResult] = {}
        self._at = "before its first point"
        self._died = ""

    def listen(self, job: Mapping[str, Any], timeout: float | None) -> None:
        """Run one process. Does nothing if an earlier one died.

        Raises:
            AotCacheError: what it raised before its first point.
        """
        if self._died:
            return
        try:
            with closing(process.events(job, timeout)) as said:
                for event in said:
                    getattr(self, f"_on_{event['event']}")(event)
        except process.Died as died:
            if self._ready is None:
                what = f"the rehearsal of {self._bundle.path} ended before its first point: {died}"
                raise RehearsalFailed(what, hint="set AOT_CACHE_DEBUG=1 to see its output") from None
            self._died = f"the rehearsal's process did not finish: {died} ({self._at})"

    def _on_error(self, event: Mapping[str, Any]) -> None:
        raise getattr(errors, event["type"])(event["expected"], event["found"], event["hint"])

    def _on_ready(self, event: Mapping[str, Any]) -> None:
        self._ready = event

    def _on_case(self, event: Mapping[str, Any]) -> None:
        known = self._cases.get(event["name"])
        if known is None:
            self._cases[event["name"]] = CaseResult(event["name"], event["declared"], event["chosen"], ())
        else:  # another rank runs the same case
            self._cases[event["name"]] = replace(known, chosen=known.chosen + event["chosen"])

    def _on_at(self, event: Mapping[str, Any]) -> None:
        self._at = f"at {', '.join(filter(None, (event['case'], point_text(event['point']))))}"

    def _on_point(self, event: Mapping[str, Any]) -> None:
        result = PointResult.from_json({name: value for name, value in event.items() if name != "event"})
        case = self._cases[result.case]
        self._cases[result.case] = case = replace(case, points=(*case.points, result))
        self._progress(f"rehearse {case.name}", len(case.points), case.chosen)

    def _on_done(self, event: Mapping[str, Any]) -> None:
        self._cases[event["name"]] = replace(self._cases[event["name"]], not_captured=event["not_captured"])

    def _on_end(self, event: Mapping[str, Any]) -> None:
        self._at = "after its last point"

    def rehearsal(self) -> Rehearsal:
        """The results."""
        assert self._ready is not None
        return Rehearsal(
            path=self._bundle.path,
            digest=self._bundle.digest,
            device=self._ready["device"],
            versions=versions(),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
            cases=tuple(self._cases.values()),
            not_ready=self._ready["not_ready"],
            died=self._died,
        )
