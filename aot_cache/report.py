"""Facts about plans, bundles, builds and targets as plain JSON-able dicts: what `--json` prints and tables are made of.

Knows neither torch nor Triton. All are pure functions but `parameter_names`, which reads the kernel's source file.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.machinery import PathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aot_cache.errors import AotCacheError, BundleCorrupt, DeclarationError, DigestMismatch, Incompatible, NotReady
from aot_cache.key import Part
from aot_cache.plan import Plan, Tuning, Unit
from aot_cache.plan import diff as plan_diff
from aot_cache.store import Bundle
from aot_cache.target import Difference, Target

if TYPE_CHECKING:
    from aot_cache.build.pipeline import Built

Json = Any
Facts = dict[str, Json]
Names = Callable[[str, Mapping[str, Json]], Sequence[str]]
"""(kernel, its source closure) → its parameters' names, or none when they are not known here."""

SHORT = 16
"""Characters of a digest that are shown to people."""


def no_names(kernel: str, closure: Mapping[str, Json]) -> Sequence[str]:
    """Arguments are then called by their position."""
    return ()


# --- plans and bundles -------------------------------------------------------------------------------------------------


def bundle(found: Bundle, kernel: str | None = None, points: bool = False, names: Names = no_names) -> Facts:
    """What a bundle holds; with `kernel` or `points` also its specializations.

    Args:
        kernel: list the specializations of the kernels with this in their name.
        points: list those of every kernel.

    Raises:
        BundleCorrupt: the manifest has another form than this version writes.
        DeclarationError: no kernel is called so.
    """
    m = found.manifest
    with _form(BundleCorrupt, f"a bundle of this version at {found.path}"):
        plan = plan_of(m)
        objects = [(unit["object"], int(m["objects"][unit["object"]])) for unit in m["units"]]
        compiled = [
            {
                "key": unit["key"],
                "bytes": size,
                "shared": int({**m["metadata"], **unit["metadata"]}.get("shared", 0)),
            }
            for unit, (_, size) in zip(m["units"], objects)
        ]
        facts = {
            "kind": "bundle",
            "path": str(found.path),
            "digest": found.digest,
            "bytes": found.size,
            "spec": m["spec"],
            "device": m["target"]["name"],
            "complete": bool(m["complete"]),
            "failed": [dict(f) for f in m["failed"]],
            "pruned": len(m["pruned"]),
            "key": dict(m["toolchain"]),
            **_common(plan),
            "kernels": _kernels(plan, objects),
        }
        if kernel is not None or points:
            facts["specializations"] = _specializations(plan, _chosen(plan, kernel), compiled, names)
    return facts


def plan(found: Plan, path: Path, kernel: str | None = None, points: bool = False, names: Names = no_names) -> Facts:
    """What a plan asks for; the arguments are those of `bundle`.

    Raises:
        DeclarationError: a value in it has another form than this version writes, or no kernel is called so.
    """
    with _form(DeclarationError, f"a plan of this version at {path}"):
        facts = {"kind": "plan", "path": str(path), **_common(found), "kernels": _kernels(found, [])}
        if kernel is not None or points:
            facts["specializations"] = _specializations(found, _chosen(found, kernel), [], names)
    return facts


def plan_of(manifest: Mapping[str, Json]) -> Plan:
    """The plan that a bundle's manifest carries, without the units that failed or do not fit."""
    name = [k["name"] for k in manifest["kernels"]]
    closures = {k["name"]: k["closure"] for k in manifest["kernels"]}
    sources = {k: _source(closure) for k, closure in closures.items()}
    keep = ("specialization", "options", "via", "reached")
    return Plan.from_json(
        {
            "aot-cache plan": 1,
            "recipe": manifest["recipe"],
            "target": manifest["target"]["id"],
            "origin": manifest["origin"],
            "triton": manifest["toolchain"]["triton"],
            "cases": manifest["cases"],
            "units": [
                {"kernel": name[u["kernel"]], "source": sources[name[u["kernel"]]], **{k: u[k] for k in keep}}
                for u in manifest["units"]
            ],
            "tunings": [{**t, "kernel": name[t["kernel"]]} for t in manifest["tunings"]],
            "closures": closures,
        }
    )


def coverage(origin: str, points: int, sampled: Sequence[str]) -> str:
    """What the declared ranges promise, in words."""
    if sampled:
        return f"sampled: {', '.join(sampled)}"
    if origin == "recorded" or not points:
        return "recorded: what ran, nothing else"
    return f"proved {points} points"


def _common(found: Plan) -> Facts:
    points = sum(case.points for case in found.cases)
    return {
        "recipe": found.recipe,
        "target": found.target,
        "origin": found.origin,
        "triton": found.triton,
        "cases": [
            {"name": c.name, "dims": c.dims, "points": c.points, "total": c.total, "mode": c.mode} for c in found.cases
        ],
        "points": points,
        "sampled": found.sampled,
        "coverage": coverage(found.origin, points, found.sampled),
        "units": len(found.units),
        "untuned": sum(_is_choice(t) and t.choice is None for t in found.tunings),
    }


