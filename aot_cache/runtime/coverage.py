"""Whether a declared point would hit in this process: every unit that it reaches is installed. Asked before a capture.

From what the bundles say of themselves, the sources that are imported, and what has missed already; nothing is called, and
nothing is looked at on the GPU. What only a call can tell (a guard on a value that changed since) is `aot_cache.explain`'s
to say, until it has missed once.
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
    """An answer; true when everything is installed.

    Args:
        hit: whether the point would hit.
        why: what is not there, one line each.
    """

    hit: bool
    why: list[str]

    def __bool__(self) -> bool:
        return self.hit


def will_hit(what: object, point: Mapping[str, int]) -> Hit:
    """Whether a point would hit.

    Args:
        what: a case of the recipe by its name; or a compiled function or Triton kernel, itself or as `module:qualname`:
            then of what the cases reach at `point`, only that.
        point: dimension → value, for all dimensions of the case.

    Raises:
        UnknownName: no bundle that is loaded knows `what`.
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
    """A specialization, a choice or a graph; `missing` says why it is not installed, empty when it is."""

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
