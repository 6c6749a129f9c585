"""Facts about plans and bundles as plain JSON-able dicts, as printed by `--json` and shown in tables.

Pure functions, which import neither torch nor Triton.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from aot_cache.artifact.key import Part
from aot_cache.artifact.manifest import Manifest, unit_label, whole
from aot_cache.artifact.plan import Failure, Plan, Tuning, Unit
from aot_cache.artifact.plan_of_ranks import apart
from aot_cache.artifact.rehearsed import NO_STAMP, Stamp
from aot_cache.artifact.specialization import Names, closure_digest, no_names, signature
from aot_cache.cli.facts import coverage_grid
from aot_cache.cli.facts import graphs as graph_facts
from aot_cache.cli.facts import ledger as ledger_facts
from aot_cache.cli.facts import sizes as size_facts
from aot_cache.cli.facts.coverage_grid import CALL, GRAPH, KERNEL, Served
from aot_cache.errors import (
    AotCacheError,
    BundleCorrupt,
    DeclarationError,
    DigestMismatch,
    Incompatible,
    NotReady,
    Untrusted,
)
from aot_cache.recipes.dimensions import point_text
from aot_cache.store import Bundle, trust

Facts = dict[str, Any]

SHORT = 16
"""Number of a digest's characters that are shown to people."""


# --- plans and bundles ------------------------------------------------------------------------------------------------


def bundle(
    found: Bundle,
    kernel: str | None = None,
    points: bool = False,
    names: Names = no_names,
    ledger: ledger_facts.Ledger | None = None,
    stamp: Stamp = NO_STAMP,
) -> Facts:
    """What a bundle contains; with `kernel` or `points` also its specializations.

    Args:
        kernel: list the specializations of kernels whose name contains this.
        points: list the specializations of every kernel.
        ledger: what serving processes counted.
        stamp: earlier rehearsals of the bundle.

    Raises:
        BundleCorrupt: the manifest does not have this version's form.
        DeclarationError: no kernel's name contains `kernel`.
    """
    m = whole(found)
    with form_of(found):
        inside = plan_of(m)
        objects = [(unit.object, m.objects[unit.object]) for unit in m.units]
        compiled = [
            {"key": unit.key, "bytes": size, "shared": int({**m.metadata, **unit.metadata}.get("shared", 0))}
            for unit, (_, size) in zip(m.units, objects)
        ]
        facts = {
            "kind": "bundle",
            "path": str(found.path),
            "digest": found.digest,
            "bytes": found.size,
            "spec": m.spec,
            "device": m.target["name"],
            "properties": dict(m.target),
            "complete": m.complete,
            "pruned": len(m.pruned),
            "at_start": {
                "specializations": len(m.at_start),
                "constants": sorted({name for variant in m.at_start for name in variant.arguments}),
            },
            "engine_caches": [
                {
                    "engine": entry.engine,
                    "kind": entry.kind,
                    "key": entry.key,
                    "files": len(entry.files),
                    "bytes": sum(m.objects[digest] for digest in set(entry.files.values())),
                }
                for entry in m.engine_caches
            ],
            "key": dict(m.toolchain),
            **_common(inside, failures(m.failed), stamp),
            **stamp.facts(),
            "kernels": _kernels(inside, _chosen(inside, kernel), objects),
        }
        facts["graphs"] = graph_facts.graphs(m.graphs, m.objects)
        facts["graph_key"] = {k: v for k, v in m.graph_key.items() if k != "target"}
        facts["sizes"] = size_facts.sizes(m, found.manifest["details"], found.size)
        facts["grids"] = _grids(inside, GRAPH, facts["graphs"], ledger.missed() if ledger is not None else ())
        if ledger is not None:
            parts = {name for graph in m.graphs for name in graph.graphs}
            facts["ledger"] = ledger_facts.facts(ledger, found.digest, len(parts))
            ledger_facts.annotate(facts["grids"], facts["ledger"])
        if kernel is not None or points:
            facts["specializations"] = _specializations(inside, _chosen(inside, kernel), compiled, names)
    return facts


def plan(found: Plan, path: Path, kernel: str | None = None, points: bool = False, names: Names = no_names) -> Facts:
    """What a plan asks for. Arguments as for `bundle`.

    Raises:
        DeclarationError: the plan does not have this version's form, or no kernel's name contains `kernel`.
    """
    with form(DeclarationError, f"plan {path}"):
        facts = {"kind": "plan", "path": str(path), **_common(found, failures(one.failure() for one in found.failed))}
        facts["kernels"] = _kernels(found, _chosen(found, kernel), [])
        facts["grids"] = _grids(found, CALL, facts["calls"])
        facts["functions"] = [
            {"function": one.function, "calls": len(one.calls), "why": one.why} for one in found.functions
        ]
        if kernel is not None or points:
            facts["specializations"] = _specializations(found, _chosen(found, kernel), [], names)
    return facts


