"""The key: named components, each hashed separately, so that a miss can name the part that differs. Pure functions.

Modelled on JAX's `cache_key.py`. A kernel's key holds no torch or Python version, no path and no time, so that one bundle
serves many images and builds are reproducible.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from aot_cache.store import JsonObject, JsonValue

SCHEMA = "1"
UNITS, NATIVE, IR, GRAPHS = "units", "native", "ir", "graphs"
"""Kinds of records in the store: compiled units, the C modules that Triton would build at run time, the result of compiling an
intermediate representation that several units share, and the graphs of one call signature."""


def digest(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def variant(function: str, source: str) -> str:
    """Unique name of a kernel that shares its `module:qualname`: `@` and the start of its source digest are appended."""
    return f"{function}@{source[:12]}"


def function_of(kernel: str) -> str:
    """`module:qualname` of a kernel, without the suffix of `variant`."""
    return kernel.partition("@")[0]


def told_apart(variants: Iterable[str]) -> dict[str, str]:
    """Variant → kernel name: `module:qualname` where that is unique, else the variant."""
    known = {name for name in variants if name != function_of(name)}
    count = Counter(map(function_of, known))
    return {name: function_of(name) if count[function_of(name)] == 1 else name for name in known}


def toolchain_parts(
    *, triton: str, target: JsonObject, toolkit: str, environment: Mapping[str, str], line_info: bool
) -> dict[str, JsonValue]:
    """The named parts that the compiled bytes of all kernels of one build depend on.

    Args:
        triton: Triton's version.
        target: backend, arch and warp size.
        toolkit: the assembler's version (`ptxas`); empty if there is none.
        environment: variables that change code generation.
        line_info: whether line numbers are kept for profiling.
    """
    return {
        "schema": SCHEMA,
        "triton": triton,
        "target": {k: target[k] for k in ("backend", "arch", "warp_size")},
        "toolkit": toolkit,
        "environment": dict(sorted(environment.items())),
        "line_info": line_info,
    }


def unit_parts(
    kernel: str,
    source: str,
    specialization: JsonValue,
    options: JsonObject,
    overrides: JsonObject,
    toolchain: JsonObject,
) -> dict[str, JsonValue]:
    """All named parts of one kernel unit's key. Options are sorted, because their order does not change the code."""
    return {
        **toolchain,
        "kernel": kernel,
        "source": source,
        "specialization": specialization,
        "options": dict(sorted(options.items())),
        "overrides": dict(sorted(overrides.items())),
    }


def unit_key(parts: JsonObject) -> str:
    """The key itself: the hash of the parts' hashes."""
    return digest({name: digest(value) for name, value in parts.items()})


def graph_parts(*, torch: str, git: str, python: str, triton: str, target: JsonObject) -> dict[str, JsonValue]:
    """The named parts that every graph of one build depends on.

    Args:
        torch: the release, without the local version (`+cpu`, `+cu130`).
        git: torch's commit.
        python: major.minor; bytecode depends on it.
        triton: Triton's version; empty for the CPU.
        target: all properties of the target, because Inductor uses more of them than Triton does.
    """
    return {"torch": torch, "torch git": git, "python": python, "triton": triton, "target": dict(target)}


@dataclass(frozen=True)
class Part:
    """One named part of a bundle's key, and what this host has."""

    name: str
    wanted: str
    found: str
    needed: bool = True
    """False if a difference has a cost but does not prevent loading (GPU name, launchers)."""

    @property
    def same(self) -> bool:
        return self.wanted == self.found
