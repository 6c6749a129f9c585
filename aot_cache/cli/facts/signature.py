"""Facts about the signatures of a bundle. Imports cryptography only where there are keys to check with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aot_cache.cli.facts.bundle import finding
from aot_cache.errors import Untrusted
from aot_cache.store import signature
from aot_cache.store.signature import Key

Facts = dict[str, Any]


def keys(files: Sequence[Path]) -> list[Key] | None:
    """The public keys in these files; without a file those that a server here would trust, or None.

    Raises:
        DeclarationError: a file has no public key, or cryptography is not installed.
    """
    return [key for file in files for key in signature.public_keys(file)] if files else signature.trusted_keys()


def signed(path: Path, digest: str, keys: Sequence[Key] | None) -> Facts:
    """What is beside the bundle at this path with this digest, and which of the keys have signed it; None: nothing is checked."""
    found = signature.read(path)
    by = list(found.by(digest, keys or ()))
    return {
        "path": str(found.path),
        "signatures": len(found.found),
        "problem": found.problem,
        "checked": keys is not None,
        "keys": [key.id for key in by],
        "why_not": found.why_not(keys) if keys is not None and not by else "",
    }


def findings(facts: Facts) -> list[Facts]:
    """The finding of `verify` about a bundle that none of the keys has signed."""
    why = facts["why_not"]
    return [finding(Untrusted, f"not signed by a trusted key: {why}")] if why else []
