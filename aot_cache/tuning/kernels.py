"""Choose between compiled candidates on the GPU that will serve.

`aot-cache tune BUNDLE` writes the choices into a new bundle. `ready(tune=True)` does the same at start-up, before any capture,
for choices that are still open. Nothing is compiled: a candidate that is not in the bundle is not considered.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from aot_cache.artifact.key import function_of, variant
from aot_cache.artifact.manifest import Manifest, TuningChoice, split, whole
from aot_cache.artifact.plan import Config
from aot_cache.artifact.specialization import closure_digest
from aot_cache.errors import TuneError
from aot_cache.recipes import declare as recipes
from aot_cache.recipes import dimensions
from aot_cache.runtime import bundle_lookup, loader
from aot_cache.runtime.kernels import KernelSet, Report
from aot_cache.store import signature, write_bundle
from aot_cache.tuning import graphs as tuning_graphs
from aot_cache.upstream.hooks import torch_capture

Progress = Callable[[str, int, int], None]


@dataclass
class _Times:
    """One tuning's measurements: candidate number → (median, p20, p80) in ms at each point."""

    points: list[str] = field(default_factory=list)
    times: dict[int, list[tuple[float, float, float]]] = field(default_factory=dict)

    def best(self) -> int | None:
        """The candidate with the least mean slowdown over the points, out of those measured at all of them; None if none was."""
        full = {c: t for c, t in self.times.items() if len(t) == len(self.points) and self.points}
        if not full:
            return None
        floors = [min(t[n][0] for t in full.values()) for n in range(len(self.points))]
        return min(full, key=lambda c: (statistics.fmean(t[0] / f for t, f in zip(full[c], floors)), c))

    def to_json(self) -> dict[str, Any]:
        return {
            "points": self.points,
            "ms": {str(c): [[round(x, 6) for x in t] for t in v] for c, v in self.times.items()},
        }


def ready(
    *, strict: bool = False, tune: bool = False, at_start: Mapping[str, int | str | bool] | None = None
) -> list[Report]:
    """Install and load what is still pending. Call it after the model is made and before the first capture.

    Args:
        strict: raise if anything declared is not installed.
        tune: also make the choices that the bundles leave open: benchmark the compiled candidates at points of the declared
            ranges. The bundles' recipes must be importable.
        at_start: constants of kernels that are known only now (`aot-cache build --at-start`): name of the parameter → value.
            Their kernels are compiled here, on all cores. `ready` may be called again when more is known.

    Raises:
        NotReady: with `strict`, if a declared kernel is not installed.
        TuneError: with `tune`, if CUDA is not initialised or a capture is active.
    """
    reports = loader.ready(strict=strict, at_start=at_start)
    if tune:
        if not torch_capture.cuda_is_up() or torch_capture.capturing():
            raise TuneError(
                "cannot tune: CUDA is not initialised, or a capture is active",
                hint="call ready(tune=True) once CUDA is initialised and before the first capture",
            )
        for kernels in loader.loaded():
            manifest = whole(kernels.bundle)
            open_ones = [n for n, t in enumerate(manifest.tunings) if not kernels.is_chosen(t)]
            for number, result in _measure(kernels, manifest, open_ones, 1, lambda *_: None).items():
                tuning, best = manifest.tunings[number], result.best()
                # A tuning that no point reached here (a graph may contain it) gets its default, or it would measure in a capture.
                chosen = tuning.default if best is None else best
                if chosen is not None:
                    kernels.choose_now(tuning, tuning.candidates[chosen])
        for graphs in loader.loaded_graphs():
            tuning_graphs.measure(graphs, whole(graphs.bundle), lambda *_: None, again=False)
    return reports