def plan_of(manifest: Manifest) -> Plan:
    """The plan contained in a bundle's whole manifest, without the units that failed or do not fit.

    Raises:
        IndexError, KeyError, ...: the manifest does not have this version's form; see `form`.
    """
    kernels = manifest.kernels
    sources = [closure_digest(kernel.closure) for kernel in kernels]
    return Plan(
        recipe=manifest.recipe,
        target=manifest.target["id"],
        origin=manifest.origin,
        triton=manifest.toolchain["triton"],
        cases=manifest.cases,
        units=[
            Unit(
                kernel=kernels[unit.kernel].name,
                source=sources[unit.kernel],
                specialization=unit.specialization,
                options={option: unit.options[option] for option in unit.option_order},
                via=unit.via,
                reached=unit.reached,
                ranks=unit.ranks,
            )
            for unit in manifest.units
        ],
        tunings=[
            Tuning(
                kernel=kernels[tuning.kernel].name,
                tuner=tuning.tuner,
                key=tuning.key,
                candidates=tuning.candidates,
                choice=tuning.choice,
                measured=tuning.measured,
                reached=tuning.reached,
                ranks=tuning.ranks,
            )
            for tuning in manifest.tunings
        ],
        closures={kernel.name: kernel.closure for kernel in kernels},
        calls=manifest.calls,
        ranks=manifest.ranks,
    )


def failures(found: Iterable[Failure]) -> list[Facts]:
    """The parts of a recipe (cases, kernels, compiled functions) that are not in a bundle, and why."""
    return [{name: str(value) for name, value in failure.text().items()} for failure in found]


def coverage(origin: str, points: int, sampled: Sequence[str], *, failed: int = 0, stamp: Stamp = NO_STAMP) -> str:
    """How far the declared ranges are covered, in words. `proved` appears only if all points were rehearsed."""
    if failed:
        return f"not proved: {failed} failed"
    rehearsals = "; ".join(run.text() for run in stamp.runs)
    if sampled and not any(run.proved for run in stamp.runs):
        return "; ".join(filter(None, (f"sampled: {', '.join(sampled)}", rehearsals)))
    if rehearsals:
        return rehearsals
    if origin == "started":
        return "started: what an engine launched on the virtual device"
    if origin == "recorded" or not points:
        return "recorded: only what ran"
    return f"enumerated {points} point{'s' if points > 1 else ''}"


def _common(found: Plan, failed: list[Facts], stamp: Stamp = NO_STAMP) -> Facts:
    points = sum(case.points for case in found.cases)
    gone = {failure["kernel"] for failure in failed}
    return {
        "recipe": found.recipe,
        "target": found.target,
        "origin": found.origin,
        "ranks": int(found.ranks),
        "apart": apart(found),
        "triton": found.triton,
        "cases": [
            {
                "name": c.name,
                "dims": {dim: str(v) for dim, v in c.dims.items()},
                "points": c.points,
                "total": c.total,
                "mode": c.mode,
                "missed": [point_text(point) for point in c.missed],
                "doc": c.doc,
                "built": f"case {c.name}" not in gone,
            }
            for c in found.cases
        ],
        "points": points,
        "sampled": found.sampled,
        "coverage": coverage(found.origin, points, found.sampled, failed=len(failed), stamp=stamp),
        "failed": failed,
        "units": len(found.units),
        "kernel_count": len({unit.kernel for unit in found.units}),
        "calls": graph_facts.calls(found.calls),
        "untuned": sum(_is_choice(t) and t.choice is None for t in found.tunings),
    }


def _grids(
    found: Plan, kind: str, functions: Sequence[Facts], missed: Iterable[coverage_grid.Missed] = ()
) -> list[Facts]:
    """The coverage by kernels and `functions`: a bundle's graphs, or the compiled calls of a plan, which has no graphs."""
    served = [Served(row["label"], kind, row["function"], row["reached"]) for row in functions]
    served += [Served(unit_label(n), KERNEL, unit.kernel, unit.reached) for n, unit in enumerate(found.units)]
    try:
        return coverage_grid.grids(found.cases, served, missed)
    except DeclarationError as error:  # not a user's declaration: the file does not have this version's form
        raise ValueError(str(error)) from error


def _is_choice(tuning: Tuning) -> bool:
    return len(tuning.candidates) > 1


def _kernels(found: Plan, kernels: Collection[str], objects: Sequence[tuple[str, int]]) -> list[Facts]:
    """One row for each kernel. `objects` has (digest, bytes) of each unit; equal binaries are stored and counted once."""
    rows = []
    for name in sorted(kernels):
        tunings = [t for t in found.tunings if t.kernel == name]
        choices = [t for t in tunings if _is_choice(t)]
        configs = {json.dumps(c, sort_keys=True) for t in tunings for c in t.candidates}
        mine = {objects[n] for n, u in enumerate(found.units) if u.kernel == name} if objects else set()
        rows.append(
            {
                "kernel": name,
                "specializations": sum(u.kernel == name for u in found.units),
                "configs": max(1, len(configs)),
                "bytes": sum(size for _, size in mine) if objects else None,
                "choices": len(choices),
                "tuned": sum(t.choice is not None for t in choices),
            }
        )
    return rows


