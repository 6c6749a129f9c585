"""A bundle's manifest in its two forms: whole, as people and tools read it, and lean, as the loader parses it.

What only `inspect`, `tune` and `diff` need (which points reach a unit, what lost, measurements) goes into one object of
the bundle, hashed like the others; the header keeps what loading needs, since every start of a server parses it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from aot_cache.errors import BundleCorrupt
from aot_cache.store import Bundle

Json = Any

_UNIT_DETAILS = ("via", "reached")
_TUNING_DETAILS = ("candidates", "default", "measured", "reached")
_DETAILS = ("cases", "pruned", "failed")


def split(whole: Mapping[str, Json]) -> tuple[dict[str, Json], bytes]:
    """(lean manifest, details object) of a whole manifest."""
    lean = {k: v for k, v in whole.items() if k not in _DETAILS}
    option_sets: dict[str, int] = {}
    lean["units"] = []
    for unit in whole["units"]:
        pairs = [[name, unit["options"][name]] for name in unit["option_order"]]
        options = option_sets.setdefault(json.dumps(pairs), len(option_sets))
        lean["units"].append(
            {
                "kernel": unit["kernel"],
                "key": unit["key"],
                "object": unit["object"],
                "metadata": unit["metadata"],
                "specialization": [pair["t"] for pair in unit["specialization"]],
                "options": options,
            }
        )
    lean["options"] = [json.loads(text) for text in option_sets]
    lean["tunings"] = [{**_without(t, _TUNING_DETAILS), "first": _first(t)} for t in whole["tunings"]]
    details = {name: whole[name] for name in _DETAILS}
    details["units"] = [{k: unit[k] for k in _UNIT_DETAILS} for unit in whole["units"]]
    details["tunings"] = [{k: t[k] for k in _TUNING_DETAILS} for t in whole["tunings"]]
    data = json.dumps(details, sort_keys=True, separators=(",", ":")).encode()
    lean["details"] = hashlib.sha256(data).hexdigest()
    return lean, data


def whole(bundle: Bundle) -> dict[str, Json]:
    """The whole manifest of a bundle: `split` undone.

    Raises:
        BundleCorrupt: when the details are missing, do not hash, or do not fit the manifest.
    """
    lean = dict(bundle.manifest)
    try:
        details = json.loads(bytes(bundle.object(lean.pop("details"))))
        option_sets = lean.pop("options")
        units = []
        for unit, more in zip(lean["units"], details["units"], strict=True):
            pairs = option_sets[unit["options"]]
            restored = {**unit, "options": dict(pairs), "option_order": [name for name, _ in pairs], **more}
            restored["specialization"] = [{"t": pair} for pair in unit["specialization"]]
            units.append(restored)
        tunings = [
            {**_without(t, ("first",)), **more} for t, more in zip(lean["tunings"], details["tunings"], strict=True)
        ]
        return {**lean, **{name: details[name] for name in _DETAILS}, "units": units, "tunings": tunings}
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise BundleCorrupt(
            f"the details of {bundle.path}", f"they do not fit its manifest ({error})", "build the bundle again"
        ) from error


def _first(tuning: Mapping[str, Json]) -> Json:
    default = tuning["default"]
    return None if default is None else tuning["candidates"][default]


def _without(value: Mapping[str, Json], names: tuple[str, ...]) -> dict[str, Json]:
    return {k: v for k, v in value.items() if k not in names}