def tune(bundle_path: Path, out: Path, *, prune: bool, points: int, progress: Progress) -> dict[str, Any]:
    """Benchmark every choice in a bundle on this GPU and write a bundle with the choices.

    Args:
        points: number of points of the declared ranges at which each choice is measured.
        prune: leave out the binaries of losing candidates.

    Returns:
        What was chosen and measured, and the new bundle's digest and size.

    Raises:
        TuneError: there is no GPU, it is not the model that the bundle is for, or the recipe lacks a case.
        AotCacheError: the bundle or its recipe cannot be loaded.
    """
    import torch

    bundle = bundle_lookup.read(
        bundle_path, None, signature.trusted_keys()
    )  # its recipe is imported before it is loaded
    if not torch.cuda.is_available():
        raise TuneError("no GPU to tune on", hint="run this on the kind of GPU that serves")
    torch.zeros(1, device="cuda")  # initialises CUDA
    name = torch_capture.device_name()
    manifest = whole(bundle)
    if name != manifest.target["name"]:
        raise TuneError(f"a {manifest.target['name']}", f"a {name}", "run this on the kind of GPU that serves")
    before = _clocks()
    recipes.load(manifest.spec)  # imports its modules, so that every kernel can be installed
    report = loader.load(bundle_path, strict=True)
    loader.ready()
    kernels = next(k for k in loader.loaded() if k.report is report)
    _make_pending(kernels, manifest)
    loader.ready(strict=True)
    results = _measure(kernels, manifest, range(len(manifest.tunings)), points, progress)
    device = {"name": name, "clocks_before": before, "clocks_after": _clocks()}
    manifest, chosen = _with_choices(manifest, results, device)
    for graphs in (found for found in loader.loaded_graphs() if found.bundle.digest == bundle.digest):
        choices = tuning_graphs.measure(graphs, manifest, progress, again=True)
        chosen_in = [{name: choices[name] for name in graph.graphs if choices.get(name)} for graph in manifest.graphs]
        graphs_of = [replace(graph, choices=found) for graph, found in zip(manifest.graphs, chosen_in)]
        manifest = replace(manifest, graphs=graphs_of)
    kept = _pruned(manifest) if prune else manifest
    dropped, manifest = len(manifest.units) - len(kept.units), kept
    objects = {digest: bundle.object(digest) for digest in _needed(manifest)}
    header, details_object = split(manifest)
    objects[header["details"]] = details_object
    digest = write_bundle(out, header, objects)
    return {
        "bundle": str(out),
        "digest": digest,
        "bytes": out.stat().st_size,
        "device": device,
        "choices": len(manifest.tunings),
        "measured": chosen,
        "measured_in_graphs": sum(len(found) for g in manifest.graphs for found in g.choices.values()),
        "pruned_units": dropped,
        "changed_from_default": sum(
            t.choice is not None and (t.default is None or t.candidates[t.default] != t.choice)
            for t in manifest.tunings
        ),
    }


def _measure(
    kernels: KernelSet, manifest: Manifest, numbers: Iterable[int], points: int, progress: Progress
) -> dict[int, _Times]:
    """Run the recipe at points that reach each tuning, and benchmark the candidates."""
    import torch

    from aot_cache.upstream.hooks import triton_tuning

    recipe = recipes.load(manifest.spec)
    results: dict[int, _Times] = {}
    names = {}
    for number in numbers:
        tuning = manifest.tunings[number]
        results[number] = _Times()
        kernel = manifest.kernels[tuning.kernel]
        name = variant(function_of(kernel.name), closure_digest(kernel.closure))
        names[triton_tuning.identity(name, tuning.tuner, tuning.key)] = number
    fitting = {n: _fitting(manifest, n) for n in results}
    current = ""

    def allowed(kernel: str, ordinal: int, key: list[Any], config: dict[str, Any]) -> bool:
        number = names.get(triton_tuning.identity(kernel, ordinal, key))
        return number is not None and _candidate(manifest.tunings[number], config) in fitting[number]

    def measured(kernel: str, ordinal: int, key: list[Any], config: dict[str, Any], times: list[float]) -> None:
        number = names[triton_tuning.identity(kernel, ordinal, key)]
        if not math.isfinite(times[0]):
            return  # it did not run
        result = results[number]
        if current not in result.points:
            result.points.append(current)
        result.times.setdefault(_candidate(manifest.tunings[number], config), []).append((times[0], times[1], times[2]))

    plan = _points_for(manifest, results, points)
    for done, ((case_name, text), wanted) in enumerate(sorted(plan.items())):
        progress("tune", done, len(plan))
        case, point = tuning_graphs.case_of(recipe, case_name), json.loads(text)
        for number in wanted:
            tuning = manifest.tunings[number]
            for function in kernels.functions_of(tuning):
                triton_tuning.forget(function, tuning.tuner, tuning.key)
        current = f"{case_name}: " + ", ".join(f"{k}={v}" for k, v in point.items())
        with case.modes(), triton_tuning.benchmarking(allowed, measured):
            case.call(point)()
        torch.cuda.synchronize()
    progress("tune", len(plan), len(plan))
    return results


