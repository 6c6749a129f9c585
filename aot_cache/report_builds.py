"""Facts about builds and targets as plain JSON-able dicts. Pure functions; they know neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from aot_cache.report import coverage
from aot_cache.target import Difference, Target

if TYPE_CHECKING:
    from aot_cache.build.pipeline import Built

Json = Any
Facts = dict[str, Json]


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
    return [{"target": target, "field": d.field, "table": _plain(d.table), "device": _plain(d.device)} for d in found]


def _plain(value: object) -> Json:
    return list(value) if isinstance(value, tuple) else value
