"""Describes a miss on one line."""

from __future__ import annotations

from aot_cache.artifact.specialization import signature, value_text
from aot_cache.misses.file import GRAPH, KERNEL, TUNING, Miss
from aot_cache.misses.size_relations import readable


def asked(miss: Miss) -> str:
    """What was missed, on one line."""
    try:
        return _asked(miss)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RecursionError) as error:
        return f"a value that no launch has ({type(error).__name__})"  # a build, which decodes it, reports the error


def _asked(miss: Miss) -> str:
    if miss.kind == GRAPH:
        sizes = [f"{readable(path)} {'×'.join(map(str, found))}" for path, found in miss.facts["sizes"].items()]
        return ", ".join([*sizes, miss.facts["mode"]])
    if miss.kind == KERNEL:
        return " ".join(map(signature, miss.units()))
    tuning = miss.tuning()
    if tuning is not None:
        return f"({', '.join(map(value_text, tuning.key))}), {len(tuning.candidates)} configs"
    return "a choice between Inductor's configs" if miss.kind == TUNING else ""
