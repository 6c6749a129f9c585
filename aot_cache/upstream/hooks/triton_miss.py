"""Hook the points where Triton is about to compile or load a kernel: observe, answer in Triton's place, or let it go on.

Every hook here is on a miss path: a launch that finds its kernel loaded never gets here.

Upstream: `triton/runtime/jit.py` (`JITFunction.run`, `_pack_args`, `_do_compile`), `triton/compiler/compiler.py`
(`CompiledKernel._init_handles`).
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import triton.language as tl
from triton.compiler import CompiledKernel
from triton.runtime.jit import JITFunction

from aot_cache.upstream import patch
from aot_cache.upstream.codec import triton_jit

Json = Any
_asked = threading.local()
"""What the current launch on this thread asks for: `run` calls `_pack_args` just before it compiles."""


@dataclass(frozen=True)
class Nearest:
    """An installed specialization that resembles a missing one.

    Args:
        text: for people, see `Launch.text`.
        differences: how the missing one differs from it, part by part.
    """

    text: str
    differences: list[str]


@dataclass(frozen=True)
class Launch:
    """A launch for which Triton has no compiled kernel.

    Args:
        function: the kernel.
        device: where it is launched.
        key: Triton's key of the missing specialization.
        warmup: the kernel is only compiled, not launched.
    """

    function: JITFunction
    device: int
    key: str
    warmup: bool
    _specialization: list[Any]
    _options: dict[str, Any]
    _kwargs: dict[str, Any]

    @property
    def name(self) -> str:
        return triton_jit.name_of(self.function)

    def unit(self) -> dict[str, Json]:
        """The missing unit, in the form that plans use.

        Raises:
            TraceError: a constexpr has no JSON form.
        """
        return {
            "kernel": self.name,
            "source": triton_jit.closure_digest(triton_jit.closure(self.function)),
            "specialization": triton_jit.encode(self._specialization)["l"],
            "options": {name: triton_jit.encode(value) for name, value in self._options.items()},
            "overrides": triton_jit.option_overrides(self.function, self._kwargs, self._options),
        }

    def installed(self) -> Any:
        """The kernel that is installed for this launch by now, or None."""
        return self.function.device_caches[self.device][0].get(self.key)

    @property
    def text(self) -> str:
        """The missing specialization, for people: `x=*fp32 D, n=i32, BLOCK=64, num_warps=8`."""
        return _text(self._parts(self.key))

    def nearest(self) -> Nearest | None:
        """The installed specialization with the fewest differences; None if none is installed."""
        wanted = self._parts(self.key)
        found = [self._parts(key) for key in self.function.device_caches[self.device][0]]
        near = [Nearest(_text(parts), _differences(wanted, parts)) for parts in found]
        return min(near, key=lambda one: len(one.differences), default=None)

    def _parts(self, key: str) -> dict[str, str]:
        return _parts(key, [parameter.name for parameter in self.function.params])


GoOn = Callable[[], Any]
Handler = Callable[[Launch, GoOn], Any]


def intercept_compile(handler: Handler) -> Callable[[], None]:
    """Call `handler(launch, go_on)` for the kernel where Triton would compile one; `go_on()` compiles it.

    Returns a function that takes the hook out.
    """

    def _pack_args(
        pack: Any,
        self: JITFunction,
        backend: Any,
        kwargs: Any,
        bound: Any,
        specialization: Any,
        options: Any,
        *more: Any,
    ) -> Any:
        _asked.by = (self, list(specialization), dict(options), dict(kwargs))
        return pack(self, backend, kwargs, bound, specialization, options, *more)

    def _do_compile(
        compile_: Any,
        self: JITFunction,
        key: str,
        signature: Any,
        device: int,
        constexprs: Any,
        options: Any,
        attrs: Any,
        warmup: Any,
    ) -> Any:
        by, specialization, given, kwargs = _asked.__dict__.pop("by", (None, [], {}, {}))

        def go_on() -> Any:
            return compile_(self, key, signature, device, constexprs, options, attrs, warmup)

        if by is not self:  # compiled without a launch
            return go_on()
        return handler(Launch(self, device, key, bool(warmup), specialization, given, kwargs), go_on)

    return patch.replace_all(JITFunction, {"_pack_args": _pack_args, "_do_compile": _do_compile})


def around_loading(around: Callable[[str], contextlib.AbstractContextManager[None]]) -> Callable[[], None]:
    """Load compiled kernels' modules inside `around(name of the kernel)`, when a launch loads one.

    Returns a function that takes the hook out.
    """

    def _init_handles(load: Any, self: Any) -> None:
        if self.module is not None:
            return
        with around(str(self.name)):
            load(self)

    return patch.replace(CompiledKernel, "_init_handles", _init_handles)


def load_now(kernel: Any) -> None:
    """Load a kernel that was just compiled, as its launch would."""
    if isinstance(kernel, CompiledKernel):
        kernel._init_handles()


class EagerLauncher:
    """Stands for a compiled kernel in `JITFunction.run`: launches a Python function that computes the same with torch.

    Args:
        function: the kernel.
        twin: called with the grid and the kernel's arguments by name.
    """

    function = None
    packed_metadata = None

    def __init__(self, function: JITFunction, twin: Callable[[tuple[int, int, int], dict[str, Any]], None]) -> None:
        self._names = [parameter.name for parameter in function.params]
        self._twin = twin

    def launch_metadata(self, *_: Any) -> None:
        """No metadata for profilers, because no kernel runs."""

    def run(self, grid_x: int, grid_y: int, grid_z: int, *rest: Any) -> None:
        """Has a launcher's signature: grid, six values of the launch, the kernel's arguments."""
        values = (value.value if isinstance(value, tl.constexpr) else value for value in rest[6:])
        self._twin((grid_x, grid_y, grid_z), dict(zip(self._names, values)))


# --- what differs -----------------------------------------------------------------------------------------------------


def _parts(key: str, names: list[str]) -> dict[str, str]:
    """The parts of Triton's key by name: each parameter's type and value, and the options."""
    values, end = _items(key, 0)
    options, _ = _items(key, end)
    found = dict(zip(names, values))
    for option in options:
        name, _, value = option.partition(":")
        found[name.strip().strip("'\"")] = value.strip()
    return found


def _items(text: str, start: int) -> tuple[list[str], int]:
    """(items of the first bracket at or after `start`, index after it). Nested brackets and quotes stay inside their item."""
    depth, begin, quote = 0, start, ""
    out: list[str] = []
    for place in range(start, len(text)):
        letter = text[place]
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
            if depth == 1:
                begin = place + 1
        elif letter in ")]}":
            depth -= 1
        if depth == 0 and letter in ")]}" and not quote:
            last = text[begin:place].strip()
            return ([*out, last] if last else out), place + 1
        if depth == 1 and letter == "," and not quote:
            out.append(text[begin:place].strip())
            begin = place + 1
    return out, len(text)


_PLAIN = re.compile(r"\('?(?P<type>[^',()]+)'?, '?(?P<value>[^'()]*)'?\)")


def _text(parts: dict[str, str]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in parts.items() if name not in _ALWAYS)


_ALWAYS = ("debug", "instrumentation_mode", "fpsan_homomorphic_casts")  # every launch has them


def _short(value: str) -> str:
    """`('*fp32', 'D')` → `*fp32 D`, `('constexpr', 64)` → `64`; any other form unchanged."""
    found = _PLAIN.fullmatch(value)
    if found is None:
        return value
    kind, more = found["type"], found["value"]
    return more if kind == "constexpr" else f"{kind} {more}".removesuffix(" None").strip()


def _differences(wanted: dict[str, str], found: dict[str, str]) -> list[str]:
    names = [*wanted, *(name for name in found if name not in wanted)]
    return [
        f"{name} is {_short(wanted.get(name, 'unset'))} instead of {_short(found.get(name, 'unset'))}"
        for name in names
        if wanted.get(name) != found.get(name)
    ]
