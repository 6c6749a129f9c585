"""Predict whether a declared point would hit in this process, which means that every unit it reaches is installed.

The answer comes from the manifests of the loaded bundles, the imported sources and earlier misses. Nothing is called, and the
GPU is not used. A miss that only a call can show (a guard on a value that changed since) is not predicted until it has happened
once; `aot_cache.explain` finds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from aot_cache.artifact import manifest
from aot_cache.artifact.manifest import Manifest
from aot_cache.artifact.reached import Reached
from aot_cache.errors import UnknownName
from aot_cache.recipes import dimensions
from aot_cache.runtime import loader
from aot_cache.runtime.kernels import of_this_rank
from aot_cache.store import Bundle
from aot_cache.upstream.codec import torch_ranks


@dataclass(frozen=True)
class Hit:
    """The answer of `will_hit`. True if the point would hit.

    Args:
        hit: whether everything the point reaches is installed.
        why: if not, what is missing, one line each.
    """

    hit: bool
    why: list[str]

    def __bool__(self) -> bool:
        return self.hit


def will_hit(what: object, point: Mapping[str, int]) -> Hit:
    """Tell whether a declared point would hit in this process, without calling anything.

    Args:
        what: the name of a case of the recipe; or a compiled function or Triton kernel, as an object or as `module:qualname`.
            With a function or kernel, only its own graphs or specializations that `point` reaches are checked.
        point: dimension → value, for all dimensions of the case.

    Raises:
        UnknownName: no loaded bundle has `what`.
    """
    name = what if isinstance(what, str) else _name_of(what)
    known, covered, why = False, False, []
    for bundle in _bundles():
        found = manifest.whole(bundle)
        for case in found.cases:
            if name != case.name and ":" not in name:
                continue
            units = [one for one in _units(bundle, found) if name in (case.name, one.name)]
            known |= name == case.name or bool(units)
            if set(point) != set(case.dims):
                continue
            lost = [failure.error for failure in found.failed if failure.kernel == f"case {case.name}"]
            if lost and name == case.name:
                return Hit(False, [f"nothing is built of it: {why}" for why in lost])
            reached = [
                one for one in units if any(dimensions.holds(box, point) for box in one.reached.get(case.name, ()))
            ]
            covered |= bool(reached)
            for one in reached:
                missing = one.missing or loader.missed_before(one.name, case.name, point)
                why += [f"{one.name}: {missing}"] if missing else []
    if not known:
        raise UnknownName(f"no loaded bundle has a case, compiled function or kernel {name!r}")
    at = ", ".join(f"{dim}={value}" for dim, value in point.items())
    return Hit(covered and not why, list(dict.fromkeys(why)) if covered else [f"{name} is not declared at {at}"])


@dataclass(frozen=True)
class _Unit:
    """A specialization, a choice or a graph. `missing` says why it is not installed; empty if it is."""

    name: str
    reached: Reached
    missing: str


def _bundles() -> Iterator[Bundle]:
    yield from (kernels.bundle for kernels in loader.loaded())


def _units(bundle: Bundle, found: Manifest) -> Iterator[_Unit]:
    report = next(k.report for k in loader.loaded() if k.bundle is bundle)
    names = [kernel.name for kernel in found.kernels]

    def missing(name: str) -> str:
        if name in report.stale:
            return report.stale[name]
        return "" if report.devices and name not in report.pending else "it is not installed"

    for unit in found.units:
        if of_this_rank(unit.ranks):
            yield _Unit(names[unit.kernel], unit.reached, missing(names[unit.kernel]))
    for tuning in found.tunings:
        if not of_this_rank(tuning.ranks):
            continue
        name = names[tuning.kernel]
        unchosen = report.unchosen.get(f"{name} {tuning.key}", "")
        yield _Unit(name, tuning.reached, missing(name) or unchosen)
    sets = [graphs for graphs in loader.loaded_graphs() if graphs.bundle is bundle]
    for graph in found.graphs:
        if graph.rank not in (None, torch_ranks.own_or_first()):
            continue
        why = sets[0].missing(graph.name) if sets else "torch._dynamo is not imported: nothing is compiled yet"
        yield _Unit(graph.name, graph.reached, why)
    for failure in found.failed:
        yield _Unit(failure.kernel, failure.reached or {}, "it did not compile")


def _name_of(what: object) -> str:
    from aot_cache.upstream.codec import unwrapping

    function = unwrapping.function_of(what)
    return f"{function.__module__}:{function.__qualname__}" if function is not None else repr(what)
