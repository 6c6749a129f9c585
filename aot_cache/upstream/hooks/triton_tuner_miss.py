"""Hook the point where a Triton autotuner is about to measure: let it use a given config instead, and forget it afterwards.

Upstream's steps are kept (prune, measure, remember, launch), but nothing is measured, read from disk or written to it, and the
hook that resets tensors after a measurement does not run: it would be a launch that eager execution does not have.

Upstream: `triton/runtime/autotuner.py` (`Autotuner.run`, `prune_configs`, `_bench`, `check_disk_cache`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from aot_cache.upstream import patch
from aot_cache.upstream.codec import triton_jit, triton_kernel
from aot_cache.upstream.hooks import triton_launches

Json = Any
_decided = threading.local()
"""The tuner that pruned last on this thread, if a config was chosen for it; else None."""


@dataclass(frozen=True)
class Tuning:
    """A launch for which an autotuner has no choice yet.

    Args:
        tuner: the autotuner.
        configs: the configs it would measure.
    """

    tuner: Autotuner
    configs: list[Any]
    _kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return triton_jit.name_of(self.function)

    @property
    def key(self) -> tuple[Any, ...]:
        """The key under which the tuner caches its choice."""
        return triton_jit.tuning_key(self.tuner, tuple(self.tuner.nargs.values()), self._kwargs)

    @property
    def device(self) -> int:
        return triton_kernel.current_device()

    @property
    def function(self) -> JITFunction:
        function = triton_jit.unwrap(self.tuner)
        assert function is not None
        return function

    def to_json(self) -> dict[str, Json]:
        """The missing choice and the launch of each config, in the form that plans use: `tuning` and `units`.

        Raises:
            TraceError: a constexpr has no JSON form.
        """
        log = triton_launches.LaunchLog()
        number = log.tuning(self.tuner, self.key, self.configs)
        for place in range(len(self.configs)):
            launch = self._launch(place)
            if launch is not None:
                with log.through(number, place):
                    log.launch(self.function, *launch)
        source = triton_jit.closure_digest(triton_jit.closure(self.function))
        units = [
            {"source": source, **unit, "kernel": self.name, "via": sorted(via)} for unit, via in zip(log.units, log.via)
        ]
        return {"tuning": {**log.tunings[number], "kernel": self.name}, "units": units}

    def chosen(self) -> int | None:
        """The number of the config that the tuner has cached by now, or None."""
        choice = self.tuner.cache.get(self.key)
        return None if choice is None else next((n for n, c in enumerate(self.configs) if c is choice), None)

    def from_bundle(self) -> int | None:
        """The number of the config that a bundle chose, for a tuner that creates its configs only when called; else None."""
        return triton_kernel.waiting_choice(self.tuner, self.key, self.configs)

    def first_installed(self) -> int | None:
        """The number of the first config whose kernel is installed, or None."""
        for number in range(len(self.configs)):
            launch = self._launch(number)
            if launch is not None:
                args, kwargs = launch
                key, _, _ = triton_jit.bind(self.function, args, triton_jit.launch_defaults(self.function, kwargs))
                if triton_kernel.has(self.function, self.device, key):
                    return number
        return None

    def _launch(self, number: int) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """The kernel's arguments under a config; None if there is an unknown wrapper between tuner and kernel."""
        args = tuple(self.tuner.nargs.values())
        kwargs = {**self._kwargs, **triton_jit.config_kwargs(self.configs[number])}
        layer: Any = self.tuner.fn
        while isinstance(layer, Heuristics):
            for name, value in layer.values.items():
                kwargs[name] = value({**dict(zip(layer.arg_names, args)), **kwargs})
            layer = layer.fn
        if not isinstance(layer, JITFunction):
            return None
        return args, {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}


Forget = Callable[[], None]
Choose = Callable[[Tuning], "int | None"]


def intercept_tuning(choose: Choose, later: Callable[[Forget], None]) -> Callable[[], None]:
    """Call `choose(tuning)` for the number of a config where an autotuner would measure. If it returns None, the tuner measures.

    `later` gets a function that makes the tuner forget the choice, to be called when the capture is over. Returns a function
    that takes the hooks out.
    """

    def prune_configs(prune: Any, self: Autotuner, kwargs: dict[str, Any]) -> list[Any]:
        configs = list(prune(self, kwargs))
        _decided.tuner = None
        if kwargs.get("warmup"):
            return configs
        tuning = Tuning(self, configs, dict(kwargs))
        number = choose(tuning)
        if number is None:
            return configs
        _decided.tuner = self
        if tuning.key not in self.cache and number != tuning.from_bundle():  # a bundle's choice stays
            later(partial(self.cache.pop, tuning.key, None))
        return [configs[number]]  # Triton 3.9 and later uses a single config without measuring

    def check_disk_cache(
        check: Any, self: Autotuner, tuning_key: Any, configs: Any, measure: Callable[[], None]
    ) -> bool:
        if getattr(_decided, "tuner", None) is not self:
            return bool(check(self, tuning_key, configs, measure))
        measure()
        return False

    def _bench(bench: Any, self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        if getattr(_decided, "tuner", None) is not self:
            return bench(self, *args, **kwargs)
        _skip_one_reset(self)
        return [0.0, 0.0, 0.0]

    return patch.replace_all(
        Autotuner, {"prune_configs": prune_configs, "_bench": _bench, "check_disk_cache": check_disk_cache}
    )


def _skip_one_reset(tuner: Any) -> None:
    """Skip the next reset of tensors: `Autotuner.run` now caches the choice and then calls `pre_hook`."""
    reset = tuner.pre_hook

    def instead(*_: Any, **__: Any) -> None:
        tuner.pre_hook = reset

    tuner.pre_hook = instead
