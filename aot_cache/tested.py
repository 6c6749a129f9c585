"""With which torch, Triton and transformers this version was tested, and what follows for others.

The table (`tested.json`) is written by `tools/check_torch`, from its record: which releases it ran under together, and for
each module of `upstream/` what that relies on and the releases where the tests of that passed. What was never tested may
work, so that it is said and not refused; what is older than all, or is known not to hold, is refused.
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
"""What the name of a part of the tests ends with where nobody ran it."""
UNTESTED = "AOT_CACHE_UNTESTED"
"""Set to 1 to use releases that were not tested, without a warning."""
_NOT_FOR = {GRAPHS: ("triton_",), KERNELS: ("dynamo_", "inductor_")}
"""What a bundle holds → beginnings of the modules of `upstream/` that serving it does without."""


@dataclass(frozen=True)
class Module:
    """A module of `upstream/`: upstream's files and names in words, whether serving needs it, and where its tests passed."""

    relies_on: str
    serves: bool
    torch: tuple[str, ...]
    triton: tuple[str, ...]


@dataclass(frozen=True)
class Pair:
    """Two minor releases that were tested together.

    Args:
        transformers: releases with which the shipped recipes' tests passed there.
        broken: modules of `upstream/` whose contract does not hold.
        failed: other parts of the tests that failed, such as `graph hits`, or that nobody ran: `graph hits (not run)`.
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
    """Everything that was tested; pairs by torch's release, the oldest first."""

    modules: Mapping[str, Module]
    pairs: tuple[Pair, ...]

    def refused(self, what: str, torch: str, triton: str) -> str:
        """Why `what` (GRAPHS or KERNELS) must not be served under these releases; empty when it may be tried.

        Args:
            triton: empty where Triton has no part in it.
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
        """What speaks against trusting these releases together: nobody tested them, or tests did not pass; else empty.

        Args:
            triton, transformers: empty where they have no part in it.
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
        """All releases of transformers with which the shipped recipes' tests passed, somewhere."""
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
    """The table in JSON."""
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
    """`Table.refused` of what is installed; Triton is nothing to what runs on the CPU."""
    return "" if os.environ.get(UNTESTED) == "1" else table().refused(what, *_installed(on_cpu))


def doubt_here(on_cpu: bool, transformers: bool = False) -> str:
    """`Table.doubt` of what is installed, of transformers where it has a part in it."""
    if os.environ.get(UNTESTED) == "1":
        return ""
    return table().doubt(*_installed(on_cpu), installed("transformers") if transformers else "")


def _installed(on_cpu: bool) -> tuple[str, str]:
    return installed("torch"), "" if on_cpu else installed("triton")


def here(packages: Iterable[str] = ("torch", "triton", "transformers")) -> str:
    """`torch 2.13.0, triton 3.7.1`: those of `packages` that are installed."""
    return ", ".join(f"{name} {installed(name)}" for name in packages if installed(name))


def minor(version: str) -> str:
    """`"3.7.1+git"` → `"3.7"`."""
    return ".".join(version.split("+")[0].split(".")[:2])


def installed(package: str) -> str:
    """The version of `package`: what is imported, else what is installed; empty when it is neither."""
    version = getattr(sys.modules.get(package), "__version__", None)
    if version is not None:
        return str(version)  # and reading a package's record waits for the disk
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for part in version.split("+")[0].split(".") if (digits := _leading(part)))


def _leading(part: str) -> str:
    """The digits that `part` begins with: a nightly's last number is `0a0`, `0.dev20261101` or `0rc1`."""
    return part[: len(part) - len(part.lstrip("0123456789"))]


def _named(torch: str, triton: str) -> str:
    return f"torch {torch} × triton {triton}" if triton else f"torch {torch}"
