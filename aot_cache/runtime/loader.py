"""`load`, `arm`, `prime`, `ready`, `seal`, `stats`: the functions of a serving process, for its single `Session`."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aot_cache.errors import DeclarationError
from aot_cache.runtime import bundle_lookup, gc_pause, stats_files
from aot_cache.runtime import policy as policies
from aot_cache.runtime.kernels import KernelSet, Report
from aot_cache.runtime.session import Session

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from aot_cache.runtime.graphs import GraphSet  # imports Dynamo


class AotCacheWarning(UserWarning):
    """A bundle could not be used, or a guarantee could not be kept."""


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
        path: a bundle, or a folder of bundles. From a folder the bundle for this GPU is chosen, once CUDA is initialised.
        digest: the bundle's digest as printed by `build`; any other bundle is refused.
        strict: raise on an error with this bundle, now and later, instead of warning and continuing without the bundle.
        policy: see `arm`.
        together: all ranks of `group` load the same bundle, or none does. All of them must call this.
        group: the process group for `together`; None is the whole job.

    Returns:
        What was installed; later installations update it. None if the bundle could not be used, or has yet to be chosen from
        a folder.

    Raises:
        AotCacheError: with `strict` only: `BundleMissing`, `BundleCorrupt`, `DigestMismatch`, `Untrusted`,
            `Incompatible`, and `RankDisagreement` on every rank.
        DeclarationError: there is no such policy.
    """
    with gc_pause.paused():
        _set_policy(policy, strict)
        SESSION.arm()
        return SESSION.load(Path(path), digest, strict, [group] if together else [])


def load_all(paths: str, digests: str | None, *, strict: bool) -> list[Report | None]:
    """`load` for each bundle of a list as in PATH: what AOT_CACHE and AOT_CACHE_DIGEST have.

    Args:
        paths: bundles or folders, separated by `os.pathsep`.
        digests: one for each of them, separated in the same way; None: none is pinned.

    Raises:
        AotCacheError: see `load`; with `strict` also DeclarationError, if there are not as many digests as bundles, or none.
            Without it, that is a warning, and none of the bundles is loaded: it is not known which of them are meant.
    """
    try:
        bundles = bundle_lookup.listed(paths, digests)
    except DeclarationError as error:
        SESSION.refuse(error, strict)
        arm()
        return []
    return [load(path, digest=digest, strict=strict) for path, digest in bundles]


def unload(bundle: str | os.PathLike[str] | None = None) -> int:
    """Take bundles out of this process: later calls miss, and compile as without them. Their memory is freed.

    Safe at any time and from any thread. What is in use stays:

    - Dynamo's own cache: a compiled function that already hit keeps its entry, and runs that graph in later calls with the same
      guards, until `torch._dynamo.reset()`.
    - What is loaded onto a GPU (modules, and the graphs that launch them), because a captured CUDA graph may need it. Each load
      and unload adds to it. C++ libraries of graphs for the CPU stay mapped, once for each library.
    - The hooks, with their guard of captures, also after the last bundle: see `disarm`.

    Args:
        bundle: the path of a bundle that was loaded, or its digest. A folder that `load` was given, and that still waits for the
            GPU to be known, is forgotten. None: all bundles.

    Returns:
        How many bundles were taken out; 0 if none of them is loaded.
    """
    found = SESSION.unload(bundle if bundle is None or isinstance(bundle, str) else Path(bundle))
    _publish()
    return found


def prime() -> int:
    """Install and load, on the current device, all kernels that the process has imported, and all graphs.

    Kernels and graphs for a GPU wait until the process has initialised CUDA. Returns how many modules and graphs were loaded.

    Raises:
        AotCacheError: a bundle that was loaded with `strict` cannot be installed. Other bundles are dropped with a warning.
    """
    return SESSION.prime()


def ready(*, strict: bool = False, at_start: Mapping[str, int | str | bool] | None = None) -> list[Report]:
    """Install and load everything that still waits. Call it after the model is created and before the first capture.

    Args:
        strict: raise if anything declared is not installed.
        at_start: constants of kernels that are known only now (`aot-cache build --at-start`): name of the parameter → value.
            Their kernels are compiled here, on all cores. It may be called again when more is known.

    Also imports the modules of declared kernels whose package is imported, because a library may import them only at their
    first launch.

    Raises:
        NotReady: with `strict`, if a declared kernel is not installed: not imported, of other source, or no bundle.
    """
    try:
        return SESSION.ready(strict, at_start or {})
    finally:
        _publish()


def seal() -> None:
    """Declare start-up over: from now on each compile, tuning, module load or C compiler run counts as a miss."""
    LEDGER.seal()
    _publish()


def stats() -> dict[str, Any]:
    """The ledger, what each bundle has installed, the last misses with their reasons, the kernels that were unsafe, and the
    replaced functions of torch and Triton (see `upstream.patch.installed`), as a JSON-able dict."""
    return SESSION.stats()


def explain(call: Callable[..., object], *args: object, **kwargs: object) -> list[dict[str, Any]]:
    """Call a function without compiling anything, and explain each compiled function in it that misses.

    Args:
        call: the function. Its side effects happen.
        args, kwargs: its arguments.

    Returns:
        For each frame that Dynamo would trace: `function`, `place` (file:line) and `graphs`, each with the first guard or
        key part that the call fails (`why`). Empty if everything hits.

    Raises:
        Incompatible: the hooks do not work with this release of Dynamo.
    """
    return SESSION.explain(lambda: call(*args, **kwargs))


def loaded() -> list[KernelSet]:
    """The bundles in this process."""
    return SESSION.kernels()


def loaded_graphs() -> list[GraphSet]:
    """The graphs of the bundles in this process; empty until Dynamo is imported."""
    return SESSION.graphs()


def missed_before(function: str, case: str, point: Mapping[str, int]) -> str:
    """Why a call of a compiled function has missed in this process at a declared point; empty if it has not."""
    return SESSION.missed_before(function, case, point)


def arm(policy: str | None = None) -> None:
    """Guard captures: from now on the policy decides what happens on a miss inside a capture, and each miss is counted.

    `load` does this, too. Imports nothing: torch and Triton are hooked once they are imported.

    Args:
        policy: `fallback`, `error` or `observe` (see `runtime.policy`). None: the value of AOT_CACHE_POLICY, else `fallback`.

    Raises:
        DeclarationError: there is no such policy.
    """
    _set_policy(policy, any(kernels.strict for kernels in SESSION.kernels()))
    SESSION.arm()


def disarm() -> None:
    """Take all hooks out of torch and Triton. Kernels and graphs that are installed in their caches stay."""
    SESSION.disarm()


def _publish() -> None:
    """Write `stats()` where the process that answers `/metrics` reads it, if the environment names such a folder."""
    if folder := os.environ.get(stats_files.VARIABLE):
        stats_files.write(folder, SESSION.stats())


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
