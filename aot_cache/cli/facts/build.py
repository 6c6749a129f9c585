"""Facts about targets, and about planned and finished builds, as plain JSON-able dicts. Imports neither torch nor Triton."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aot_cache.artifact.key import function_of
from aot_cache.artifact.plan import Plan
from aot_cache.artifact.reached import together
from aot_cache.artifact.rehearsed import NO_STAMP, Stamp
from aot_cache.artifact.specialization import Names, no_names
from aot_cache.artifact.target import Difference, Target
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.facts.bundle import many
from aot_cache.store import Json

if TYPE_CHECKING:
    from aot_cache.builder.pipeline import Built

Facts = dict[str, Json]

IMAGE = "/opt/aot-cache"
"""The folder for bundles in the suggested Dockerfile lines."""
SERVER = "import aot_cache.auto  # before the model"
"""The first line of a serving process."""


def plan(found: Plan, path: Path, names: Names = no_names) -> Facts:
    """What would be built, and why: `facts.bundle.plan`, plus the points of all cases that reach each kernel and call."""
    facts = bundle_facts.plan(found, path, names=names)
    for row in facts["kernels"]:
        row["reached"] = together(unit.reached for unit in found.units if unit.kernel == row["kernel"])
    for row in [*facts["kernels"], *facts["calls"]]:
        row["reached_by"] = bundle_facts.reached_text(row["reached"]) or ["no declared point"]
    return facts


def of_engine(facts: Facts, engine: Mapping[str, Json]) -> Facts:
    """The facts of a plan, with those of the engine that was started for it, and what launched each kernel first."""
    for row in facts["kernels"]:
        first = engine.get("first", {}).get(function_of(row["kernel"]))
        if first is not None and not row["reached"]:
            row["reached_by"] = [first]
    return {**facts, "engine": engine}


def built(result: Built, stamp: Stamp = NO_STAMP, rehearsal: Facts | None = None) -> Facts:
    """What one build did, and the lines for a Dockerfile and server: none if the build is incomplete or its rehearsal failed.

    Args:
        stamp: earlier rehearsals of the bundle.
        rehearsal: facts of the rehearsal at the end of the build; None if there was none.
    """
    good = not result.failed and (rehearsal is None or rehearsal["passed"])
    return {
        **result.to_json(),
        "path": str(result.path.absolute()),
        "written": bool(result.digest),
        "complete": not result.failed,
        "coverage": _coverage(result, stamp, rehearsal),
        **stamp.facts(),
        "rehearsal": rehearsal,
        "dockerfile": dockerfile(result.path, result.digest) if good else [],
        "server": SERVER if good else "",
    }


def _coverage(result: Built, stamp: Stamp, rehearsal: Facts | None) -> str:
    if not result.failed and rehearsal is not None and not rehearsal["passed"]:
        return str(rehearsal["verdict"])
    if result.engine and not result.failed:
        return engine_coverage(result.engine)
    return bundle_facts.coverage("", result.points, result.sampled, failed=len(result.failed), stamp=stamp)


def engine_coverage(engine: Mapping[str, Json]) -> str:
    """How far an engine that was started on the virtual device could be used, in words."""
    lost = f", {len(engine['unreached'])} not reached" if engine["unreached"] else ""
    return f"{many(engine['requests'], 'kind')} of requests to {engine['name']}{lost}"


def dockerfile(bundle: Path, digest: str) -> list[str]:
    """Dockerfile lines that copy a bundle into an image, and allow no other bundle to be loaded."""
    path = bundle.absolute()
    there = f"{IMAGE}/{path.name}"
    # COPY reads from Docker's context, usually the current folder; from a stage of the image it needs the absolute path.
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    return [f"COPY {_copied(str(here), there)}", f"ENV AOT_CACHE={_quoted(there)} AOT_CACHE_DIGEST={digest}"]


def _copied(source: str, there: str) -> str:
    """The arguments of a Dockerfile's COPY; as JSON if a path contains white space."""
    both = [path.replace("$", "\\$") for path in (source, there)]
    return json.dumps(both, ensure_ascii=False) if re.search(r"\s", source + there) else " ".join(both)


def _quoted(path: str) -> str:
    """A path as the value of a Dockerfile's ENV."""
    plain = path.replace("\\", "\\\\").replace("$", "\\$").replace('"', '\\"')
    return path if plain == path and " " not in path else f'"{plain}"'


def targets(rows: Iterable[Target]) -> list[Facts]:
    """The table of targets, with the sources of its numbers."""
    return [row.properties() for row in rows]


def differences(target: str, found: Iterable[Difference]) -> list[Facts]:
    """The facts in which this machine's GPU differs from the table's row of `target`."""
    return [{"target": target, "field": d.field, "table": _plain(d.table), "device": _plain(d.device)} for d in found]


def _plain(value: object) -> Json:
    return list(value) if isinstance(value, tuple) else value
