"""Facts about a file that may be a plan or a bundle. Imports neither torch nor Triton."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aot_cache.artifact import rehearsed
from aot_cache.artifact.plan import Plan
from aot_cache.artifact.specialization import parameter_names
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.facts import diff as diff_facts
from aot_cache.cli.facts import ledger as ledger_facts
from aot_cache.cli.facts import signature as signature_facts
from aot_cache.errors import BundleCorrupt, DeclarationError
from aot_cache.store import Bundle, read_bundle


def facts(
    path: Path, kernel: str | None, points: bool, ledger: Sequence[Path], keys: Sequence[Path] = ()
) -> dict[str, Any]:
    """The facts for `inspect`: `facts.bundle.plan` or `facts.bundle.bundle`, with their arguments, and `facts.signature.signed`.

    Raises:
        DeclarationError: `ledger` or `keys` are given for a plan, or a file of `ledger` does not belong to this bundle, or one of
            `keys` has no public key.
    """
    if not _is_plan(path):
        known = signature_facts.keys(keys)
        bundle = read_bundle(path)
        _check(bundle)
        found = ledger_facts.read(ledger, bundle.digest) if ledger else None
        stamp = rehearsed.read(path, bundle.digest)
        facts = bundle_facts.bundle(bundle, kernel, points, parameter_names, found, stamp)
        facts["signature"] = signature_facts.signed(path, bundle.digest, known)
        return facts
    if ledger or keys:
        option = "--ledger" if ledger else "--key"
        raise DeclarationError(f"a bundle with {option}", f"a plan ({path})", "name the bundle that was served")
    return bundle_facts.plan(Plan.read(path), path, kernel, points, parameter_names)


def _check(bundle: Bundle) -> None:
    """Raise BundleCorrupt if bytes do not match the header. Checks all objects, even those that only a server reads."""
    bad = bundle.check_all()
    if bad:
        found = f"the bytes of {len(bad)} of its objects do not hash to their names ({', '.join(name[:12] for name in bad[:3])})"
        raise BundleCorrupt(f"bundle {bundle.path} is damaged: {found}", hint="copy or build it again")


def side(path: Path) -> diff_facts.Side:
    """One side of `diff`."""
    return diff_facts.Side(path, Plan.read(path)) if _is_plan(path) else diff_facts.side(read_bundle(path))


def _is_plan(path: Path) -> bool:
    """By content: a bundle begins with a length of 8 bytes, the last of which are zero; JSON has no zero byte."""
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError:
        return False  # read_bundle reports what is wrong
    return b"\0" not in head and head.lstrip()[:1] == b"{"
