"""`load`, `prime`, `ready`, `seal`, `stats`: a bundle's way into the serving process.

The serving process is sacred: a bad, missing or foreign bundle is one warning and a count, unless `strict` is set.
Loading initialises no CUDA. Kernels are installed on a device when the process uses it: at `load` or `ready` if CUDA is
up, else before its first capture, or at the first launch that would have compiled, whichever comes first.
"""

from __future__ import annotations

import os
import threading
import warnings
from pathlib import Path
from typing import Any

from aot_cache.errors import BundleMissing, Incompatible, NotReady
from aot_cache.runtime import collection, compatible
from aot_cache.runtime.kernels import KernelSet, Report
from aot_cache.runtime.ledger import Ledger
from aot_cache.store import Bundle, read_bundle
from aot_cache.upstream import after_import, torch_capture
from aot_cache.upstream.versions import TORCH_SEEN, TRITON_SEEN, installed, minor

LEDGER = Ledger()
UNTESTED = "AOT_CACHE_UNTESTED"
"""Set to 1 to load under a Triton release that this version was not tested with."""

_sets: list[KernelSet] = []
_graph_bundles: list[Bundle] = []
"""Bundles whose graphs wait for Dynamo to be imported."""
_miss: Any = None
"""`runtime.graphs.Miss`, once Dynamo is imported."""
_folders: list[tuple[Path, str | None]] = []
"""Folders of which the bundle for this GPU is taken once the GPU is known."""
_lock = threading.RLock()
_FORM = (
    "target",
    "toolchain",
    "kernels",
    "units",
    "tunings",
    "native",
    "metadata",
    "metadata_sets",
    "signatures",
    "binaries",
    "graph_key",
    "graphs",
)
_armed = False
_strict = False


class AotCacheWarning(UserWarning):
    """A bundle that could not be used, or a promise that could not be kept."""


def load(path: str | Path, *, digest: str | None = None, strict: bool = False) -> Report | None:
    """Load a bundle into this process.

    Args:
        path: a bundle, or a folder of bundles of which the one for this GPU is taken (when CUDA comes up).
        digest: the bundle's digest as `build` printed it; any other bundle is refused.
        strict: raise instead of warning and going on without the bundle.

    Returns:
        What was installed, updated as more of the process comes up; None when the bundle could not be used, or is
        still to be chosen from a folder.

    Raises:
        AotCacheError: with `strict` only: `BundleMissing`, `BundleCorrupt`, `DigestMismatch`, `Incompatible`.
    """
    global _strict
    _strict = _strict or strict
    with collection.paused():
        return _load(Path(path), digest, strict)


def _load(path: Path, digest: str | None, strict: bool) -> Report | None:
    try:
        if path.is_dir() and not torch_capture.cuda_is_up():
            with _lock:
                _folders.append((path, digest))
            after_import.when_triton_comes(_arm_unharmed)
            after_import.when_dynamo_comes(_arm_graphs_unharmed)
            return None
        kernels = _add(path, digest)
        after_import.when_triton_comes(_arm_unharmed)
        after_import.when_dynamo_comes(_arm_graphs_unharmed)
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
    with _lock, collection.paused():
        _choose_from_folders()
        return (_prime_kernels() if torch_capture.cuda_is_up() else 0) + _prime_graphs()


def _prime_kernels() -> int:
    from aot_cache.upstream import triton_kernel

    arm()
    device = triton_kernel.current_device()
    loaded = 0
    for kernels in list(_sets):
        try:
            if kernels.waiting(device):
                _check(kernels.bundle, look_at_gpu=True)
                kernels.install(device)
            loaded += kernels.prime(device)
        except Exception as error:
            _sets.remove(kernels)
            _refuse(error, _strict)
    return loaded


def _prime_graphs() -> int:
    """Load compiled graphs; those for a GPU once CUDA is up."""
    loaded = 0
    for graphs in list(_miss.sets) if _miss is not None else []:
        if graphs.on_cpu or torch_capture.cuda_is_up():
            try:
                loaded += graphs.prime()
            except Exception as error:
                _miss.sets.remove(graphs)
                _refuse(error, _strict)
    return loaded


