"""A bundle's manifest in its two forms: whole, as people and tools read it, and lean, as the loader parses it.

Every start of a server parses the header, so it keeps what loading needs and says each thing once: a unit is five
numbers and Triton's own key. What only `inspect`, `tune` and `diff` need (which points reach a unit, what lost,
measurements) goes into one object of the bundle, hashed like the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from aot_cache.errors import BundleCorrupt
from aot_cache.store import Bundle

Json = Any

_UNIT_DETAILS = ("key", "specialization", "options", "option_order", "via", "reached", "ranks")
_TUNING_DETAILS = ("candidates", "default", "measured", "reached")
_GRAPH_DETAILS = ("guards", "dynamic", "line", "reached", "kernels", "candidates", "per_rank")
_DETAILS = ("cases", "pruned", "failed", "calls")


def graph_name(graph: Mapping[str, Json]) -> str:
    """`module:qualname` of the function that a graph is of."""
    return f"{graph['module']}:{graph['function']}"


def graph_label(number: int) -> str:
    """What people, and the ledger, call a bundle's graph: `g1` is the first in its manifest."""
    return f"g{number + 1}"


def call_label(number: int) -> str:
    """What people call a plan's compiled call, which has no graph yet: `c1` is the first in it."""
    return f"c{number + 1}"


def unit_label(number: int) -> str:
    """What people call a bundle's specialization: `k1` is the first in its manifest."""
    return f"k{number + 1}"


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


@lru_cache(maxsize=16)
def _parsed(_digest: str, bundle: Bundle) -> dict[str, Json]:
    found: dict[str, Json] = json.loads(bundle.object(_digest))
    return found


def details(bundle: Bundle) -> Mapping[str, Json]:
    """What a server needs of a bundle for people and misses only; read once, not to be changed."""
    return _parsed(bundle.manifest["details"], bundle)


def whole(bundle: Bundle) -> dict[str, Json]:
    """The whole manifest of a bundle: `split` undone.

    Raises:
        BundleCorrupt: when the details are missing, do not hash, or do not fit the manifest.
    """
    lean = dict(bundle.manifest)
    try:
        details = json.loads(bundle.object(lean.pop("details")))
        lean.pop("late")
        lean.pop("signatures")
        metadata_sets, binaries = lean.pop("metadata_sets"), lean.pop("binaries")
        units = [
            {
                "kernel": unit[0],
                "metadata": metadata_sets[unit[2]],
                "object": binaries[unit[3]],
                "memory_key": unit[4],
                **more,
            }
            for unit, more in zip(lean["units"], details["units"], strict=True)
        ]
        tunings = [
            {**_without(t, ("first",)), **more} for t, more in zip(lean["tunings"], details["tunings"], strict=True)
        ]
        graphs = [{**graph, **more} for graph, more in zip(lean["graphs"], details["graphs"], strict=True)]
        rest = {name: details[name] for name in _DETAILS}
        return {**lean, **rest, "units": units, "tunings": tunings, "graphs": graphs}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BundleCorrupt(
            f"the details of {bundle.path}", f"they do not fit its manifest ({error})", "build the bundle again"
        ) from error


def _first(tuning: Mapping[str, Json]) -> Json:
    default = tuning["default"]
    return None if default is None else tuning["candidates"][default]


def _without(value: Mapping[str, Json], names: tuple[str, ...]) -> dict[str, Json]:
    return {k: v for k, v in value.items() if k not in names}
