"""What happens when a call misses. The rest of the package relies on this contract:

| state | action |
|---|---|
| miss, capture active | eager fallback: nothing is compiled, tuned or loaded; counted and explained |
| miss, no capture | compile normally, or as the policy says |
| hit | run it; none of this code is on that path |

Every method here is called by a hook on one of upstream's miss paths. A Triton kernel has no eager form of its own. It runs
its twin if it has one (`policy.fallback`); otherwise it is compiled, in a way that does not break the capture, and counted as
unsafe. On ROCm it raises instead, because the capture would be silently wrong.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from aot_cache.errors import CacheMiss
from aot_cache.runtime import policy
from aot_cache.runtime.ledger import Ledger
from aot_cache.runtime.miss_log import Miss, Misses
from aot_cache.store import Json
from aot_cache.upstream.hooks import torch_capture

if TYPE_CHECKING:
    from aot_cache.upstream.hooks.dynamo_frames import Compile, Frame
    from aot_cache.upstream.hooks.triton_miss import GoOn, Launch
    from aot_cache.upstream.hooks.triton_tuner_miss import Tuning

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
Facts = Callable[[], "Mapping[str, Json] | None"]
_COUNTED = {
    "eager": "fallback",
    "twin": "fallback",
    "first config": "fallback",
    "unsafe": "unsafe",
    "refused": "refused",
}
_LATE = {"compile": "late_compile", "disk_hit": "late_compile", "module_load": "primed"}
"""Event → what it is counted as while constants that were not known before are compiled."""
_HINT = "declare it (aot-cache build --misses FILE), or set another policy"


class Guard:
    """Decides what to do with a miss, counts it and explains it.

    Args:
        ledger, misses: receive counts and misses.
        late: called with (kernel, its name, device): installs what a bundle still has for it; true if it may have done so.
        learn: called with a launch that would compile: takes from it what was not known before; true if its kernel is there now.
        reasons: returns why no graph fits a frame, and a function that returns the facts the next build needs.
        warn: shows one line to people.
    """

    def __init__(
        self,
        ledger: Ledger,
        misses: Misses,
        late: Callable[[object, str, int], bool],
        learn: Callable[[Launch], bool],
        reasons: Callable[[Frame], tuple[str, Facts]],
        warn: Callable[[str], None],
    ) -> None:
        self._ledger, self._misses = ledger, misses
        self._late, self._learn, self._reasons, self._warn = late, learn, reasons, warn
        self._later: list[Callable[[], None]] = []
        self._here = threading.local()
        self._warned: set[str] = set()
        self._logged: set[str] = set()
        self._lock = threading.Lock()

    def count(self, kind: str, name: str) -> None:
        """Count an event of torch or Triton, and whether it was inside a capture."""
        if getattr(self._here, "late", False):
            kind = _LATE.get(kind, kind)
        self._ledger.note(kind, name, torch_capture.capturing())

    # --- Dynamo -------------------------------------------------------------------------------------------------------

    def frame(self, frame: Frame, go_on: Compile) -> Any:
        """Called when Dynamo is about to trace a frame. Returns what Dynamo expects from its compile step."""
        from aot_cache.upstream.hooks import dynamo_frames

        in_capture, own = self._state(policy.span_of(frame.code))
        unknown: tuple[str, Facts] = ("the reason is unknown", lambda: None)
        why, facts = _or(unknown, lambda: self._reasons(frame))
        action = self._action(own, in_capture, "eager")
        self._note("graph", frame.function, in_capture, action, why, facts)
        if action == "refused":
            return dynamo_frames.refuse(
                CacheMiss(f"no graph for {frame.function}{_when(in_capture)}: {why}", hint=_HINT)
            )
        if action == "eager":
            return dynamo_frames.run_without_compiling()
        with self._decided():
            return go_on(None)

    # --- Triton -------------------------------------------------------------------------------------------------------

    def launch(self, launch: Launch, go_on: GoOn) -> object:
        """Called when Triton is about to compile a kernel. Returns the kernel to launch."""
        with self.installing():
            if self._late(launch.function, launch.name, launch.device):
                kernel = launch.installed()
                if kernel is not None:
                    self.count("late_install", launch.name)
                    return kernel
        if _or(False, lambda: self._learn(launch)):
            kernel = launch.installed()
            if kernel is not None:
                return kernel
        place = policy.span_of(launch.function)
        in_capture, own = self._state(place)
        twin = policy.eager_impl_of(place) if in_capture and not launch.warmup else None
        action = self._action(own, in_capture, "unsafe" if twin is None else "twin")
        nearest = _or(None, launch.nearest)
        differences = nearest.differences if nearest is not None else []
        why = "; ".join(differences) or "no specialization of it is installed"
        facts: Facts = lambda: {"unit": launch.unit(), "nearest": differences}  # noqa: E731
        self._note("kernel", launch.name, in_capture, action, why, facts)
        if action == "refused":
            what = f"no specialization of {launch.name} for ({launch.text}){_when(in_capture)}"
            why = f"the nearest is for ({nearest.text}): {why}" if nearest is not None else why
            raise CacheMiss(f"{what}: {why}", hint=_HINT)
        if action == "twin" and twin is not None:
            from aot_cache.upstream.hooks import triton_miss

            return triton_miss.EagerLauncher(launch.function, twin)
        if action == "unsafe":
            return self._compile_unsafely(launch, go_on)
        self._here.observed = action == "observed"  # the load that follows belongs to the same miss
        return go_on()

    def _compile_unsafely(self, launch: Launch, go_on: GoOn) -> object:
        """Compile and load inside a capture, because refusing would stop servers that work today."""
        from aot_cache.upstream.hooks import capture_mode, triton_miss

        self._warn_once(
            f"the Triton kernel {launch.name} was compiled inside a CUDA graph capture; hint: declare it, "
            "or give it an eager fallback (aot_cache.fallback)"
        )
        with self._decided(), capture_mode.relaxed():
            kernel = go_on()
            if not launch.warmup:
                triton_miss.load_now(kernel)
        return kernel

    def tuning(self, tuning: Tuning) -> int | None:
        """Called when a Triton autotuner is about to measure. Returns the number of the config to use, or None to measure."""
        place = policy.span_of(tuning.tuner)
        in_capture, own = self._state(place)
        with self.installing():
            late = self._late(tuning.function, tuning.name, tuning.device)
            chosen = tuning.chosen() if late else None
            if chosen is None:
                chosen = tuning.from_bundle()
        if chosen is not None:
            return chosen
        there: int | None = _or(None, tuning.first_installed) if in_capture else None
        action = self._action(own, in_capture, "first config")
        if action == "first config" and there is None and policy.eager_impl_of(place):
            return 0  # the twin runs next, and is counted then, whatever the config
        why = f"no config is chosen for {tuning.key}"
        self._note("tuning", tuning.name, in_capture, action, why, tuning.to_json)
        if action == "refused":
            raise CacheMiss(f"the autotuner of {tuning.name} would measure{_when(in_capture)}: {why}", hint=_HINT)
        return (there or 0) if action == "first config" else None

    @contextlib.contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """Wraps the load of an already compiled kernel onto the device."""
        if getattr(self._here, "decided", False):
            yield
            return
        in_capture, own = torch_capture.capturing(), policy.default()
        action = self._action(own, in_capture, "unsafe")
        if action == "compiled" or self._here.__dict__.pop("observed", False):
            yield
            return
        self._note("load", name, in_capture, action, "it is compiled, but not loaded yet", dict)
        if action == "refused":
            raise CacheMiss(f"kernel {name} is compiled, but not loaded{_when(in_capture)}", hint=_HINT)
        if action == "observed":
            yield
            return
        from aot_cache.upstream.hooks import capture_mode

        self._warn_once(f"the kernel {name} was loaded inside a CUDA graph capture; hint: launch or declare it before")
        with capture_mode.relaxed():
            yield

    # --- Inductor -----------------------------------------------------------------------------------------------------

    def first_of_inductor(self, name: str) -> bool:
        """Whether an Inductor kernel that is about to measure its configs must use the first one."""
        in_capture, own = torch_capture.capturing(), policy.default()
        action = self._action(own, in_capture, "first config")
        if action == "compiled":
            return False
        why = "its configs are not measured"
        self._note("tuning", name, in_capture, action, why, dict)
        if action == "refused":
            raise CacheMiss(f"kernel {name} would measure its configs{_when(in_capture)}", hint=_HINT)
        return action == "first config"

    # --- captures -----------------------------------------------------------------------------------------------------

    def later(self, forget: Callable[[], None]) -> None:
        """Register a function to call when the capture is over."""
        with self._lock:
            self._later.append(forget)

    def capture_is_over(self) -> None:
        """Undo what was done only for a capture. Later calls compile and tune as usual."""
        with self._lock:
            later, self._later = self._later, []
        for forget in later:
            forget()

    @contextlib.contextmanager
    def installing(self) -> Iterator[None]:
        """Let loads of a bundle's contents happen inside: they are no misses, and do not break an active capture."""
        from aot_cache.upstream.hooks import capture_mode

        with self._decided(), capture_mode.relaxed() if torch_capture.capturing() else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def compiling_late(self) -> Iterator[None]:
        """Count what compiles inside, on this thread, as late. It is no miss: somebody decided that it is compiled now."""
        before = getattr(self._here, "late", False)
        self._here.late = True
        try:
            with self._decided():
                yield
        finally:
            self._here.late = before

    @contextlib.contextmanager
    def _decided(self) -> Iterator[None]:
        """Treat loads inside as part of a decision that was already made."""
        before = getattr(self._here, "decided", False)
        self._here.decided = True
        try:
            yield
        finally:
            self._here.decided = before

    def forget_warnings(self) -> None:
        """Allow every warning and log line again (tests)."""
        self._warned.clear()
        self._logged.clear()

    # --- words --------------------------------------------------------------------------------------------------------

    def _state(self, place: policy.SourceSpan) -> tuple[bool, str]:
        return torch_capture.capturing(), policy.of(place)

    def _action(self, own: str, in_capture: bool, fallback: str) -> str:
        """What to do with a miss. `fallback` is the action of the default policy inside a capture."""
        if own == "error" and (in_capture or self._ledger.sealed):
            return "refused"
        if not in_capture:
            return "compiled"
        if own == "observe":
            return "observed"
        return "refused" if fallback == "unsafe" and torch_capture.on_rocm() else fallback

    def _note(self, kind: str, name: str, in_capture: bool, action: str, why: str, facts: Facts) -> None:
        if action in _COUNTED:
            self._ledger.note(_COUNTED[action], name, in_capture)
        self._misses.note(Miss(kind, name, in_capture, self._ledger.sealed, action, why), facts)
        if self._ledger.sealed and name not in self._logged:
            self._logged.add(name)
            where = ", inside a CUDA graph capture" if in_capture else ""
            _LOG.warning("%s %s missed after seal()%s (action: %s): %s", kind, name, where, action, why)

    def _warn_once(self, text: str) -> None:
        if text not in self._warned:
            self._warned.add(text)
            self._warn(text)


def _when(in_capture: bool) -> str:
    return ", inside a CUDA graph capture" if in_capture else ", after seal()"


def _or(otherwise: T, found_out: Callable[[], T]) -> T:
    """The result of `found_out`, or `otherwise` if it raises: a miss that cannot be explained must not stop the call."""
    try:
        return found_out()
    except Exception:
        return otherwise
