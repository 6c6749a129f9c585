"""`load`, `arm`, `prime`, `ready`, `seal`, `stats`: a bundle's way into the serving process, and the guard there.

The serving process is sacred: a bad, missing or foreign bundle is one warning and a count, unless `strict` is set.
Loading initialises no CUDA. Kernels are installed on a device when the process uses it: at `load` or `ready` if CUDA is
up, else before its first capture, or at the first launch that would have compiled, whichever comes first.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aot_cache.artifact.manifest import served
from aot_cache.errors import DeclarationError, Incompatible, NotReady
from aot_cache.runtime import bundle_lookup, gc_pause, host_check, policy
from aot_cache.runtime.guard import Guard
from aot_cache.runtime.hooks import Hooks, Undo
from aot_cache.runtime.kernels import KernelSet, Report
from aot_cache.runtime.ledger import Ledger
from aot_cache.runtime.miss_log import Misses
from aot_cache.store import Bundle
from aot_cache.upstream import after_import, patch
from aot_cache.upstream.hooks import torch_capture

LEDGER = Ledger()
HOOKS = Hooks()
_sets: list[KernelSet] = []
_graph_bundles: list[Bundle] = []
"""Bundles whose graphs wait for Dynamo to be imported."""
_answers: Any = None
"""`runtime.answers.Answers`, once Dynamo is imported."""
_folders: list[tuple[Path, str | None]] = []
"""Folders of which the bundle for this GPU is taken once the GPU is known."""
_doubts: set[str] = set()
"""What was said already."""
_lock = threading.RLock()
_strict = False


class AotCacheWarning(UserWarning):
    """A bundle that could not be used, or a promise that could not be kept."""


def _warn(text: str) -> None:
    warnings.warn(text, AotCacheWarning, stacklevel=5)  # the caller of `load`, from `_refuse`


MISSES = Misses(_warn)


def load(
    path: str | Path,
    *,
    digest: str | None = None,
    strict: bool = False,
    policy: str | None = None,
    together: bool = False,
    group: object = None,
) -> Report | None:
    """Load a bundle into this process, and arm the guard.

    Args:
        path: a bundle, or a folder of bundles of which the one for this GPU is taken (when CUDA comes up).
        digest: the bundle's digest as `build` printed it; any other bundle is refused.
        strict: raise instead of warning and going on without the bundle.
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
    global _strict
    _strict = _strict or strict
    with gc_pause.paused():
        arm(policy)
        return _load(Path(path), digest, strict, [group] if together else [])


def _load(path: Path, digest: str | None, strict: bool, together: list[object]) -> Report | None:
    try:
        for group in together:
            digest = bundle_lookup.agreed(path, digest, group)
        if path.is_dir() and not torch_capture.cuda_is_up():
            with _lock:
                _folders.append((path, digest))
            return None
        kernels = _add(path, digest)
        if torch_capture.cuda_is_up():
            prime()
        return kernels.report
    except Exception as error:
        _refuse(error, strict)
        return None


def prime() -> int:
    """Install and load, on the current device, everything whose kernels the process has imported.

    Kernels and graphs for a GPU are left alone until the process has initialised CUDA. Returns how many modules and
    graphs were loaded.

    Raises:
        AotCacheError: only after `load(strict=True)`; otherwise what cannot be installed is dropped with a warning.
    """
    with _lock, gc_pause.paused():
        _choose_from_folders()
        return (_prime_kernels() if torch_capture.cuda_is_up() else 0) + _prime_graphs()


def _prime_kernels() -> int:
    if not _sets:
        return 0
    from aot_cache.upstream.codec import triton_kernel

    arm()
    HOOKS.once("triton", _triton_hooks)  # a Triton that was half imported when it was waited for
    device = triton_kernel.current_device()
    loaded = 0
    for kernels in list(_sets):
        try:
            if kernels.waiting(device):
                bundle_lookup.check(kernels.bundle, look_at_gpu=True)
                kernels.install(device)
            loaded += kernels.prime(device)
        except Exception as error:
            _sets.remove(kernels)
            _refuse(error, _strict)
    return loaded


def _prime_graphs() -> int:
    """Load compiled graphs; those for a GPU once CUDA is up."""
    loaded = 0
    for graphs in list(_answers.sets) if _answers is not None else []:
        if graphs.on_cpu or torch_capture.cuda_is_up():
            try:
                with GUARD.installing():
                    loaded += graphs.prime()
            except Exception as error:
                _answers.sets.remove(graphs)
                _refuse(error, _strict)
    return loaded


