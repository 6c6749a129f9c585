"""The bundles that one process has loaded, and its guard: the state behind `load`, `ready` and the other functions of `loader`.

Never break serving: a corrupt, missing or incompatible bundle is one warning and a count, unless it was loaded with `strict`.
Loading does not initialise CUDA. Kernels are installed on a device when the process uses it: at `load` or `ready` if CUDA is
initialised, else before the first capture, or at the first launch that would compile, whichever comes first.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from aot_cache.errors import AotCacheError, Incompatible, NotReady
from aot_cache.runtime import bundle_lookup, gc_pause, host_check, late_compile, policy
from aot_cache.runtime.guard import Guard
from aot_cache.runtime.hooks import Hooks, Undo
from aot_cache.runtime.kernels import KernelSet, Report
from aot_cache.runtime.ledger import Ledger
from aot_cache.runtime.miss_log import Misses
from aot_cache.store import Bundle, JsonValue
from aot_cache.upstream import after_import, patch
from aot_cache.upstream.hooks import torch_capture, vllm_compilers

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from aot_cache.runtime.graph_lookup import Answers
    from aot_cache.runtime.graphs import GraphSet  # imports Dynamo
    from aot_cache.upstream.hooks.dynamo_frames import Frame
    from aot_cache.upstream.hooks.triton_miss import Launch

_LOG = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class _Folder:
    """A folder from which the bundle for this GPU is chosen once the GPU is known."""

    path: Path
    digest: str | None
    strict: bool
    pinned: bool
    """Whether the caller gave the digest: the ranks of a job also agree on one that nobody has pinned."""


class Session:
    """Bundles, counters and hooks of one process. Its methods may be called from any thread.

    Args:
        warn: called with one line for people if a bundle cannot be used, or a guarantee cannot be kept.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.ledger = Ledger()
        self.hooks = Hooks()
        self.misses = Misses(warn)
        self.guard = Guard(self.ledger, self.misses, self._late, self._learn, self._reasons, warn)
        self._warn = warn
        self._lock = threading.RLock()
        self._kernels: list[KernelSet] = []
        self._waiting_graphs: list[KernelSet] = []
        """Bundles whose graphs wait for Dynamo to be imported."""
        self._answers: Answers | None = None
        """None until Dynamo is imported."""
        self._folders: list[_Folder] = []
        self._values: dict[str, JsonValue] = {}
        """Constants of kernels that are known only since this process runs."""
        self._doubts: set[str] = set()
        """Doubts for which a warning was shown."""
        self.primes_libraries = True
        """Whether cuBLAS and cuDNN are made ready before a capture. An engine that runs each size before it captures it does that
        itself."""

    # --- bundles ------------------------------------------------------------------------------------------------------

    def load(
        self, path: Path, digest: str | None, strict: bool, together: Sequence[ProcessGroup | None]
    ) -> Report | None:
        """See `loader.load`. `together` contains the group whose ranks load the same bundle, or is empty."""
        try:
            pinned = digest is not None
            for group in together:
                digest = bundle_lookup.agreed(path, digest, group)
            if path.is_dir() and not torch_capture.cuda_is_up():
                with self._lock:
                    self._folders.append(_Folder(path, digest, strict, pinned))
                return None
            kernels = self._add(path, digest, strict, pinned)
            if torch_capture.cuda_is_up():
                self.prime()
            return kernels.report
        except Exception as error:
            self.refuse(error, strict)
            return None

    def prime(self) -> int:
        """See `loader.prime`."""
        with self._lock, gc_pause.paused():
            self._choose_from_folders()
            return (self._prime_kernels() if torch_capture.cuda_is_up() else 0) + self._prime_graphs()

    def _prime_kernels(self) -> int:
        if not self._kernels:
            return 0
        from aot_cache.upstream.codec import triton_kernel

        self.arm()
        self.hooks.once("triton", self.triton_hooks)  # for a Triton that was being imported when the waiting began
        device = triton_kernel.current_device()
        loaded = 0
        for kernels in list(self._kernels):
            try:
                if kernels.waiting(device):
                    bundle_lookup.check(kernels.bundle, look_at_gpu=True)
                    kernels.install(device)
                loaded += kernels.prime(device)
            except Exception as error:
                self._kernels.remove(kernels)
                self.refuse(error, kernels.strict)
        return loaded

    def _prime_graphs(self) -> int:
        """Load compiled graphs; those for a GPU only once CUDA is initialised."""
        loaded = 0
        for graphs in self.graphs():
            if graphs.manifest.on_cpu or torch_capture.cuda_is_up():
                try:
                    with self.guard.installing():
                        loaded += graphs.prime()
                except Exception as error:
                    self._drop_graphs(graphs)
                    self.refuse(error, graphs.strict)
        return loaded

    def ready(self, strict: bool, constants: Mapping[str, JsonValue]) -> list[Report]:
        """See `loader.ready`."""
        self._values |= constants
        with self._libraries_meanwhile():
            self.prime()
            if torch_capture.cuda_is_up():  # before that, nothing is pending
                came = [kernels.import_pending() for kernels in self.kernels()]
                if any(came):
                    self.prime()
                self._compile_at_start()
        if torch_capture.cuda_is_up():
            self._prime_libraries()
        reports = [kernels.report for kernels in self._kernels]
        primed, units = sum(r.primed for r in reports), sum(r.units for r in reports)
        graphs = sum(found.loaded.primed for found in self.graphs())
        _LOG.info("ready: %d of %d specializations and %d compiled graphs are loaded", primed, units, graphs)
        if strict:
            missing = self._missing(reports)
            if missing or not all(r.devices or not r.units for r in reports):
                raise NotReady(
                    f"not all that is declared is installed: {'; '.join(missing) or 'CUDA is not initialised'}",
                    hint="see aot_cache.stats(), and build again if sources changed",
                )
        return reports

    def _compile_at_start(self) -> int:
        """Compile what waits for constants that are known by now. Not inside a capture."""
        if not self._values or not any(kernels.manifest.at_start for kernels in self._kernels):
            return 0
        from aot_cache.upstream.codec import triton_kernel

        with self._lock:
            device = triton_kernel.current_device()
            work = [one for kernels in self._kernels for one in kernels.start_work(device, self._values)]
            return late_compile.compile_all(work, device, self.guard.compiling_late, self._warn) if work else 0

    def _learn(self, launch: Launch) -> bool:
        """Take constants from a launch that is about to compile. Inside a capture, the others are compiled after it."""
        if not any(kernels.manifest.at_start for kernels in self._kernels):
            return False
        found: dict[str, JsonValue] = {}
        for kernels in self._kernels:
            found |= kernels.learn(launch.name, launch.unit)
        if not found:
            return False
        self._values |= found
        if torch_capture.capturing():

            def afterwards() -> None:
                self._compile_at_start()

            self.guard.later(afterwards)
            return False
        return self._compile_at_start() > 0

    def _missing(self, reports: Sequence[Report]) -> list[str]:
        """Declared kernels, choices and graphs that are not installed, each with the reason."""
        missing = [f"{name} ({_why_pending(r, name)})" for r in reports for name in r.pending]
        missing += [f"{name} ({why})" for r in reports for name, why in r.stale.items()]
        missing += [f"{name} ({why})" for r in reports for name, why in r.unchosen.items()]
        if self._waiting_graphs:
            missing.append("graphs (torch._dynamo is not imported: nothing is compiled yet)")
        else:
            graphs = self.graphs()
            missing += [f"{g.loaded.graphs} graphs (CUDA is not initialised)" for g in graphs if g.waiting()]
            missing += [f"{name} ({why})" for g in graphs for name, why in g.changed().items()]
        return missing if reports else [*missing, "no bundle is loaded"]

    def kernels(self) -> list[KernelSet]:
        """The bundles in this process."""
        return list(self._kernels)

    def graphs(self) -> list[GraphSet]:
        """The graphs of the bundles in this process; empty until Dynamo is imported."""
        return list(self._answers.sets) if self._answers is not None else []

    def missed_before(self, function: str, case: str, point: Mapping[str, int]) -> str:
        """Why a call of a compiled function has missed in this process at a declared point; empty if it has not."""
        return self._answers.missed.get((function, case, *point.items()), "") if self._answers is not None else ""

    def stats(self) -> dict[str, Any]:
        """See `loader.stats`."""
        misses = self.misses.to_json()
        return {
            **self.ledger.to_json(),
            "policy": policy.default(),
            "bundles": [kernels.report.to_json() for kernels in self._kernels],
            "graphs": [vars(graphs.loaded) for graphs in self.graphs()],
            "misses": misses,
            "patches": patch.installed(),
            "unsafe": sorted({miss["name"] for miss in misses if miss["action"] == "unsafe"}),
        }

    def explain(self, call: Callable[[], object]) -> list[dict[str, Any]]:
        """See `loader.explain`.

        Raises:
            Incompatible: the hooks do not work with this release of Dynamo.
        """
        self._hook_dynamo()
        if self._answers is None:
            raise Incompatible("the misses of this Dynamo cannot be explained", hint="see the warning about its hooks")
        return self._answers.explain(call)

    def _add(self, path: Path, digest: str | None, strict: bool, pinned: bool) -> KernelSet:
        bundle = bundle_lookup.find(path, digest, pinned)
        bundle_lookup.check_form(bundle)
        bundle_lookup.check(bundle, look_at_gpu=False)
        self._heed(bundle_lookup.doubt(bundle), strict, Incompatible)
        self._heed(bundle_lookup.incomplete(bundle), strict, NotReady)
        if strict:
            bundle_lookup.check_gpu(bundle)
        with self._lock:
            if (known := self._same(bundle, strict)) is not None:
                return known
            kernels = KernelSet(bundle, self.ledger, strict)
            self._kernels.append(kernels)
            if kernels.manifest.graphs:
                if self._answers is not None:  # Dynamo is already imported
                    self._add_graphs(kernels, self._answers)
                else:
                    self._waiting_graphs.append(kernels)
        counts = kernels.report.units, len(kernels.manifest.graphs)
        _LOG.info("loaded %s (digest %s): %d specializations, %d graphs", bundle.path, bundle.digest[:16], *counts)
        return kernels

    def _same(self, bundle: Bundle, strict: bool) -> KernelSet | None:
        """What this process has of the same bundle: a plug-in and the server's own code may both load it."""
        known = next((one for one in self._kernels if one.bundle.digest == bundle.digest), None)
        if known is not None and strict:
            known.strict = True
            for graphs in self.graphs():
                graphs.strict = graphs.strict or graphs.bundle is known.bundle
        return known

    def _heed(self, doubt: str, strict: bool, error: type[AotCacheError]) -> None:
        """Warn once about a bundle of which something is to be said; with `strict` raise instead."""
        if doubt and strict:
            raise error(doubt)
        if doubt and doubt not in self._doubts:
            self._doubts.add(doubt)
            self._warn(f"aot-cache: {doubt}")

    def _choose_from_folders(self) -> None:
        while self._folders:
            folder = self._folders.pop()
            try:
                self._add(folder.path, folder.digest, folder.strict, folder.pinned)
            except Exception as error:
                self.refuse(error, folder.strict)

    def refuse(self, error: Exception, strict: bool) -> None:
        """Continue without a bundle, with one warning and a count; with `strict` raise. Even a bug must not stop serving."""
        self.ledger.note("rejected_bundle", str(error), torch_capture.capturing())
        if strict:
            raise error
        self._warn(f"aot-cache serves without a bundle: {error}")

    def _add_graphs(self, kernels: KernelSet, answers: Answers) -> None:
        """Make the graphs of a bundle available to Dynamo's misses.

        Raises:
            Incompatible: the graphs are not for this host.
        """
        from aot_cache.runtime.graphs import GraphSet

        bundle = kernels.bundle
        bundle_lookup.check_torch(bundle)
        parts = host_check.differing(host_check.graph_parts(kernels.manifest))
        if parts:
            what = f"the graphs of {bundle.path} are not for this host: {host_check.say(parts)}"
            raise Incompatible(what, hint="build them for this host (aot-cache build)")
        answers.sets.append(GraphSet(bundle, self.ledger, kernels.strict))

    def _drop_graphs(self, graphs: GraphSet) -> None:
        if self._answers is not None:
            self._answers.drop(graphs)

    def unload(self, which: Path | str | None) -> int:
        """See `loader.unload`."""
        with self._lock:
            gone = [kernels for kernels in self._kernels if which is None or _is(kernels.bundle, which)]
            self._folders = [one for one in self._folders if which is not None and not _same_path(one.path, which)]
            for kernels in gone:
                self._kernels.remove(kernels)
                if kernels in self._waiting_graphs:
                    self._waiting_graphs.remove(kernels)
                for graphs in self.graphs():
                    if graphs.bundle is kernels.bundle:
                        self._drop_graphs(graphs)
                        graphs.unload()
                kernels.unload()
            if gone and self._kernels and torch_capture.cuda_is_up():  # another bundle may have had the same units
                for kernels in self._kernels:
                    kernels.install_again()
                self.prime()
        for kernels in gone:
            _LOG.info("unloaded %s (digest %s)", kernels.bundle.path, kernels.bundle.digest[:16])
        return len(gone)

    # --- the guard ----------------------------------------------------------------------------------------------------

    def arm(self) -> None:
        """Hook torch, Triton and Dynamo now if they are imported, else once they are. Imports nothing."""
        self.hooks.once("waiting", self._wait)

    def disarm(self) -> None:
        """See `loader.disarm`."""
        self.hooks.take_out()
        self.guard.capture_is_over()

    def _wait(self) -> Iterator[Undo]:
        yield after_import.when_torch_comes(self._hook_captures)
        yield after_import.when_triton_comes(self._hook_triton)
        yield after_import.when_dynamo_comes(self._hook_dynamo)
        yield vllm_compilers.listen(self.guard.count)

    def _hook_captures(self) -> None:
        def hook() -> list[Undo]:
            return [torch_capture.watch_captures(self._before_capture, self.guard.capture_is_over)]

        self.hooks.once("captures", hook)

    def _hook_triton(self) -> None:
        """Runs inside an `import triton`, which must not fail because of aot-cache."""
        try:
            self.hooks.once("triton", self.triton_hooks)
        except Exception as error:
            strict = any(kernels.strict for kernels in self._kernels)
            self._kernels.clear()
            self._folders.clear()
            self.refuse(error, strict)

    def triton_hooks(self) -> Iterator[Undo]:
        """Hook Triton's miss paths and its C modules. Nothing here is on the hit path."""
        from aot_cache.upstream.hooks import triton_events, triton_launcher, triton_miss, triton_tuner_miss

        yield triton_events.listen(self.guard.count)
        yield triton_launcher.serve(self._native)
        yield triton_miss.intercept_compile(self.guard.launch)
        yield triton_miss.around_loading(self.guard.loading)
        # Outermost, around the counting hook: a tuning that is not measured is not counted.
        yield triton_tuner_miss.intercept_tuning(self.guard.tuning, self.guard.later)

    def _hook_dynamo(self) -> None:
        """Runs inside an import of Dynamo, which must not fail because of aot-cache."""
        try:
            from aot_cache.runtime.graph_lookup import Answers

            with self._lock:
                if self._answers is None:
                    self._answers = Answers(self.guard, self.refuse)
                answers = self._answers
            self.hooks.once("dynamo", answers.hook)
        except Exception as error:
            strict = any(kernels.strict for kernels in self._waiting_graphs)
            self._waiting_graphs.clear()
            self.refuse(error, strict)
            return
        with self._lock:
            while self._waiting_graphs:
                kernels = self._waiting_graphs.pop(0)
                try:
                    self._add_graphs(kernels, answers)
                except Exception as error:
                    self.refuse(error, kernels.strict)

    def _native(self, source_key: str) -> bytes | None:
        from aot_cache.runtime import c_modules

        return c_modules.find(((kernels.manifest, kernels.bundle) for kernels in self._kernels), source_key)

    def _before_capture(self) -> None:
        """Load everything that still waits, and create the libraries' handles, unless another capture is active."""
        if torch_capture.capturing():
            return
        waiting = self._folders or any(graphs.waiting() for graphs in self.graphs())
        if waiting or any(kernels.report.primed < kernels.report.units for kernels in self._kernels):
            with self._libraries_meanwhile():
                self.prime()
        self._prime_libraries()

    def _libraries_meanwhile(self) -> contextlib.AbstractContextManager[None]:
        """Where they will be primed, load CUDA's libraries while the block runs."""
        if not self._may_prime_libraries() or not torch_capture.cuda_is_up() or torch_capture.capturing():
            return contextlib.nullcontext()
        from aot_cache.upstream.hooks import cuda_libraries

        return cuda_libraries.meanwhile()

    def _may_prime_libraries(self) -> bool:
        return policy.default() != "observe" and self.primes_libraries

    def _prime_libraries(self) -> None:
        """Create the handles of cuBLAS and cuDNN. Their first use inside a capture would break it, even in an eager fallback."""
        if not self._may_prime_libraries():
            return
        from aot_cache.upstream.hooks import cuda_libraries

        try:
            cuda_libraries.prime()
        except Exception as error:  # out of memory, missing library: the model reports it better
            self._warn(f"aot-cache could not initialise CUDA's libraries before a capture: {error}")

    def _late(self, function: object, name: str, device: int) -> bool:
        """Called when a launch is about to compile or tune: install what waits for this device. True if anything waited."""
        try:
            with self._lock:
                adopted = [k for k in self._kernels if k.adopt(function, name, device)]
                if not adopted and not self._folders and not any(k.waiting(device) for k in self._kernels):
                    return False
            self.prime()
        except Exception as error:  # the launch continues as it would without aot-cache
            self.refuse(error, any(kernels.strict for kernels in self._kernels))
            return False
        return True

    def _reasons(self, frame: Frame) -> tuple[str, Callable[[], Mapping[str, Any]]]:
        assert self._answers is not None  # only called by hooks in Dynamo
        return self._answers.reasons(frame)


def _is(bundle: Bundle, which: Path | str) -> bool:
    """Whether a path or digest names a bundle."""
    return bundle.digest == which or _same_path(bundle.path, which)


def _same_path(path: Path, which: Path | str) -> bool:
    return path.resolve() == Path(which).resolve()


def _why_pending(report: Report, name: str) -> str:
    why = report.not_imported.get(name.partition(":")[0])
    return f"its module cannot be imported: {why}" if why else "its module is not imported"
