"""Types for JSON: values that are passed on unread, and raw JSON at the boundaries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

JsonValue: TypeAlias = bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None
JsonObject: TypeAlias = Mapping[str, JsonValue]
"""A JSON object that is passed on unread."""
Json: TypeAlias = Any
"""Raw JSON: read from a file whose form only the reader knows, or meant for display."""