def _is_choice(tuning: Tuning) -> bool:
    return len(tuning.candidates) > 1


def _kernels(found: Plan, objects: Sequence[tuple[str, int]]) -> list[Facts]:
    """One row a kernel. `objects` are (digest, bytes) of each unit; equal binaries are stored, and counted, once."""
    rows = []
    for name in sorted({unit.kernel for unit in found.units}):
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
            f"a kernel with {kernel!r} in its name", f"there are {', '.join(sorted(known)) or 'none'}", "name one"
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
                "kernel": unit.kernel,
                "signature": signature(unit, called[unit.kernel]),
                **(compiled[number] if compiled else {"id": unit.id}),
                "reached": unit.reached,
                "parts": parts,
            }
        )
    return sorted(rows, key=lambda row: str(row["kernel"]))


@contextmanager
def _form(error: type[AotCacheError], wanted: str) -> Iterator[None]:
    """A file may hash right and still be another version's, or hostile: one clear error instead of a traceback."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as caught:
        raise error(wanted, f"{type(caught).__name__}: {caught}", "build it again with this version") from caught


# --- signatures --------------------------------------------------------------------------------------------------------


def signature(unit: Unit, names: Sequence[str] = ()) -> str:
    """`q:*bf16:16 T:i32 K=128 num_warps=1`: what one specialization was compiled for, on one line."""
    if len(names) != len(unit.specialization):
        names = [f"#{n}" for n in range(len(unit.specialization))]
    words = [_argument(name, pair) for name, pair in zip(names, unit.specialization)]
    # Options that are off, or empty, say nothing.
    words += [f"{k}={_value(v)}" for k, v in unit.options.items() if v not in (None, False, "") and k not in names]
    return " ".join(words)


def _argument(name: str, pair: Json) -> str:
    kind, value = pair["t"]
    if isinstance(kind, dict):  # a tuple: each element has a type and a value of its own
        values = value["t"] if isinstance(value, dict) else [None] * len(kind["t"])
        return " ".join(_argument(f"{name}.{n}", {"t": [k, v]}) for n, (k, v) in enumerate(zip(kind["t"], values)))
    if kind == "constexpr":
        return f"{name}={_value(value)}"
    # Triton's letters: D is divisible by 16, S a pointer into less than 2 GiB (AMD's 32-bit offsets).
    marks = {"D": ":16", "S": ":32bit"}
    return f"{name}:{kind}" + "".join(marks.get(c, f":{c}") for c in (value if isinstance(value, str) else ""))


def _value(value: Json) -> str:
    """An encoded value (see `upstream.triton_jit.encode`) as Python would write it."""
    if not isinstance(value, dict):
        return repr(value)
    if "named" in value:
        return f"{value['named'].rpartition(':')[2]}({', '.join(map(_value, value['t']))})"
    for tag, write in _WRITTEN.items():
        if tag in value:
            return write(value[tag])
    raise ValueError(f"no value of a known kind: {value}")


_WRITTEN: dict[str, Callable[[Json], str]] = {
    "constexpr": _value,
    "dtype": str,
    "torch": "torch.{}".format,
    "float": str,
    "jit": lambda name: str(name).rpartition(":")[2],
    "t": lambda items: f"({', '.join(map(_value, items))})",
    "l": lambda items: f"[{', '.join(map(_value, items))}]",
}


def _source(closure: Mapping[str, Json]) -> str:
    # The same as `upstream.triton_jit.closure_digest`, which cannot be had without importing Triton.
    return hashlib.sha256(json.dumps(closure, sort_keys=True).encode()).hexdigest()


@cache
def _module_text(module: str) -> str:
    """A module's source, found without importing it or the packages above it; empty when it is not here."""
    path: list[str] | None = [os.getcwd(), *sys.path]  # the builder's worker looks in the working folder first, too
    name, origin = "", None
    for part in module.split("."):
        name = f"{name}.{part}".lstrip(".")
        spec = PathFinder.find_spec(name, path)
        if spec is None:
            return ""
        path = list(spec.submodule_search_locations or ())
        origin = spec.origin
    try:
        return Path(origin).read_text(encoding="utf-8") if origin and origin.endswith(".py") else ""
    except (OSError, UnicodeDecodeError):
        return ""


