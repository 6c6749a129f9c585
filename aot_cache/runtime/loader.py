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
from aot_cache.upstream.versions import TRITON_SEEN, installed, minor

LEDGER = Ledger()
UNTESTED = "AOT_CACHE_UNTESTED"
"""Set to 1 to load under a Triton release that this version was not tested with."""

_sets: list[KernelSet] = []
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
            return None
        kernels = _add(path, digest)
        after_import.when_triton_comes(_arm_unharmed)
        if torch_capture.cuda_is_up():
            prime()
        return kernels.report
    except Exception as error:
        _refuse(error, strict)
        return None


def prime() -> int:
    """Install and load, on the current device, everything whose kernels the process has imported.

    The process must have initialised CUDA. Returns how many modules were loaded.

    Raises:
        AotCacheError: only after `load(strict=True)`; otherwise what cannot be installed is dropped with a warning.
    """
    from aot_cache.upstream import triton_kernel

    arm()
    device = triton_kernel.current_device()
    loaded = 0
    with _lock, collection.paused():
        _choose_from_folders()
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


def ready(*, strict: bool = False) -> list[Report]:
    """Call after the model is made and before the first capture: install and load what is still waiting.

    Raises:
        NotReady: with `strict`, when a declared kernel is not installed: not imported, of other source, or no bundle.
    """
    if torch_capture.cuda_is_up():
        prime()
    reports = [kernels.report for kernels in _sets]
    if strict:
        missing = [f"{name} (its module is not imported)" for r in reports for name in r.pending]
        missing += [f"{name} ({why})" for r in reports for name, why in r.stale.items()]
        missing += [f"{name} ({why})" for r in reports for name, why in r.unchosen.items()]
        if not reports:
            missing.append("no bundle is loaded")
        if missing or not all(r.devices for r in reports):
            raise NotReady(
                "everything declared to be installed",
                "; ".join(missing) or "CUDA is not initialised",
                "see aot_cache.stats(), and build again if sources changed",
            )
    return reports


def seal() -> None:
    """Start-up is over: from here on each compile, tuning, module load or C compiler run counts as a miss."""
    LEDGER.seal()


def stats() -> dict[str, Any]:
    """The ledger, and what each bundle has installed; JSON-able."""
    return {**LEDGER.to_json(), "bundles": [kernels.report.to_json() for kernels in _sets]}


def loaded() -> list[KernelSet]:
    """The bundles in this process."""
    return list(_sets)


def _add(path: Path, digest: str | None) -> KernelSet:
    bundle = _find(path, digest)
    _check_form(bundle)
    kernels = KernelSet(bundle, LEDGER)
    _check(kernels.bundle, look_at_gpu=False)
    with _lock:
        _sets.append(kernels)
    return kernels


def _check_form(bundle: Bundle) -> None:
    """Raises Incompatible for a bundle of another kind, or of another version's form."""
    kind = bundle.manifest.get("kind")
    do = "build it with this version of aot-cache"
    if kind != "kernels":
        raise Incompatible(f"a bundle of kernels at {bundle.path}", f"one of {kind!r}", do)
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
    if release not in TRITON_SEEN and release and os.environ.get(UNTESTED) != "1":
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
    if _folders or any(kernels.report.primed < kernels.report.units for kernels in _sets):
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
