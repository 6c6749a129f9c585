"""Types for JSON: values that are passed on unread, and raw JSON at the boundaries."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

JsonValue: TypeAlias = bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None
JsonObject: TypeAlias = Mapping[str, JsonValue]
"""A JSON object that is passed on unread."""
Json: TypeAlias = Any
"""Raw JSON: read from a file whose form only the reader knows, or meant for display."""


def json_in(data: bytes) -> Json:
    """What UTF-8 bytes say. `json.loads` of bytes would guess among more encodings, and import what decodes them.

    Raises:
        ValueError: not UTF-8, or not JSON.
        RecursionError: too many brackets inside brackets.
    """
    return json.loads(data.decode("utf-8"))