def _chosen(found: Plan, kernel: str | None) -> set[str]:
    known = {unit.kernel for unit in found.units}
    chosen = {name for name in known if kernel is None or kernel in name}
    if kernel is not None and not chosen:
        raise DeclarationError(
            f"no kernel has {kernel!r} in its name; known: {', '.join(sorted(known)) or 'none'}",
            hint="name one of these",
        )
    return chosen


def _specializations(found: Plan, kernels: Collection[str], compiled: Sequence[Facts], names: Names) -> list[Facts]:
    called = {kernel: list(names(kernel, found.closures[kernel])) for kernel in kernels}
    rows = []
    for number, unit in enumerate(found.units):
        if unit.kernel not in kernels:
            continue
        parts = {
            "kernel": unit.kernel,
            "source": unit.source,
            "specialization": unit.specialization,
            "options": unit.options,
        }
        if unit.overrides:
            parts["overrides"] = unit.overrides
        rows.append(
            {
                "label": unit_label(number),
                "kernel": unit.kernel,
                "signature": signature(unit, called[unit.kernel]),
                **(compiled[number] if compiled else {"id": unit.id}),
                "reached": unit.reached,
                "reached_by": reached_text(unit.reached) or ["no declared point"],
                "ranks": unit.ranks,
                "parts": parts,
            }
        )
    return sorted(rows, key=lambda row: str(row["kernel"]))


@contextmanager
def form(error: type[AotCacheError], what: str) -> Iterator[None]:
    """Raise `error` about `what` if its form is unknown: a file with a right hash may be from another version, or hostile."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as caught:
        why = f"{type(caught).__name__}: {caught}"
        raise error(f"{what} is of another form than this version reads: {why}", hint="build it again") from caught


def form_of(found: Bundle) -> AbstractContextManager[None]:
    """Inside, a manifest without this version's form raises BundleCorrupt."""
    return form(BundleCorrupt, f"bundle {found.path}")


def many(count: int, what: str) -> str:
    """`1 graph`, `2 graphs`."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def reached_text(reached: Mapping[str, Iterable[Mapping[str, str]]]) -> list[str]:
    """One line for each box of points: `decode: batch 1..64, tokens 1`."""
    return [
        f"{case}: {', '.join(f'{dim} {values}' for dim, values in box.items()) or 'always'}"
        for case, boxes in reached.items()
        for box in boxes
    ]


# --- a bundle on this host --------------------------------------------------------------------------------------------


def findings(found: Bundle, digest: str | None, parts: Iterable[Part]) -> list[Facts]:
    """The faults of a bundle whose header is valid, each with its bit of the exit code."""
    out: list[Facts] = []
    if digest is not None and digest != found.digest:
        out.append(finding(DigestMismatch, f"expected digest {digest}, found {found.digest}"))
    out += [finding(BundleCorrupt, f"the bytes of object {name} do not hash to its name") for name in found.check_all()]
    with form_of(found):
        for name in found.manifest["binaries"]:
            if name not in found.manifest["objects"]:
                out.append(finding(BundleCorrupt, f"binary {name[:SHORT]} is not among the bundle's objects"))
        for part in parts:
            if part.needed and not part.same:
                what = f"{part.name}: the bundle is for {part.wanted}, this host has {part.found}"
                out.append(finding(Incompatible, what))
        if found.manifest["complete"] is not True:
            out += [finding(NotReady, f"the build is incomplete: {what}") for what in _failed(found)]
    return out


def place(found: Bundle) -> list[Facts]:
    """The finding about a bundle that others can have written, for one that nothing else proves."""
    try:
        trust.require_own(found.path, found.status())
    except Untrusted as error:
        return [finding(Untrusted, str(error))]
    return []


def _failed(found: Bundle) -> list[str]:
    """The parts that are missing in an incomplete bundle, and why."""
    nobody_knows = ["something did not compile"]
    try:
        failed = whole(found).failed
    except BundleCorrupt:  # a wrong hash, which is a separate finding
        return nobody_knows
    return [f"{f['kernel']}: {f['error']}" for f in failures(failed)] or nobody_knows


def finding(error: type[AotCacheError], what: str) -> Facts:
    """One finding of `verify`."""
    kinds = {Untrusted: "not trusted", Incompatible: "not for this host", NotReady: "incomplete"}
    return {"code": error.exit_code, "kind": kinds.get(error, "corrupt"), "what": what}


def explain(found: Bundle, parts: Iterable[Part]) -> Facts:
    """The parts of the bundle's key beside those of this host."""
    parts = list(parts)
    return {
        "path": str(found.path),
        "digest": found.digest,
        "loads": all(part.same or not part.needed for part in parts),
        "parts": [
            {"name": part.name, "bundle": part.wanted, "host": part.found, "status": _status(part)} for part in parts
        ],
    }


def _status(part: Part) -> str:
    if part.same:
        return "ok"
    return "differs" if part.needed else "costs"
