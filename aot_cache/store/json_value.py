"""Types for JSON: values that are kept and passed on, and raw JSON at the edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

JsonValue: TypeAlias = bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"] | None
JsonObject: TypeAlias = Mapping[str, JsonValue]
"""What JSON can say, for values that are not looked into."""
Json: TypeAlias = Any
"""Raw JSON: read from a file of which only the reader knows the form, or shown to people."""
