"""The key: named components, each hashed apart, so that a miss can name the part that differs. Pure functions.

Built like JAX's `cache_key.py`. A kernel's key holds no torch and no Python version, no path, no time: one bundle serves
many images, and the same input gives the same bytes twice.
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
"""Kinds of records in the store: compiled units, the C modules that Triton would build at run time, what became of an
intermediate representation that several units share, and the graphs of one kind of call."""


def digest(value: object) -> str:
    """sha256 of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def variant(function: str, source: str) -> str:
    """The name of one of several kernels of one function's name: `module:qualname@` and the start of its source's digest."""
    return f"{function}@{source[:12]}"


def function_of(kernel: str) -> str:
    """`module:qualname` of a kernel, without what tells it from others of that name."""
    return kernel.partition("@")[0]


def told_apart(variants: Iterable[str]) -> dict[str, str]:
    """Variant → what the kernel is called: by its function's name alone where no other one has that."""
    known = {name for name in variants if name != function_of(name)}
    count = Counter(map(function_of, known))
    return {name: function_of(name) if count[function_of(name)] == 1 else name for name in known}


def toolchain_parts(
    *, triton: str, target: JsonObject, toolkit: str, environment: Mapping[str, str], line_info: bool
) -> dict[str, JsonValue]:
    """What the compiled bytes of every kernel of one build depend on.

    Args:
        triton: Triton's version.
        target: backend, arch and warp size.
        toolkit: the assembler's version (`ptxas`), empty where there is none.
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
    """All named parts of one kernel unit's key. Options are a mapping here: their order changes no code."""
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
    """What every graph of one build is bound to.

    Args:
        torch: the release, without the build's flavour (`+cpu`, `+cu130`).
        git: torch's commit.
        python: major.minor; bytecode is bound to it.
        triton: Triton's version; empty for the CPU.
        target: the whole target: Inductor looks at more of it than Triton does.
    """
    return {"torch": torch, "torch git": git, "python": python, "triton": triton, "target": dict(target)}


@dataclass(frozen=True)
class Part:
    """One named part of a bundle's key beside what this host has."""

    name: str
    wanted: str
    found: str
    needed: bool = True
    """False where a difference costs something but does not forbid loading (GPU name, launchers)."""

    @property
    def same(self) -> bool:
        return self.wanted == self.found
