"""Log every launch of a Triton kernel, instead of running it (virtual device) or in addition (recording).

Upstream: `triton/runtime/jit.py` (`JITFunction.run`), `triton/runtime/autotuner.py` (`Autotuner.run`).
"""

from __future__ import annotations

import contextlib
import importlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

from aot_cache.upstream import patch
from aot_cache.upstream.codec import live_objects, triton_jit, triton_names

Json = Any


class LaunchLog:
    """The launches: units and tunings as JSON, with the marks (points) at which each was seen.

    `units[id] = {"kernel", "specialization", "options", "overrides"}`, `tunings[id] = {"kernel", "tuner", "key",
    "candidates", "choice"}`; `seen_units[id]` and `seen_tunings[id]` are lists of marks in order, `via[id]` the set of
    (tuning id, candidate) through which a unit was launched, with (-1, -1) for a launch without a tuner. `launchers` are the
    types of arguments for which Triton made a launcher.

    Kernels are identified by `triton_jit.identity`, because the kernels of a factory share one name. It is the key of
    `functions`, `closures` and `hidden` (see `triton_names.hidden`; with more than one value the kernels cannot be told apart).
    """

    def __init__(self) -> None:
        self.units: list[dict[str, Json]] = []
        self.tunings: list[dict[str, Json]] = []
        self.seen_units: list[list[Any]] = []
        self.seen_tunings: list[list[Any]] = []
        self.via: list[set[tuple[int, int]]] = []
        self.functions: dict[str, JITFunction] = {}
        self.closures: dict[str, Json] = {}
        self.hidden: dict[str, set[tuple[tuple[str, int], ...]]] = {}
        self.launchers: set[tuple[Any, ...]] = set()
        self._names: dict[int, tuple[weakref.ref[JITFunction], str]] = {}
        self.mark: Any = None
        self._unit_ids: dict[tuple[str, str], int] = {}
        self._tuning_ids: dict[Any, int] = {}
        self._expansions: dict[Any, list[tuple[int, int]]] = {}
        self._ordinals: dict[int, tuple[int, Autotuner]] = {}
        self._chosen: dict[int, tuple[JITFunction, list[dict[str, Any]]]] = {}
        """Kernel → the configs of which host code was told one, as its tuner's choice; the one it was told is first."""
        self.lock = threading.RLock()
        self.changed: Callable[[], None] = lambda: None
        """Called after each launch of a new unit, and when an autotuner has chosen."""
        self._thread = threading.local()

    def launcher(self, signature: tuple[Any, ...]) -> None:
        """Log that Triton makes a launcher for a kernel with these types of arguments."""
        with self.lock:
            if signature not in self.launchers:
                self.launchers.add(signature)
                self.changed()

    def launch(self, function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
        """Log one launch; returns the id of its unit."""
        kwargs = triton_jit.launch_defaults(function, dict(kwargs))
        key, specialization, options = triton_jit.bind(function, args, kwargs)
        name = self._name(function)
        with self.lock:
            unit = self._unit_ids.get((name, key))
            new = unit is None
            if unit is None:
                unit = self._new_unit(name, function, key, specialization, options, kwargs)
            self._see(self.seen_units[unit], self.mark)
            self.via[unit].add(getattr(self._thread, "via", (-1, -1)))
        if new:
            self.changed()
        return unit

    def _new_unit(
        self,
        name: str,
        function: JITFunction,
        key: str,
        specialization: list[Any],
        options: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> int:
        self.units.append(
            {
                "kernel": name,
                "specialization": triton_jit.encode(specialization)["l"],
                "options": {k: triton_jit.encode(v) for k, v in options.items()},
                "overrides": triton_jit.option_overrides(function, kwargs, options),
            }
        )
        self.seen_units.append([])
        self.via.append(set())
        self.functions[name] = function
        unit = len(self.units) - 1
        self._unit_ids[name, key] = unit
        return unit

    def tuning(self, tuner: Autotuner, key: tuple[Any, ...], configs: list[Any]) -> int:
        """Log that `tuner` chooses between `configs` for `key`; returns the id of the tuning."""
        function = triton_jit.unwrap(tuner)
        assert function is not None
        name = self._name(function)
        ordinal = self._ordinal(tuner)
        with self.lock:
            # Pruning may depend on more than the key, so other candidates are another tuning.
            identity = (name, ordinal, repr(key), tuple(str(c) for c in configs))
            found = self._tuning_ids.get(identity)
            if found is None:
                candidates = [triton_jit.encoded_config(config) for config in configs]
                self.tunings.append(
                    {
                        "kernel": name,
                        "tuner": ordinal,
                        "key": [triton_jit.encode(k) for k in key],
                        "candidates": candidates,
                        "choice": None,
                    }
                )
                self.seen_tunings.append([])
                found = len(self.tunings) - 1
                self._tuning_ids[identity] = found
                self.functions[name] = function
            self._see(self.seen_tunings[found], self.mark)
        return found

    def forget(self) -> None:
        """Forget all units and tunings."""
        for kept in (self.units, self.tunings, self.seen_units, self.seen_tunings, self.via):
            kept.clear()
        for known in (self._unit_ids, self._tuning_ids, self._expansions):
            known.clear()

    def _name(self, function: JITFunction) -> str:
        kept = self._names.get(id(function))
        if kept is not None and kept[0]() is function:
            return kept[1]
        closure = triton_jit.closure(function)
        name = triton_jit.identity(function, closure)
        with self.lock:
            self._names[id(function)] = weakref.ref(function), name
            self.closures[name] = closure
            self.hidden.setdefault(name, set()).add(triton_names.hidden(function))
        return name

    def _ordinal(self, tuner: Autotuner) -> int:
        if id(tuner) not in self._ordinals:
            self._ordinals[id(tuner)] = (tuner_ordinal(tuner), tuner)  # keeps it alive, so that its id is not reused
        return self._ordinals[id(tuner)][0]

    @staticmethod
    def _see(marks: list[Any], mark: Any) -> None:
        if not marks or marks[-1] != mark:
            marks.append(mark)

    @contextlib.contextmanager
    def through(self, tuning: int, candidate: int) -> Iterator[None]:
        """Mark the launches inside as those of a candidate of a tuning."""
        before = getattr(self._thread, "via", (-1, -1))
        self._thread.via = (tuning, candidate)
        try:
            yield
        finally:
            self._thread.via = before

    # --- the virtual device -------------------------------------------------------------------------------------------

    def expand(self, tuner: Autotuner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Launch every candidate between which `tuner` would choose at its first call with these arguments."""
        tuner.nargs = dict(zip(tuner.arg_names, args))
        key = triton_jit.tuning_key(tuner, args, kwargs) if len(tuner.configs) > 1 else ()
        if len(tuner.configs) <= 1:
            configs, tuning = list(tuner.configs), -1
        elif key in tuner.cache:  # a choice from the library's own table (fla's config files)
            configs, tuning = [tuner.cache[key]], -1
        else:
            configs = list(tuner.prune_configs(kwargs))
            tuning = self.tuning(tuner, key, configs)
        self._choose(tuner, configs)
        memo = self._memo_key(tuner, args, kwargs, configs, tuning)
        known = self._expansions.get(memo) if memo is not None else None
        if known is not None:
            for unit, _ in known:
                self._see(self.seen_units[unit], self.mark)
            return
        launched: list[tuple[int, int]] = []
        for number, config in enumerate(configs):
            extra = triton_jit.config_kwargs(config)
            if config.pre_hook is not None:
                config.pre_hook({**tuner.nargs, **kwargs, **extra})
            with self.through(tuning, number if tuning >= 0 else -1):
                unit = tuner.fn.run(*args, **kwargs, **extra)
            if isinstance(unit, LaunchedUnit):
                launched.append((unit.unit, number))
        if memo is not None and len(launched) == len(configs):
            self._expansions[memo] = launched

    def _choose(self, tuner: Autotuner, configs: list[Any]) -> None:
        """Tell host code what the tuner has chosen, as it does after a launch. Which one that is, only a device knows."""
        tuner.best_config = configs[0]
        function = triton_jit.unwrap(tuner)
        if function is not None and len(configs) > 1:
            self._chosen[id(function)] = function, [triton_jit.config_kwargs(config) for config in configs]

    def launch_chosen(self, function: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Host code launches `function` itself. Where it does that with a tuner's choice, every candidate may be the choice."""
        kept = self._chosen.get(id(function))
        if kept is None or kept[0] is not function or getattr(self._thread, "via", (-1, -1)) != (-1, -1):
            return
        first, *others = kept[1]
        if all(name in kwargs and kwargs[name] == value for name, value in first.items()):
            for other in others:
                self.launch(function, args, {**kwargs, **other})

    def _memo_key(
        self, tuner: Autotuner, args: tuple[Any, ...], kwargs: dict[str, Any], configs: list[Any], tuning: int
    ) -> Any:
        """The key that decides the units of all candidates, or None if the candidates must be run.

        Candidates differ from the first one only by their configs, unless a wrapper between tuner and kernel uses raw
        arguments (inner heuristics), or a config has a hook.
        """
        if not isinstance(tuner.fn, JITFunction) or any(c.pre_hook is not None for c in configs):
            return None
        full = triton_jit.launch_defaults(tuner.fn, {**kwargs, **triton_jit.config_kwargs(configs[0])})
        full.pop("grid", None)
        full.pop("warmup", None)
        key, _, _ = triton_jit.bind(tuner.fn, args, full)
        return (id(tuner), tuning, tuple(id(c) for c in configs), key)


class LaunchedUnit:
    """The result of a launch on the virtual device."""

    __slots__ = ("unit",)

    def __init__(self, unit: int) -> None:
        self.unit = unit


def tuner_ordinal(tuner: Autotuner) -> int:
    """The number of this autotuner among those of its kernel in the kernel's module; their count if it is not there."""
    function = triton_jit.unwrap(tuner)
    assert function is not None
    found = _tuners_of_module(function)
    return next((n for n, t in enumerate(found) if t is tuner), len(found))


def tuners_of(function: JITFunction, ordinal: int) -> list[Autotuner]:
    """The autotuners of `function` with this ordinal: one from its module, or else all that its module does not have.

    A factory's kernel and its autotuner may be referenced only by a cache (torchao), and several such autotuners differ only in
    their configs. They are searched among all objects of the process, which takes a tenth of a second.
    """
    found = _tuners_of_module(function)
    if ordinal < len(found):
        return [found[ordinal]]
    alive = _tuners_among(function, live_objects.all_objects())
    return [tuner for tuner in alive if not any(tuner is other for other in found)]


def _tuners_of_module(function: JITFunction) -> list[Autotuner]:
    return _tuners_among(function, list(function.fn.__globals__.values()))


def _tuners_among(function: JITFunction, values: Sequence[Any]) -> list[Autotuner]:
    found: list[Autotuner] = []
    for value in values:
        # isinstance on the value itself would load lazy proxies.
        if not issubclass(type(value), (Autotuner, Heuristics)) or triton_jit.unwrap(value) is not function:
            continue
        for layer in triton_jit.wrappers(value):
            if isinstance(layer, Autotuner) and not any(layer is other for other in found):
                found.append(layer)
    return found


Launched = Callable[[JITFunction, tuple[Any, ...], dict[str, Any]], None]


@contextlib.contextmanager
def intercept_launch(log: LaunchLog, launched: Launched = lambda *_: None) -> Iterator[None]:
    """Inside, write launches to `log` instead of running them (virtual device).

    Args:
        launched: is called after each launch with the kernel and its arguments: whatever the kernel writes is written now.
    """
    jit_run, tuner_run = JITFunction.run, Autotuner.run

    def run(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> LaunchedUnit:
        for hook in self.pre_run_hooks:
            hook(*args, **kwargs)
        unit = LaunchedUnit(log.launch(self, args, kwargs))
        log.launch_chosen(self, args, kwargs)
        launched(self, args, kwargs)
        return unit

    def tune(self: Autotuner, *args: Any, **kwargs: Any) -> None:
        log.expand(self, args, kwargs)
        function = triton_jit.unwrap(self)
        if function is not None:  # its candidates may be known from an earlier launch, and were not run
            launched(function, args, kwargs)

    JITFunction.run, Autotuner.run = run, tune
    try:
        yield
    finally:
        JITFunction.run, Autotuner.run = jit_run, tuner_run


def record_launches(log: LaunchLog, every_candidate: bool = False) -> Any:
    """Write launches to `log`, and run them. Returns a function that takes the hooks out.

    Args:
        every_candidate: also log the candidates that a tuner does not launch, because it has its choice from Triton's disk
            cache. Not those of a tuner around heuristics: their arguments depend on running them.
    """

    def run(jit_run: Any, self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> Any:
        log.launch(self, args, kwargs)
        return jit_run(self, *args, grid=grid, warmup=warmup, **kwargs)

    def tune(tuner_run: Any, self: Autotuner, *args: Any, **kwargs: Any) -> Any:
        if len(self.configs) <= 1:
            return tuner_run(self, *args, **kwargs)
        key = triton_jit.tuning_key(self, args, kwargs)
        self.nargs = dict(zip(self.arg_names, args))
        candidates = list(self.prune_configs(kwargs))
        tuning = log.tuning(self, key, candidates)
        configs = [triton_jit.config_kwargs(c) for c in candidates]

        # A launch's candidate is recognised by its config, which the tuner passes as arguments.
        inner = self.fn

        class Marked:
            """Stands for the kernel during this call, to record which candidate launches."""

            fn = inner

            def __getattr__(self, name: str) -> Any:
                return getattr(inner, name)

            def run(self, *a: Any, **kw: Any) -> Any:
                number = next((n for n, c in enumerate(configs) if all(kw.get(k) == v for k, v in c.items())), -1)
                with log.through(tuning, number):
                    return inner.run(*a, **kw)

        self.fn = Marked()
        try:
            result = tuner_run(self, *args, **kwargs)
        finally:
            self.fn = inner
        if every_candidate and isinstance(inner, JITFunction):
            given = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
            for number, extra in enumerate(configs):
                with log.through(tuning, number):
                    log.launch(inner, args, {**given, **extra})
        choice = self.cache.get(key)
        if choice is not None and log.tunings[tuning]["choice"] is None:
            log.tunings[tuning]["choice"] = triton_jit.encoded_config(choice)
            log.changed()
        return result

    nvidia = importlib.import_module("triton.backends.nvidia.driver")

    def make_launcher(original: Any, constants: Any, signature: dict[Any, Any], tensordesc_meta: Any) -> str:
        if not tensordesc_meta:
            log.launcher(tuple(signature.values()))
        return str(original(constants, signature, tensordesc_meta))

    with contextlib.ExitStack() as undo:
        undo.callback(patch.replace(JITFunction, "run", run))
        undo.callback(patch.replace(Autotuner, "run", tune))
        if hasattr(nvidia, "make_launcher"):  # up to Triton 3.6
            undo.callback(patch.replace(nvidia, "make_launcher", make_launcher))
        return undo.pop_all().close
