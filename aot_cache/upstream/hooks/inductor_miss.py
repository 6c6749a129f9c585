"""Hook the points where a graph's call makes Inductor benchmark or load a kernel, so that a capture can avoid it.

Upstream: `torch/_inductor/runtime/triton_heuristics.py` (`CachingAutotuner.run` and what it calls while it has not exactly
one launcher), `torch/_inductor/runtime/static_triton_launcher.py`.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

from aot_cache.upstream import after_import, patch
from aot_cache.upstream.hooks import inductor_events

Forget = Callable[[], None]
Around = Callable[[str], "contextlib.AbstractContextManager[None]"]
_HEURISTICS = "torch._inductor.runtime.triton_heuristics"
_STATIC = "torch._inductor.runtime.static_triton_launcher"


def intercept_tuning(choose: Callable[[str], bool], later: Callable[[Forget], None]) -> Callable[[], None]:
    """Call `choose(kernel)` where a kernel would measure its configs. If true, the kernel uses the first config.

    `later` gets a function that undoes this choice. The hooks are installed once Inductor is imported. Returns a function
    that takes them out.
    """

    def autotune_to_one_config(measure: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        if not choose(inductor_events.name_of(self)):
            return measure(self, *args, **kwargs)
        launchers = self.launchers
        self.launchers = launchers[:1]
        later(lambda: setattr(self, "launchers", launchers))
        return None

    def coordinate_descent_tuning(descend: Any, self: Any, launcher: Any, *args: Any, **kwargs: Any) -> Any:
        return launcher if choose(inductor_events.name_of(self)) else descend(self, launcher, *args, **kwargs)

    def hook() -> Callable[[], None]:
        tuner: Any = sys.modules[_HEURISTICS].CachingAutotuner
        return patch.replace_all(
            tuner,
            {"autotune_to_one_config": autotune_to_one_config, "coordinate_descent_tuning": coordinate_descent_tuning},
        )

    return after_import.hook_after_import(_HEURISTICS, hook)


def around_loading(around: Around) -> Callable[[], None]:
    """Load each kernel's module inside `around(kernel)`. Returns a function that takes the hook out."""

    def load_kernel(load: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
        with around(inductor_events.name_of(self)):
            return load(self, *args, **kwargs)

    def hook() -> Callable[[], None]:
        return patch.replace(sys.modules[_STATIC].StaticallyLaunchedTritonKernel, "load_kernel", load_kernel)

    return after_import.hook_after_import(_STATIC, hook)
