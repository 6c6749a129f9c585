"""What is done where a call misses: the contract that the whole package stands on.

| state | action |
|---|---|
| miss, capture active | eager fallback: nothing is compiled, tuned or loaded; counted and explained |
| miss, no capture | compile normally, or as the policy says |
| hit | run it; nothing of this is on that path |

Every method here is called by a hook on one of upstream's miss paths. A Triton kernel has no eager form of its own: it runs
its twin if it has one (`policy.fallback`), else it compiles after all, in a way that does not break the capture, and is
counted as unsafe. On ROCm, where that would be recorded wrongly without a sign, it raises.
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
_HINT = "declare it (aot-cache build --misses FILE), or set another policy"


class Guard:
    """Decides, counts and explains.

    Args:
        ledger, misses: where it is written down.
        late: (kernel, its name, device) → install what still waits in a bundle for it; true when anything may have been.
        reasons: why no graph of a bundle is for this frame, and what the next build needs to know of it.
        warn: say something once.
    """

    def __init__(
        self,
        ledger: Ledger,
        misses: Misses,
        late: Callable[[object, str, int], bool],
        reasons: Callable[[Frame], tuple[str, Facts]],
        warn: Callable[[str], None],
    ) -> None:
        self._ledger, self._misses = ledger, misses
        self._late, self._reasons, self._warn = late, reasons, warn
        self._later: list[Callable[[], None]] = []
        self._here = threading.local()
        self._warned: set[str] = set()
        self._logged: set[str] = set()
        self._lock = threading.Lock()

    def count(self, kind: str, name: str) -> None:
        """An event of upstream's: write down that it was, and whether inside a capture."""
        self._ledger.note(kind, name, torch_capture.capturing())

    # --- Dynamo -------------------------------------------------------------------------------------------------------

    def frame(self, frame: Frame, go_on: Compile) -> Any:
        """Dynamo is about to trace a frame."""
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
        """Triton is about to compile a kernel; returns the kernel to launch."""
        with self.installing():
            if self._late(launch.function, launch.name, launch.device):
                kernel = launch.installed()
                if kernel is not None:
                    self.count("late_install", launch.name)
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
        self._here.observed = action == "observed"  # its load, which comes next, is the same miss
        return go_on()

    def _compile_unsafely(self, launch: Launch, go_on: GoOn) -> object:
        """Compile and load inside a capture: refusing would stop servers that run today."""
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
        """A Triton autotuner is about to measure; returns the number of the config to take, or None to let it."""
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
            return 0  # its twin is about to run, and to be counted, whatever the config
        why = f"no config is chosen for {tuning.key}"
        self._note("tuning", tuning.name, in_capture, action, why, tuning.to_json)
        if action == "refused":
            raise CacheMiss(f"the autotuner of {tuning.name} would measure{_when(in_capture)}: {why}", hint=_HINT)
        return (there or 0) if action == "first config" else None

    @contextlib.contextmanager
    def loading(self, name: str) -> Iterator[None]:
        """A kernel that is compiled already is about to be loaded onto the device."""
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
        """Whether a kernel of Inductor's, which is about to measure its configs, must take the first one."""
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
        """What to undo when the capture is over."""
        with self._lock:
            self._later.append(forget)

    def capture_is_over(self) -> None:
        """What was done for a capture only is forgotten: a call after it compiles and tunes as ever."""
        with self._lock:
            later, self._later = self._later, []
        for forget in later:
            forget()

    @contextlib.contextmanager
    def installing(self) -> Iterator[None]:
        """What a bundle has is loaded inside: no miss, and in a capture it does not break it."""
        from aot_cache.upstream.hooks import capture_mode

        with self._decided(), capture_mode.relaxed() if torch_capture.capturing() else contextlib.nullcontext():
            yield

    @contextlib.contextmanager
    def _decided(self) -> Iterator[None]:
        """Loads inside are part of what was already decided."""
        before = getattr(self._here, "decided", False)
        self._here.decided = True
        try:
            yield
        finally:
            self._here.decided = before

    def forget_warnings(self) -> None:
        """Say everything once more (tests)."""
        self._warned.clear()
        self._logged.clear()

    # --- words --------------------------------------------------------------------------------------------------------

    def _state(self, place: policy.SourceSpan) -> tuple[bool, str]:
        return torch_capture.capturing(), policy.of(place)

    def _action(self, own: str, in_capture: bool, fallback: str) -> str:
        """What to do, where `fallback` is what the default policy has for a capture."""
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
    """What was found out, or something else: a call goes on, whatever keeps us from explaining it."""
    try:
        return found_out()
    except Exception:
        return otherwise
