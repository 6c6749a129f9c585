"""Bytes on disk: content-addressed objects, records, and bundles. Imports neither torch nor Triton.

Writers replace files whole, and take a lock for work that must not be done twice. Readers take no lock, write nothing and
trust no byte that they did not hash. Nothing here is ever unpickled or executed.
"""

from __future__ import annotations

from aot_cache.store.atomic import write_atomic
from aot_cache.store.bundle import (
    INCOMPLETE,
    Bundle,
    bundles_in,
    in_header,
    looks_sound,
    peek,
    read_bundle,
    write_bundle,
)
from aot_cache.store.json_value import Json, JsonObject, JsonValue, json_in
from aot_cache.store.objects import Store

__all__ = [
    "INCOMPLETE",
    "Bundle",
    "Json",
    "JsonObject",
    "JsonValue",
    "Store",
    "bundles_in",
    "in_header",
    "json_in",
    "looks_sound",
    "peek",
    "read_bundle",
    "write_atomic",
    "write_bundle",
]