def ready(*, strict: bool = False) -> list[Report]:
    """Call after the model is made and before the first capture: install and load what is still waiting.

    Imports the modules of declared kernels whose package is imported: libraries may do so at the first launch only.

    Raises:
        NotReady: with `strict`, when a declared kernel is not installed: not imported, of other source, or no bundle.
    """
    prime()
    if torch_capture.cuda_is_up():  # before that, nothing is pending
        came = [kernels.import_pending() for kernels in list(_sets)]
        if any(came):
            prime()
        _prime_libraries()
    reports = [kernels.report for kernels in _sets]
    if strict:
        missing = [f"{name} ({_why_pending(r, name)})" for r in reports for name in r.pending]
        missing += [f"{name} ({why})" for r in reports for name, why in r.stale.items()]
        missing += [f"{name} ({why})" for r in reports for name, why in r.unchosen.items()]
        missing += _missing_graphs()
        if not reports:
            missing.append("no bundle is loaded")
        if missing or not all(r.devices or not r.units for r in reports):
            raise NotReady(
                "everything declared to be installed",
                "; ".join(missing) or "CUDA is not initialised",
                "see aot_cache.stats(), and build again if sources changed",
            )
    return reports


def _why_pending(report: Report, name: str) -> str:
    why = report.not_imported.get(name.partition(":")[0])
    return f"its module cannot be imported: {why}" if why else "its module is not imported"


def _missing_graphs() -> list[str]:
    if any(served(bundle).graphs for bundle in _graph_bundles):
        return ["graphs (torch._dynamo is not imported: nothing is compiled yet)"]
    sets = _answers.sets if _answers is not None else []
    waiting = [f"{g.loaded.graphs} graphs (CUDA is not initialised)" for g in sets if g.waiting()]
    return waiting + [f"{name} ({why})" for g in sets for name, why in g.changed().items()]


def seal() -> None:
    """Start-up is over: from here on each compile, tuning, module load or C compiler run counts as a miss."""
    LEDGER.seal()


def stats() -> dict[str, Any]:
    """The ledger, what each bundle has installed, the last misses with their reasons, what was unsafe, and which functions of
    torch and Triton are replaced (see `upstream.patch.installed`); JSON-able."""
    graphs = [vars(found.loaded) for found in (_answers.sets if _answers is not None else [])]
    misses = MISSES.to_json()
    return {
        **LEDGER.to_json(),
        "policy": policy.default(),
        "bundles": [kernels.report.to_json() for kernels in _sets],
        "graphs": graphs,
        "misses": misses,
        "patches": patch.installed(),
        "unsafe": sorted({miss["name"] for miss in misses if miss["action"] == "unsafe"}),
    }


