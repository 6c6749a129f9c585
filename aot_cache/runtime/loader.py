"""`load`, `arm`, `prime`, `ready`, `seal`, `stats`: a bundle's way into the serving process, for its one `Session`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aot_cache.errors import DeclarationError
from aot_cache.runtime import gc_pause, stats_files
from aot_cache.runtime import policy as policies
from aot_cache.runtime.kernels import KernelSet, Report
from aot_cache.runtime.session import Session

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from aot_cache.runtime.graphs import GraphSet  # imports Dynamo


class AotCacheWarning(UserWarning):
    """A bundle that could not be used, or a promise that could not be kept."""


def _warn(text: str) -> None:
    warnings.warn(text, AotCacheWarning, stacklevel=5)  # the caller of `load`, from `Session._refuse`


SESSION = Session(_warn)
LEDGER, MISSES, GUARD, HOOKS = SESSION.ledger, SESSION.misses, SESSION.guard, SESSION.hooks


def load(
    path: str | Path,
    *,
    digest: str | None = None,
    strict: bool = False,
    policy: str | None = None,
    together: bool = False,
    group: ProcessGroup | None = None,
) -> Report | None:
    """Load a bundle into this process, and arm the guard.

    Args:
        path: a bundle, or a folder of bundles of which the one for this GPU is taken (when CUDA comes up).
        digest: the bundle's digest as `build` printed it; any other bundle is refused.
        strict: raise instead of warning and going on without the bundle; for this bundle, now and later.
        policy: see `arm`.
        together: all ranks of `group` (None: of the whole job) load the same bundle, or none does; all of them call this.

    Returns:
        What was installed, updated as more of the process comes up; None when the bundle could not be used, or is
        still to be chosen from a folder.

    Raises:
        AotCacheError: with `strict` only: `BundleMissing`, `BundleCorrupt`, `DigestMismatch`, `Incompatible`,
            and `RankDisagreement` on every rank.
        DeclarationError: there is no such policy.
    """
    with gc_pause.paused():
        _set_policy(policy, strict)
        SESSION.arm()
        return SESSION.load(Path(path), digest, strict, [group] if together else [])


def prime() -> int:
    """Install and load, on the current device, everything whose kernels the process has imported.

    Kernels and graphs for a GPU are left alone until the process has initialised CUDA. Returns how many modules and
    graphs were loaded.

    Raises:
        AotCacheError: of a bundle that was loaded with `strict`; of others what cannot be installed is dropped with a warning.
    """
    return SESSION.prime()


def ready(*, strict: bool = False) -> list[Report]:
    """Call after the model is made and before the first capture: install and load what is still waiting.

    Imports the modules of declared kernels whose package is imported: libraries may do so at the first launch only.

    Raises:
        NotReady: with `strict`, when a declared kernel is not installed: not imported, of other source, or no bundle.
    """
    try:
        return SESSION.ready(strict)
    finally:
        _publish()


def seal() -> None:
    """Start-up is over: from here on each compile, tuning, module load or C compiler run counts as a miss."""
    LEDGER.seal()
    _publish()


def stats() -> dict[str, Any]:
    """The ledger, what each bundle has installed, the last misses with their reasons, what was unsafe, and which functions of
    torch and Triton are replaced (see `upstream.patch.installed`); JSON-able."""
    return SESSION.stats()


def explain(call: Callable[..., object], *args: object, **kwargs: object) -> list[dict[str, Any]]:
    """Make the call with nothing compiled, and say for each compiled function in it that misses why it does.

    Args:
        call: what to call, with `args` and `kwargs`; its side effects happen.

    Returns:
        For each frame that Dynamo would trace: `function`, `place` (file:line) and `graphs`, each with the first guard
        or part of its key that the call fails (`why`). Empty when everything hits.

    Raises:
        Incompatible: Dynamo cannot be looked at in this release.
    """
    return SESSION.explain(lambda: call(*args, **kwargs))


def loaded() -> list[KernelSet]:
    """The bundles in this process."""
    return SESSION.kernels()


def loaded_graphs() -> list[GraphSet]:
    """The graphs of the bundles in this process, as far as Dynamo is imported."""
    return SESSION.graphs()


def missed_before(function: str, case: str, point: Mapping[str, int]) -> str:
    """Why a call of a compiled function has missed in this process at a declared point; empty if none has."""
    return SESSION.missed_before(function, case, point)


def arm(policy: str | None = None) -> None:
    """Guard captures: from now on nothing is compiled, tuned or loaded inside one without being decided and counted.

    `load` does this, too. Imports nothing: what torch and Triton have to be hooked for is hooked when they are imported.

    Args:
        policy: `fallback`, `error` or `observe` (see `runtime.policy`); None: what AOT_CACHE_POLICY says, or `fallback`.

    Raises:
        DeclarationError: there is no such policy.
    """
    _set_policy(policy, any(kernels.strict for kernels in SESSION.kernels()))
    SESSION.arm()


def disarm() -> None:
    """Take every hook out of torch and Triton. What is installed in their caches stays there."""
    SESSION.disarm()


def _publish() -> None:
    """Write `stats()` where the process that answers `/metrics` reads it, if the environment names such a folder."""
    if os.environ.get(stats_files.VARIABLE):
        stats_files.write(SESSION.stats())


LEDGER.changed = _publish


def _set_policy(name: str | None, strict: bool) -> None:
    if name is not None:
        policies.set_default(name)
        return
    try:
        policies.from_environment()
    except DeclarationError as error:
        if strict:
            raise
        policies.set_default("fallback")
        _warn(f"aot-cache: {error}")
