"""Process-wide settings that host code may change, and that the builder restores, so that no point affects another.

A recipe's function may set a default dtype, an environment variable or an Inductor setting while it makes arguments, and never
reset it; the next case would be traced under it. So each point starts with the settings from before. Settings that a server
makes once are kept: those made by *importing* a module, and by creating a model for the first time (torchao's `quantize_`
changes Inductor's settings).

Upstream: `torch/utils/_config_module.py` (`get_config_copy`, `__setattr__`), `torch/_dynamo/eval_frame.py` (`_stance`),
`torch/__init__.py` (`_GLOBAL_DEVICE_CONTEXT`), `torch/backends`.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any

import torch

Read = Callable[[], Any]
Write = Callable[[Any], Any]

SEED = 0
"""Seed of all random generators at each point, so that random numbers do not depend on the points before."""
_GONE = object()
_CONFIGS = (
    "torch._dynamo.config",
    "torch._inductor.config",
    "torch._functorch.config",
    "torch.fx.experimental._config",
    "torch.compiler.config",
)
_FP32 = tuple(
    "generic all,cuda all,cuda matmul,cuda conv,cuda rnn,mkldnn all,mkldnn matmul,mkldnn conv,mkldnn rnn".split(",")
)
_DEVICES = ("cpu", "cuda")


@dataclass
class _Part:
    """A group of settings, by name.

    Args:
        read: returns all settings of the group.
        write: sets one of them; the value `_GONE` removes it.
        mark: returns a value that changes whenever `read`'s does, but is cheaper; by default `read` itself.
        inside: the same for values changed in place, which `mark` does not see; called once for each point.
        room: prefix of the settings' names in messages.
    """

    read: Callable[[], Mapping[str, Any]]
    write: Callable[[str, Any], object]
    mark: Read | None = None
    inside: Read | None = None
    room: str = ""
    base: dict[str, Any] = field(default_factory=dict)
    base_mark: Any = _GONE
    base_inside: Any = None

    def note(self) -> None:
        """Take the current settings as those to restore."""
        mark = self._mark()
        if self.base_mark is _GONE or mark != self.base_mark:
            self.base = dict(self.read())
            self._marked()

    def now(self) -> Mapping[str, Any]:
        return self.base if self._mark() == self.base_mark else dict(self.read())

    def put_back(self) -> None:
        now = self.now()
        if now is self.base:
            if self.inside is None or self.inside() == self.base_inside:
                return
            now = dict(self.read())
        for name in _differing(now, self.base):
            self.write(name, self.base.get(name, _GONE))
        self._marked()

    def adopt(self, before: Mapping[str, Any]) -> None:
        """Keep the settings that have changed since `before`: they are no longer restored."""
        now = self.now()
        names = _differing(before, now)
        clean = before is self.base
        for name in names:
            if name in now:
                self.base[name] = now[name]
            else:
                self.base.pop(name, None)
        if names and clean:
            self._marked()

    def _marked(self) -> None:
        self.base_mark = self._mark()
        self.base_inside = None if self.inside is None else self.inside()

    def _mark(self) -> Any:
        return (self.mark or self.read)()


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in {**one, **other} if not _same(one.get(name, _GONE), other.get(name, _GONE))]


def _same(one: Any, other: Any) -> bool:
    return one is other or bool(one == other)


# --- the settings -----------------------------------------------------------------------------------------------------


def _set_variable(name: str, value: Any) -> None:
    if value is _GONE:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _device() -> Any:
    context = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
    return None if context is None else context.device


def _deterministic(value: Any) -> None:
    torch.use_deterministic_algorithms(value[0], warn_only=value[1])


def _precisions() -> Any:
    """torch has two APIs for this, and refuses to read the old one after the new one was used."""
    new: Any = getattr(torch._C, "_get_fp32_precision_getter", None)
    try:
        old = torch.get_float32_matmul_precision()
    except RuntimeError:
        old = ""
    return old, [] if new is None else [new(*name.split()) for name in _FP32]


def _set_precisions(value: Any) -> None:
    c: Any = torch._C
    old, new = value
    if old:
        torch.set_float32_matmul_precision(old)
    for name, precision in zip(_FP32, new):
        c._set_fp32_precision_setter(*name.split(), precision)


def _stance() -> Any:
    return getattr(sys.modules.get("torch._dynamo.eval_frame"), "_stance", None)


def _set_stance(value: Any) -> None:
    module: Any = sys.modules["torch._dynamo.eval_frame"]
    module._set_stance(value if value is not None else module.DynamoStance())


def _set_filters(value: Any) -> None:
    warnings.filters[:] = value  # type: ignore[index]  # a list, although its stub says otherwise


def _autocast(device: str) -> tuple[Read, Write]:
    def write(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, value[0])
        torch.set_autocast_dtype(device, value[1])

    return lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), write


def _flag(room: Any, name: str) -> tuple[Read, Write]:
    return lambda: getattr(room, name), lambda value: setattr(room, name, value)


@cache
def _values() -> dict[str, tuple[Read, Write]]:
    """Settings with one value each that is cheap to read."""
    backends, cuda = torch.backends, torch.backends.cuda
    anomaly: Any = torch.autograd.set_detect_anomaly
    return {
        "the working directory": (os.getcwd, os.chdir),
        "the filters of warnings": (lambda: list(warnings.filters), _set_filters),
        "the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
        "the default device": (_device, torch.set_default_device),
        "the grad mode": (torch.is_grad_enabled, torch.set_grad_enabled),
        "the threads of torch": (torch.get_num_threads, torch.set_num_threads),
        "anomaly detection": (torch.is_anomaly_enabled, anomaly),
        "the stance of torch.compile": (_stance, _set_stance),
        "deterministic algorithms": (
            lambda: (
                torch.are_deterministic_algorithms_enabled(),
                torch.is_deterministic_algorithms_warn_only_enabled(),
            ),
            _deterministic,
        ),
        "precisions of float32": (_precisions, _set_precisions),
        **{f"autocast on {device}": _autocast(device) for device in _DEVICES},
        "autocast's cache": (torch.is_autocast_cache_enabled, torch.set_autocast_cache_enabled),
        "cudnn.enabled": _flag(backends.cudnn, "enabled"),
        "cudnn.benchmark": _flag(backends.cudnn, "benchmark"),
        "cudnn.deterministic": _flag(backends.cudnn, "deterministic"),
        "mkldnn.enabled": (torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled),
        "reduced precision of float16": _flag(cuda.matmul, "allow_fp16_reduced_precision_reduction"),
        "reduced precision of bfloat16": _flag(cuda.matmul, "allow_bf16_reduced_precision_reduction"),
        "flash attention": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        "memory-efficient attention": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        "attention by plain operators": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        "attention by cuDNN": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    }


def _read_values() -> dict[str, Any]:
    return {name: read() for name, (read, _) in _values().items()}


def _variables() -> dict[str, str]:
    return dict(os.environ)


def _encoded_variables() -> dict[Any, Any]:
    environment: Any = os.environ
    return dict(environment._data)  # raw: decoding each variable costs more than all else here


def _config(name: str) -> _Part:
    """The settings of one of torch's config modules; empty before it is imported."""

    def module() -> Any:
        found = sys.modules.get(name)
        return found if hasattr(found, "get_config_copy") else None  # not while it is being imported

    def mark() -> Any:
        if module() is None:
            return None
        _count_changes()
        return _changes[name]

    def inside() -> Any:
        here = module()
        return None if here is None else [(id(value), *map(id, value)) for value in _containers(here)]

    def read() -> Mapping[str, Any]:
        here = module()
        return {} if here is None else here.get_config_copy()

    def write(key: str, value: Any) -> None:
        if value is not _GONE:
            setattr(module(), key, copy.deepcopy(value))

    return _Part(read, write, mark, inside, f"{name}.")


