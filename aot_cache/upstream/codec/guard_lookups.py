"""Guard registries only by the entries that were looked up, not by their other entries.

Dynamo guards a dict by all its keys and their positions. For a registry that a library fills while models are created, such a
guard holds only for the builder's set and order of models, and fails in a server that also has another model. If a library
accesses a table only by key, the looked-up entries are guarded by their keys instead.

Upstream: `torch/_dynamo/source.py` (`ConstDictKeySource`, `DictGetItemSource`, `DictSubclassGetItemSource`, which can be
replaced by ones with another `index`), `torch/_dynamo/guards.py` (`GuardBuilder.get`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from torch._dynamo.source import ConstDictKeySource, DictGetItemSource, DictSubclassGetItemSource
from torch._guards import Guard, Source

LOOKED_UP = (("transformers.utils.output_capturing", "_CAN_RECORD_REGISTRY"),)
"""(module, name) of the tables. A contract test reads the library's source to check that they are never iterated."""

_OF_ALL = frozenset({"SEQUENCE_LENGTH", "DICT_KEYS_MATCH", "DICT_LENGTH", "MAPPING_KEYS_CHECK"})
_ITEMS = (DictGetItemSource, DictSubclassGetItemSource)


def by_key(guards: Iterable[Guard], builder: Any) -> list[Guard]:
    """`guards`, rewritten to hold whatever other entries such a table has. `builder` evaluates expressions."""
    return [lean for guard in guards for lean in _lean(guard, builder)]


def in_order(sources: Iterable[Source], builder: Any) -> set[Source]:
    """Of `sources` (dicts whose key order is guarded) all but such tables; entries of a table are addressed by key."""
    return {_by_key(source, builder) for source in sources if not _is_table(source, builder)}


def _lean(guard: Guard, builder: Any) -> Iterator[Guard]:
    source = guard.originating_source
    if guard.create_fn_name() in _OF_ALL and _is_table(source, builder):
        return
    if isinstance(source, ConstDictKeySource) and _is_table(source.base, builder):
        return
    lean = _by_key(source, builder)
    yield guard if lean is source else replace(guard, originating_source=lean, _hash=None)


def _by_key(source: Any, builder: Any) -> Any:
    """`source`, with entries of a table addressed by their key instead of the key's position."""
    base = getattr(source, "base", None)
    if not isinstance(base, Source):
        return source
    if isinstance(source, _ITEMS) and isinstance(source.index, ConstDictKeySource) and _is_table(base, builder):
        return replace(source, index=builder.get(source.index))
    lean = _by_key(base, builder)
    return source if lean is base else replace(source, base=lean)


def _is_table(source: Source, builder: Any) -> bool:
    for module, name in LOOKED_UP:
        owner = sys.modules.get(module)
        if owner is not None and source.name.endswith((f".{name}", f"[{name!r}]")):
            return builder.get(source) is vars(owner).get(name)
    return False
