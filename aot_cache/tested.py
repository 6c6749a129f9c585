"""The releases of torch, Triton and transformers that this version was tested with, and what to do with others.

The table (`tested.json`) is written by `tools/check_torch` from its record: which releases were tested together, and for each
module of `upstream/` what it relies on and the releases where its tests passed. Untested releases may work, so they give a
warning. Releases older than all tested ones, and releases where a needed contract is broken, are refused.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path

TABLE = Path(__file__).with_name("tested.json")
GRAPHS, KERNELS = "graphs", "kernels"
NOT_RUN = "(not run)"
"""Suffix of the name of a test part that was not run."""
UNTESTED = "AOT_CACHE_UNTESTED"
"""Variable: 1 allows untested releases without a warning."""
_NOT_FOR = {GRAPHS: ("triton_",), KERNELS: ("dynamo_", "inductor_")}
"""Content of a bundle → name prefixes of the `upstream/` modules that serving it does not need."""


@dataclass(frozen=True)
class Module:
    """A module of `upstream/`: the upstream files and names that it uses (text), whether serving needs it, and the releases
    where its tests passed."""

    relies_on: str
    serves: bool
    torch: tuple[str, ...]
    triton: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """Two minor releases that were tested together.

    Args:
        transformers: releases with which the tests of the shipped recipes passed.
        broken: modules of `upstream/` whose contract does not hold.
        failed: other test parts that failed, such as `graph hits`, or were not run: `graph hits (not run)`.
    """

    torch: str
    triton: str
    transformers: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return f"{self.torch} × {self.triton}"


@dataclass(frozen=True)
class Table:
    """Everything that was tested; pairs are sorted by torch's release, oldest first."""

    modules: Mapping[str, Module]
    pairs: tuple[Pair, ...]

    def refused(self, what: str, torch: str, triton: str) -> str:
        """Why `what` (GRAPHS or KERNELS) must not be served with these releases; empty if it may be.

        Args:
            triton: empty if Triton is not used.
        """
        for name, here, known in (
            ("torch", torch, [p.torch for p in self.pairs]),
            ("triton", triton, [p.triton for p in self.pairs]),
        ):
            oldest = min(known, key=_number, default="")
            if here and oldest and _number(minor(here)) < _number(oldest):
                return f"{name} {here} is too old: {oldest} is the oldest that works"
        broken = [m for pair in self._of(torch, triton) for m in pair.broken if self._needed(m, what)]
        if broken and all(pair.broken for pair in self._of(torch, triton)):
            return (
                f"with {_named(torch, triton)}, {', '.join(sorted(set(broken)))} of aot_cache.upstream fails its tests"
            )
        return ""

    def doubt(self, torch: str, triton: str, transformers: str = "") -> str:
        """Why these releases together are doubtful: untested, or with failed tests; empty if they are fine.

        Args:
            triton, transformers: empty if not used.
        """
        found = self._of(torch, triton)
        if not found:
            known = ", ".join(dict.fromkeys(pair.text if triton else pair.torch for pair in self.pairs))
            return f"never tested with {_named(torch, triton)} (tested: {known or 'none'})"
        if all(pair.failed or pair.broken for pair in found):
            short = sorted({part for pair in found for part in (*pair.failed, *pair.broken)})
            failed = [part for part in short if not part.endswith(NOT_RUN)]
            if failed:
                return f"tests did not pass with {_named(torch, triton)}: {', '.join(failed)}"
            unrun = (part.removesuffix(NOT_RUN).strip() for part in short)
            return f"not all tests were run with {_named(torch, triton)}: {', '.join(unrun)}"
        known_there = {minor(release) for pair in found for release in pair.transformers}
        if transformers and minor(transformers) not in known_there:
            tested = ", ".join(sorted(known_there, key=_number)) or "none"
            return f"never tested with {_named(torch, triton)} × transformers {transformers} (tested there: {tested})"
        return ""

    def transformers(self) -> list[str]:
        """All releases of transformers with which the tests of the shipped recipes passed in any pair."""
        return sorted({release for pair in self.pairs for release in pair.transformers}, key=_number)

    def _of(self, torch: str, triton: str) -> list[Pair]:
        return [p for p in self.pairs if p.torch == minor(torch) and (not triton or p.triton == minor(triton))]

    def _needed(self, module: str, what: str) -> bool:
        return module in self.modules and self.modules[module].serves and not module.startswith(_NOT_FOR[what])


@cache
def table() -> Table:
    """The table of this version."""
    return read(TABLE.read_text())


def read(text: str) -> Table:
    """Parse the table from JSON."""
    found = json.loads(text)
    modules = {
        name: Module(row["relies_on"], row["serves"], tuple(row["torch"]), tuple(row["triton"]))
        for name, row in found["modules"].items()
    }
    pairs = [
        Pair(pair["torch"], pair["triton"], tuple(pair["transformers"]), tuple(pair["broken"]), tuple(pair["failed"]))
        for pair in found["pairs"]
    ]
    return Table(modules, tuple(sorted(pairs, key=lambda pair: (_number(pair.torch), _number(pair.triton)))))


def refused_here(what: str, on_cpu: bool) -> str:
    """`Table.refused` for the installed releases. Triton is ignored on the CPU."""
    return "" if os.environ.get(UNTESTED) == "1" else table().refused(what, *_installed(on_cpu))


def doubt_here(on_cpu: bool, transformers: bool = False) -> str:
    """`Table.doubt` for the installed releases; `transformers`: whether it is used."""
    if os.environ.get(UNTESTED) == "1":
        return ""
    return table().doubt(*_installed(on_cpu), installed("transformers") if transformers else "")


def _installed(on_cpu: bool) -> tuple[str, str]:
    return installed("torch"), "" if on_cpu else installed("triton")


def here(packages: Iterable[str] = ("torch", "triton", "transformers")) -> str:
    """The installed ones of `packages` as text: `torch 2.13.0, triton 3.7.1`."""
    return ", ".join(f"{name} {installed(name)}" for name in packages if installed(name))


def minor(version: str) -> str:
    """`"3.7.1+git"` → `"3.7"`."""
    return ".".join(version.split("+")[0].split(".")[:2])


def installed(package: str) -> str:
    """The version of `package`, imported or installed; empty if it is neither."""
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is not None:
        return str(version)  # saves reading the package's metadata from disk
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for part in version.split("+")[0].split(".") if (digits := _leading(part)))


def _leading(part: str) -> str:
    """The leading digits of `part`: a nightly's last number is `0a0`, `0.dev20261101` or `0rc1`."""
    return part[: len(part) - len(part.lstrip("0123456789"))]


def _named(torch: str, triton: str) -> str:
    return f"torch {torch} × triton {triton}" if triton else f"torch {torch}"