def explain(call: Any, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """Make the call with nothing compiled, and say for each compiled function in it that misses why it does.

    Args:
        call: what to call, with `args` and `kwargs`; its side effects happen.

    Returns:
        For each frame that Dynamo would trace: `function`, `place` (file:line) and `graphs`, each with the first guard
        or part of its key that the call fails (`why`). Empty when everything hits.
    """

    _hook_dynamo()
    found: list[dict[str, Any]] = _answers.explain(lambda: call(*args, **kwargs))
    return found


def loaded() -> list[KernelSet]:
    """The bundles in this process."""
    return list(_sets)


def loaded_graphs() -> list[Any]:
    """The `runtime.graphs.GraphSet`s in this process."""
    return list(_answers.sets) if _answers is not None else []


def missed_before(function: str, case: str, point: Mapping[str, int]) -> str:
    """Why a call of a compiled function has missed in this process at a declared point; empty if none has."""
    return _answers.missed.get((function, case, *point.items()), "") if _answers is not None else ""


def _add(path: Path, digest: str | None) -> KernelSet:
    bundle = bundle_lookup.find(path, digest)
    bundle_lookup.check_form(bundle)
    kernels = KernelSet(bundle, LEDGER)
    bundle_lookup.check(kernels.bundle, look_at_gpu=False)
    _heed(bundle_lookup.doubt(bundle))
    if _strict:
        bundle_lookup.check_gpu(bundle)
    with _lock:
        _sets.append(kernels)
        if served(bundle).graphs:
            _graph_bundles.append(bundle)
            if _answers is not None:  # Dynamo is here already
                _add_graphs()
    return kernels


def _heed(doubt: str) -> None:
    """Warn of releases that nobody tested, once in a process; an error where nothing may be left to chance."""
    if doubt and _strict:
        raise Incompatible("releases that this aot-cache was tested with", doubt, "")
    if doubt and doubt not in _doubts:
        _doubts.add(doubt)
        _warn(f"aot-cache: {doubt}")


def _choose_from_folders() -> None:
    while _folders:
        path, digest = _folders.pop()
        try:
            _add(path, digest)
        except Exception as error:
            _refuse(error, _strict)


def _refuse(error: Exception, strict: bool) -> None:
    """Go on without a bundle: one warning and a count. An error that is not ours is a bug or a moved upstream: the same."""
    LEDGER.note("rejected_bundle", str(error), torch_capture.capturing())
    if strict:
        raise error
    _warn(f"aot-cache serves without its bundle: {error}")


def _add_graphs() -> None:
    """Make the graphs of waiting bundles known to Dynamo's misses. What is not for this host is refused, once."""
    from aot_cache.runtime.graphs import GraphSet

    while _graph_bundles:
        bundle = _graph_bundles.pop(0)
        bundle_lookup.check_torch(bundle)
        parts = host_check.differing(host_check.graph_parts(served(bundle)))
        if parts:
            do = "build for it (aot-cache build)"
            raise Incompatible(f"graphs for this host, not those of {bundle.path}", host_check.say(parts), do)
        _answers.sets.append(GraphSet(bundle, LEDGER))


# --- the guard --------------------------------------------------------------------------------------------------------


def arm(policy: str | None = None) -> None:
    """Guard captures: from now on nothing is compiled, tuned or loaded inside one without being decided and counted.

    `load` does this, too. Imports nothing: what torch and Triton have to be hooked for is hooked when they are imported.

    Args:
        policy: `fallback`, `error` or `observe` (see `runtime.policy`); None: what AOT_CACHE_POLICY says, or `fallback`.

    Raises:
        DeclarationError: there is no such policy.
    """
    _set_policy(policy)
    HOOKS.once("waiting", _wait)


def disarm() -> None:
    """Take every hook out of torch and Triton. What is installed in their caches stays there."""
    HOOKS.take_out()
    GUARD.capture_is_over()


def _set_policy(name: str | None) -> None:
    if name is not None:
        policy.set_default(name)
        return
    try:
        policy.from_environment()
    except DeclarationError as error:
        if _strict:
            raise
        policy.set_default("fallback")
        _warn(f"aot-cache: {error}")


def _wait() -> Iterator[Undo]:
    yield after_import.when_torch_comes(_hook_captures)
    yield after_import.when_triton_comes(_hook_triton)
    yield after_import.when_dynamo_comes(_hook_dynamo)


def _hook_captures() -> None:
    HOOKS.once("captures", lambda: [torch_capture.watch_captures(_before_capture, GUARD.capture_is_over)])


def _hook_triton() -> None:
    """Inside somebody's `import triton`, which must not fail because of us."""
    try:
        HOOKS.once("triton", _triton_hooks)
    except Exception as error:
        _sets.clear()
        _folders.clear()
        _refuse(error, _strict)


def _triton_hooks() -> Iterator[Undo]:
    """Triton's miss paths and its C modules. Nothing here is on the hit path."""
    from aot_cache.upstream.hooks import triton_events, triton_launcher, triton_miss, triton_tuner_miss

    yield triton_events.listen(GUARD.count)
    yield triton_launcher.serve(_native)
    yield triton_miss.instead_of_compiling(GUARD.launch)
    yield triton_miss.around_loading(GUARD.loading)
    # Outside of what counts: what is not measured is not counted as a tuning.
    yield triton_tuner_miss.instead_of_tuning(GUARD.tuning, GUARD.later)


def _hook_dynamo() -> None:
    """Inside somebody's import of Dynamo, which must not fail because of us."""
    global _answers
    try:
        from aot_cache.runtime.graph_lookup import Answers

        with _lock:
            if _answers is None:
                _answers = Answers(GUARD, lambda error: _refuse(error, _strict))
        HOOKS.once("dynamo", _answers.hook)
        with _lock:
            _add_graphs()
    except Exception as error:
        _graph_bundles.clear()
        _refuse(error, _strict)


def _native(source_key: str) -> bytes | None:
    from aot_cache.upstream.hooks.triton_launcher import interpreter_tag

    for kernels in _sets:
        for native in kernels.manifest.native:
            if native.source == source_key and native.suffix == interpreter_tag():
                return kernels.bundle.object(native.object)
    return None


def _before_capture() -> None:
    """Everything that still waits, and the libraries' handles; not while another thread's capture forbids it."""
    if torch_capture.capturing():
        return
    waiting = any(graphs.waiting() for graphs in (_answers.sets if _answers is not None else []))
    if _folders or waiting or any(kernels.report.primed < kernels.report.units for kernels in _sets):
        prime()
    _prime_libraries()


def _prime_libraries() -> None:
    """cuBLAS and cuDNN make their handles at first use, which no capture allows: an eager fallback would be lost, too."""
    if policy.default() == "observe":
        return
    from aot_cache.upstream.hooks import cuda_libraries

    try:
        cuda_libraries.prime()
    except Exception as error:  # out of memory, a library that is missing: the model says it better
        _warn(f"aot-cache could not prime CUDA's libraries before a capture: {error}")


def _late(function: Any, name: str, device: int) -> bool:
    """A launch is about to compile, or to tune: install what is still waiting for this device; true when anything was."""
    try:
        with _lock:
            adopted = [k for k in _sets if k.adopt(function, name, device)]
            if not adopted and not _folders and not any(k.waiting(device) for k in _sets):
                return False
        prime()
    except Exception as error:  # the launch goes on as it would without us
        _refuse(error, _strict)
        return False
    return True


def _reasons(frame: object) -> Any:
    return _answers.reasons(frame)


GUARD = Guard(LEDGER, MISSES, _late, _reasons, _warn)