_changes: Counter[str] = Counter()
"""Config module → how often a setting was set. Reading all settings costs more than a point's host code."""


@cache
def _count_changes() -> None:
    from torch.utils._config_module import ConfigModule

    kind: Any = ConfigModule
    for name in ("__setattr__", "__delattr__"):
        setattr(kind, name, _counted(getattr(kind, name)))


def _counted(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def counted(self: Any, *args: Any) -> None:
        _changes[self.__name__] += 1
        original(self, *args)

    return counted


def _containers(module: Any) -> list[Any]:
    """The values that can be modified in place."""
    return [getattr(module, key) for key in _container_names(module.__name__)]


@cache
def _container_names(name: str) -> list[str]:
    module: Any = sys.modules[name]
    return [key for key, value in module.get_config_copy().items() if isinstance(value, (list, set, dict))]


@cache
def _parts() -> list[_Part]:
    values = _Part(_read_values, lambda name, value: _values()[name][1](value))
    return [
        _Part(_variables, _set_variable, _encoded_variables, None, "the variable "),
        values,
        *map(_config, _CONFIGS),
    ]


# --- restoring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changes:
    """Settings that differ from the noted ones: (number of the part, name, value)."""

    values: tuple[tuple[int, str, Any], ...] = ()

    @property
    def names(self) -> list[str]:
        return [_parts()[part].room + name for part, name, _ in self.values]

    def without(self, others: Changes) -> Changes:
        """The changes of settings that `others` does not change."""
        known = {(part, name) for part, name, _ in others.values}
        return Changes(tuple(one for one in self.values if one[:2] not in known))

    def make(self) -> None:
        """Apply the changes."""
        for part, name, value in self.values:
            _parts()[part].write(name, value)


class Settings:
    """The settings of this process that were noted."""

    def changed(self) -> Changes:
        """The settings that differ from the noted ones."""
        return Changes(
            tuple(
                (number, name, now.get(name, _GONE))
                for number, part in enumerate(_parts())
                if (now := part.now()) is not part.base
                for name in _differing(now, part.base)
            )
        )

    def put_back(self) -> None:
        """Restore the noted settings, also values that were modified in place."""
        for part in _parts():
            part.put_back()


@contextlib.contextmanager
def kept() -> Iterator[Settings]:
    """Restore at the end the settings that are changed inside. Random generators are seeded at the start."""
    for part in _parts():
        part.note()
    _seed()
    settings, imports = Settings(), _Imports()
    sys.meta_path.insert(0, imports)
    try:
        yield settings
    finally:
        if imports in sys.meta_path:
            sys.meta_path.remove(imports)
        settings.put_back()


def _seed() -> None:
    random.seed(SEED)
    torch.default_generator.manual_seed(SEED)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None and hasattr(numpy, "random"):
        numpy.random.seed(SEED)


_MARK = "__aot_cache_keeps_settings__"
_importing: list[str] = []


class _Imports(importlib.abc.MetaPathFinder):
    """The first finder: keeps the settings that a module changes while it is imported."""

    def __init__(self) -> None:
        self._asking = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if self._asking:
            return None
        self._asking = True  # let the other finders answer; this one only wraps their result
        try:
            spec = importlib.util.find_spec(fullname)
        except (ImportError, ValueError):
            return None  # the other finders raise this themselves
        finally:
            self._asking = False
        loader: Any = None if spec is None else spec.loader
        # Loaders of Python's builtin modules are classes; these modules change no settings.
        if loader is not None and not isinstance(loader, type) and not hasattr(loader, _MARK):
            with contextlib.suppress(AttributeError):
                _watch(loader)
        return spec


def _watch(loader: Any) -> None:
    run = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        if _importing or not any(isinstance(finder, _Imports) for finder in sys.meta_path):
            run(module)
            return
        before = [part.now() for part in _parts()]
        _importing.append(module.__name__)
        try:
            run(module)
        finally:
            _importing.clear()
            for part, state in zip(_parts(), before):
                part.adopt(state)

    loader.exec_module = exec_module
    setattr(loader, _MARK, True)