def ready(*, strict: bool = False) -> list[Report]:
    """Call after the model is made and before the first capture: install and load what is still waiting.

    Raises:
        NotReady: with `strict`, when a declared kernel is not installed: not imported, of other source, or no bundle.
    """
    prime()
    reports = [kernels.report for kernels in _sets]
    if strict:
        missing = [f"{name} (its module is not imported)" for r in reports for name in r.pending]
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


def _missing_graphs() -> list[str]:
    if any(bundle.manifest["graphs"] for bundle in _graph_bundles):
        return ["graphs (torch._dynamo is not imported: nothing is compiled yet)"]
    sets = _miss.sets if _miss is not None else []
    return [f"{g.loaded.graphs} graphs (CUDA is not initialised)" for g in sets if g.waiting()]


def seal() -> None:
    """Start-up is over: from here on each compile, tuning, module load or C compiler run counts as a miss."""
    LEDGER.seal()


def stats() -> dict[str, Any]:
    """The ledger, and what each bundle has installed; JSON-able."""
    graphs = [vars(found.loaded) for found in (_miss.sets if _miss is not None else [])]
    return {**LEDGER.to_json(), "bundles": [kernels.report.to_json() for kernels in _sets], "graphs": graphs}


def explain(call: Any, *args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """Make the call with nothing compiled, and say for each compiled function in it that misses why it does.

    Args:
        call: what to call, with `args` and `kwargs`; its side effects happen.

    Returns:
        For each frame that Dynamo would trace: `function`, `place` (file:line) and `graphs`, each with the first guard
        or part of its key that the call fails (`why`). Empty when everything hits.
    """

    if _miss is None:
        _arm_graphs_unharmed()
    found: list[dict[str, Any]] = _miss.explain(lambda: call(*args, **kwargs))
    return found


def loaded() -> list[KernelSet]:
    """The bundles in this process."""
    return list(_sets)


def loaded_graphs() -> list[Any]:
    """The `runtime.graphs.GraphSet`s in this process."""
    return list(_miss.sets) if _miss is not None else []


def _add(path: Path, digest: str | None) -> KernelSet:
    bundle = _find(path, digest)
    _check_form(bundle)
    kernels = KernelSet(bundle, LEDGER)
    _check(kernels.bundle, look_at_gpu=False)
    with _lock:
        _sets.append(kernels)
        if bundle.manifest["graphs"]:
            _graph_bundles.append(bundle)
            if _miss is not None:  # Dynamo is here already
                _add_graphs()
    return kernels


def _check_form(bundle: Bundle) -> None:
    """Raises Incompatible for a bundle of another kind, or of another version's form."""
    kind = bundle.manifest.get("kind")
    do = "build it with this version of aot-cache"
    if kind != "units":
        raise Incompatible(f"a bundle of units at {bundle.path}", f"one of {kind!r}", do)
    lacking = [name for name in _FORM if name not in bundle.manifest]
    if lacking:
        raise Incompatible(f"a whole manifest in {bundle.path}", f"it lacks {', '.join(lacking)}", do)


def _choose_from_folders() -> None:
    while _folders:
        path, digest = _folders.pop()
        try:
            _add(path, digest)
        except Exception as error:
            _refuse(error, _strict)


def _find(path: Path, digest: str | None) -> Bundle:
    if not path.is_dir():
        return read_bundle(path, digest, prefetch=True)
    files = sorted(path.glob("*.safetensors"))
    bundles = [bundle for bundle in map(read_bundle, files) if digest in (None, bundle.digest)]
    for bundle in bundles:
        _check_form(bundle)
    fitting = [b for b in bundles if not compatible.differing(compatible.parts(b.manifest, look_at_gpu=False))]
    if not fitting:
        raise BundleMissing(
            f"a bundle for this host in {path}", f"{len(files)} bundles, none fits", "see aot-cache explain FILE"
        )
    if len(fitting) > 1:
        named = ", ".join(b.path.name for b in fitting)
        raise Incompatible(f"one bundle for this host in {path}", f"{named}", "name the file")
    return fitting[0]


def _check(bundle: Bundle, look_at_gpu: bool) -> None:
    release = minor(installed("triton"))
    if bundle.manifest["units"] and release not in TRITON_SEEN and release and os.environ.get(UNTESTED) != "1":
        raise Incompatible(
            f"a Triton that this aot-cache was tested with ({', '.join(TRITON_SEEN)})",
            f"{installed('triton')}",
            f"update aot-cache, or set {UNTESTED}=1",
        )
    differing = compatible.differing(compatible.parts(bundle.manifest, look_at_gpu=look_at_gpu))
    if differing:
        raise Incompatible(
            f"a bundle for this host, not {bundle.path}",
            compatible.say(differing),
            "build one for it (aot-cache build)",
        )


def _refuse(error: Exception, strict: bool) -> None:
    """Go on without a bundle: one warning and a count. An error that is not ours is a bug or a moved upstream: the same."""
    LEDGER.note("rejected_bundle", str(error), torch_capture.capturing())
    if strict:
        raise error
    warnings.warn(f"aot-cache serves without its bundle: {error}", AotCacheWarning, stacklevel=4)


def arm() -> None:
    """Hook Triton's miss path, its C modules and the moment before a capture. Nothing here is on the hit path."""
    global _armed
    with _lock:
        if _armed:
            return
        _armed = True
    from aot_cache.upstream import triton_events, triton_kernel, triton_launcher

    triton_events.listen(lambda kind, name: LEDGER.note(kind, name, torch_capture.capturing()))
    triton_launcher.serve(_native)
    triton_kernel.on_miss(_on_miss)
    torch_capture.before_capture(_before_capture)


def _arm_graphs_unharmed() -> None:
    """Hook Dynamo, inside somebody's import of it, which must not fail because of us."""
    global _miss
    try:
        from aot_cache.runtime.graphs import Miss

        with _lock:
            if _miss is None:
                _miss = Miss(LEDGER, lambda error: _refuse(error, _strict))
                _miss.arm()
            _add_graphs()
    except Exception as error:
        _graph_bundles.clear()
        _refuse(error, _strict)


def _add_graphs() -> None:
    """Make the graphs of waiting bundles known to Dynamo's misses. What is not for this host is refused, once."""
    from aot_cache.runtime.graphs import GraphSet, differing

    while _graph_bundles:
        bundle = _graph_bundles.pop(0)
        release = minor(installed("torch"))
        if release not in TORCH_SEEN and os.environ.get(UNTESTED) != "1":
            raise Incompatible(
                f"a torch that this aot-cache was tested with ({', '.join(TORCH_SEEN)}) for the graphs of {bundle.path}",
                installed("torch"),
                f"update aot-cache, or set {UNTESTED}=1",
            )
        parts = differing(bundle.manifest["graph_key"], bundle.manifest["target"])
        if parts:
            do = "build for it (aot-cache build)"
            raise Incompatible(f"graphs for this host, not those of {bundle.path}", compatible.say(parts), do)
        _miss.sets.append(GraphSet(bundle, LEDGER))


def _native(source_key: str) -> bytes | None:
    from aot_cache.upstream.triton_launcher import interpreter_tag

    for kernels in _sets:
        for native in kernels.bundle.manifest["native"]:
            if native["source"] == source_key and native["suffix"] == interpreter_tag():
                return kernels.bundle.object(native["object"])
    return None


def _arm_unharmed() -> None:
    """`arm`, inside somebody's `import triton`, which must not fail because of us."""
    try:
        arm()
    except Exception as error:
        _sets.clear()
        _folders.clear()
        _refuse(error, _strict)


def _before_capture() -> None:
    waiting = any(graphs.waiting() for graphs in (_miss.sets if _miss is not None else []))
    if _folders or waiting or any(kernels.report.primed < kernels.report.units for kernels in _sets):
        prime()


def _on_miss(function: Any, key: str, device: int) -> bool:
    """A launch is about to compile: install what is still waiting for this device, and say whether that helped."""
    from aot_cache.upstream import triton_jit, triton_kernel

    try:
        name = triton_jit.name_of(function)
        with _lock:
            adopted = [k for k in _sets if k.adopt(function, name, device)]
            if not adopted and not _folders and not any(k.waiting(device) for k in _sets):
                return False
        prime()
        hit = triton_kernel.has(function, device, key)
    except Exception as error:  # the launch goes on as it would without us
        _refuse(error, _strict)
        return False
    if hit:
        LEDGER.note("late_install", name, torch_capture.capturing())
    return hit