def _make_pending(kernels: KernelSet, manifest: Manifest) -> None:
    """Run cases that launch kernels which no module has yet: a library may create kernels in a function, at its first call."""
    recipe = recipes.load(manifest.spec)
    one_unit = {manifest.kernels[unit.kernel].name: unit for unit in manifest.units}
    plan = {tuning_graphs.a_point(one_unit[name].reached) for name in kernels.report.pending if name in one_unit}
    for name, point in sorted(plan):
        case = tuning_graphs.case_of(recipe, name)
        with case.modes():
            case.call(json.loads(point))()


def _points_for(manifest: Manifest, results: Mapping[int, _Times], count: int) -> dict[tuple[str, str], list[int]]:
    """(case, point) → the tunings to measure there: for each tuning its last point, the one at an eighth of the list, etc."""
    out: dict[tuple[str, str], list[int]] = {}
    for number in results:
        for case, boxes in list(manifest.tunings[number].reached.items())[:1]:
            reached = dimensions.expand(boxes)
            for step in range(count):
                index = (len(reached) - 1) >> (3 * step)
                out.setdefault((case, json.dumps(reached[index])), []).append(number)
    return out


def _fitting(manifest: Manifest, number: int) -> set[int]:
    """The candidates of a tuning that have units in the bundle, and none that was left out as unfit."""
    here = {c for unit in manifest.units for t, c in unit.via if t == number}
    return here - {c for unit in manifest.pruned for t, c in unit.via if t == number}


def _candidate(tuning: TuningChoice, config: Config) -> int:
    return next((n for n, c in enumerate(tuning.candidates) if c == config), -1)


def _with_choices(manifest: Manifest, results: Mapping[int, _Times], device: Mapping[str, str]) -> tuple[Manifest, int]:
    """(the manifest with the fastest candidates chosen, how many were)."""
    tunings, chosen = list(manifest.tunings), 0
    for number, result in results.items():
        best = result.best()
        if best is None:
            continue
        measured = {**result.to_json(), "device": device}
        tunings[number] = replace(tunings[number], choice=tunings[number].candidates[best], measured=measured)
        chosen += 1
    return replace(manifest, tunings=tunings), chosen


def _pruned(manifest: Manifest) -> Manifest:
    """The manifest without units that only losing candidates launch."""
    winners = {
        (n, _candidate(t, t.choice)) if t.choice is not None else (n, t.default) for n, t in enumerate(manifest.tunings)
    }
    kept = [u for u in manifest.units if not u.via or any((t, c) in winners or (t, c) == (-1, -1) for t, c in u.via)]
    return replace(manifest, units=kept)


def _needed(manifest: Manifest) -> set[str]:
    of_graphs = {digest for graph in manifest.graphs for digest in graph.objects()}
    return {u.object for u in manifest.units} | {n.object for n in manifest.native} | of_graphs


def _clocks() -> str:
    """Current SM and memory clock from nvidia-smi; empty if it is not installed or fails."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    query = [tool, "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