def parameter_names(kernel: str, closure: Mapping[str, Json]) -> Sequence[str]:
    """A kernel's parameters, from the source that is installed here; none unless it is the source it was built from."""
    module, _, qualname = kernel.partition(":")
    text = _module_text(module)
    wanted = closure[kernel]["src"]
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return ()
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef) or node.name != qualname.rpartition(".")[2]:
            continue
        body = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))
        if hashlib.sha256(body.encode()).hexdigest().startswith(wanted):
            return [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    return ()


def reached_text(reached: Mapping[str, Iterable[Mapping[str, str]]]) -> list[str]:
    """`decode: batch 1..64, tokens 1`: one line for each box of points."""
    return [
        f"{case}: {', '.join(f'{dim} {values}' for dim, values in box.items()) or 'always'}"
        for case, boxes in reached.items()
        for box in boxes
    ]


# --- comparing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Side:
    """One side of a comparison: a plan, or the one inside a bundle, with the ids that the bundle left out as unfit."""

    path: Path
    plan: Plan
    pruned: frozenset[str] | None = None
    """None for a plan file."""


def side(found: Bundle) -> Side:
    """Raises BundleCorrupt when the manifest has another form than this version writes."""
    with _form(BundleCorrupt, f"a bundle of this version at {found.path}"):
        return Side(found.path, plan_of(found.manifest), frozenset(p["unit"] for p in found.manifest["pruned"]))


def diff(left: Side, right: Side) -> Facts:
    """What each side launches and the other does not.

    A bundle's units have no overrides written down (they are values of the specialization, too), and lack what does not
    fit the target, which is no difference in what is launched.
    """
    with _form(DeclarationError, f"plans of this version at {left.path} and {right.path}"):
        plans = [_comparable(left, right), _comparable(right, left)]
        found = plan_diff(*plans)
        return {
            "left": str(left.path),
            "right": str(right.path),
            "same": found.same,
            "only_left": _only(found.only_left, found.tunings_left, left.plan),
            "only_right": _only(found.only_right, found.tunings_right, right.plan),
        }


def _comparable(one: Side, other: Side) -> Plan:
    units = [u for u in one.plan.units if u.id not in (other.pruned or ())]
    if one.pruned is not None or other.pruned is not None:
        units = [replace(u, overrides={}) for u in units]
    return replace(one.plan, units=units)


def _only(units: Iterable[Unit], tunings: Iterable[Tuning], found: Plan) -> Facts:
    return {
        "units": [
            {
                "kernel": u.kernel,
                "signature": signature(u, parameter_names(u.kernel, found.closures.get(u.kernel, {u.kernel: {"src": "-"}}))),
                "source": u.source,
                "reached": u.reached,
            }
            for u in units
        ],
        "tunings": [
            {"kernel": t.kernel, "key": [_value(k) for k in t.key], "candidates": len(t.candidates), "reached": t.reached}
            for t in tunings
        ],
    }


# --- a bundle on this host ---------------------------------------------------------------------------------------------


def findings(found: Bundle, digest: str | None, parts: Iterable[Part]) -> list[Facts]:
    """What is wrong with a bundle whose header is sound; each with the bit that it sets in the exit code."""
    out: list[Facts] = []
    if digest is not None and digest != found.digest:
        out.append(finding(DigestMismatch, f"the bundle is {found.digest}, and {digest} was pinned"))
    out += [finding(BundleCorrupt, f"the bytes of object {name} do not hash to its name") for name in found.check_all()]
    with _form(BundleCorrupt, f"a bundle of this version at {found.path}"):
        for unit in found.manifest["units"]:
            if unit["object"] not in found.manifest["objects"]:
                out.append(finding(BundleCorrupt, f"unit {unit['key'][:SHORT]} has no object in the bundle"))
        for part in parts:
            if part.needed and not part.same:
                out.append(
                    finding(Incompatible, f"{part.name}: the bundle is for {part.wanted}, this host has {part.found}")
                )
        if found.manifest["complete"] is not True:
            failed = ", ".join(sorted({f["kernel"] for f in found.manifest["failed"]}))
            out.append(finding(NotReady, f"the build was not complete: {failed or 'units'} did not compile"))
    return out


def finding(error: type[AotCacheError], what: str) -> Facts:
    """One finding of `verify`."""
    kinds = {8: "corrupt", 16: "not for this host", 32: "incomplete"}
    return {"code": error.exit_code, "kind": kinds[error.exit_code], "what": what}


def explain(found: Bundle, parts: Iterable[Part]) -> Facts:
    """This host beside what the bundle was built for."""
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


# --- builds and targets ------------------------------------------------------------------------------------------------


def built(result: Built) -> Facts:
    """What one build did."""
    path = str(result.path.absolute())
    return {
        **result.to_json(),
        "path": path,
        "coverage": coverage("", result.points, result.sampled),
        "dockerfile": f"ENV AOT_CACHE={_quoted(path)} AOT_CACHE_DIGEST={result.digest}",
    }


def _quoted(path: str) -> str:
    """A path as the value of a Dockerfile's ENV."""
    plain = path.replace("\\", "\\\\").replace("$", "\\$").replace('"', '\\"')
    return path if plain == path and " " not in path else f'"{plain}"'


def targets(rows: Iterable[Target]) -> list[Facts]:
    """The table of targets, with the sources of its numbers."""
    return [row.properties() for row in rows]


def differences(target: str, found: Iterable[Difference]) -> list[Facts]:
    """Where this machine's GPU is not what the table says of `target`."""
    return [
        {"target": target, "field": d.field, "table": _plain(d.table), "device": _plain(d.device)} for d in found
    ]


def _plain(value: object) -> Json:
    return list(value) if isinstance(value, tuple) else value
