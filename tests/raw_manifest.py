"""A whole manifest, as plain JSON of any content, in the two forms that a bundle has: written apart from `artifact.manifest`.

For tests of what reads such bytes: what is wrong in them on purpose no typed manifest can say.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

Json = Any

_UNIT_DETAILS = ("key", "specialization", "options", "option_order", "via", "reached", "ranks")
_TUNING_DETAILS = ("candidates", "default", "measured", "reached")
_GRAPH_DETAILS = ("guards", "dynamic", "line", "reached", "kernels", "candidates", "per_rank")
_DETAILS = ("cases", "pruned", "failed", "calls")


class _Table:
    """Values by number, each once."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self.values: list[Json] = []

    def number(self, value: Json) -> int:
        text = json.dumps(value, sort_keys=True)
        if text not in self._numbers:
            self._numbers[text] = len(self.values)
            self.values.append(value)
        return self._numbers[text]


def split(whole: Mapping[str, Json]) -> tuple[dict[str, Json], bytes]:
    """(lean manifest, details object) of a whole manifest.

    A lean unit is `[kernel, signature, metadata, binary, Triton's key]`: numbers into `kernels`, `signatures` (each
    parameter's type), `metadata_sets` and `binaries` (digests). The key is null where it names another jit function:
    such a function's own key depends on where it stands in its file, so the loader computes it from `late`.
    """
    signatures, metadata_sets, binaries = _Table(), _Table(), _Table()
    lean = {k: v for k, v in whole.items() if k not in _DETAILS}
    lean["late"] = {}
    lean["units"] = []
    for number, unit in enumerate(whole["units"]):
        pairs = [pair["t"] for pair in unit["specialization"]]
        if unit["memory_key"] is None:
            options = [[name, unit["options"][name]] for name in unit["option_order"]]
            lean["late"][str(number)] = {"specialization": pairs, "options": options}
        lean["units"].append(
            [
                unit["kernel"],
                signatures.number([first for first, _ in pairs]),
                metadata_sets.number(unit["metadata"]),
                binaries.number(unit["object"]),
                unit["memory_key"],
            ]
        )
    lean |= {"signatures": signatures.values, "metadata_sets": metadata_sets.values, "binaries": binaries.values}
    lean["tunings"] = [{**_without(t, _TUNING_DETAILS), "first": _first(t)} for t in whole["tunings"]]
    lean["graphs"] = [_without(graph, _GRAPH_DETAILS) for graph in whole["graphs"]]
    details = {name: whole[name] for name in _DETAILS}
    details["graphs"] = [{k: graph[k] for k in _GRAPH_DETAILS} for graph in whole["graphs"]]
    details["units"] = [{k: unit[k] for k in _UNIT_DETAILS} for unit in whole["units"]]
    details["tunings"] = [{k: t[k] for k in _TUNING_DETAILS} for t in whole["tunings"]]
    data = json.dumps(details, sort_keys=True, separators=(",", ":")).encode()
    lean["details"] = hashlib.sha256(data).hexdigest()
    return lean, data


def _first(tuning: Mapping[str, Json]) -> Json:
    default = tuning["default"]
    return None if default is None else tuning["candidates"][default]


def _without(value: Mapping[str, Json], names: tuple[str, ...]) -> dict[str, Json]:
    return {k: v for k, v in value.items() if k not in names}
