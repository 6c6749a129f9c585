"""What to do when a call misses, for the process and for single functions; and the eager twins of kernels.

fallback  inside a capture: run without compiling, tuning or loading; count and explain the miss (the default)
error     inside a capture, and anywhere after `seal()`: raise `CacheMiss` before anything is recorded (CI, canaries)
observe   change nothing, only count
"""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from aot_cache.errors import DeclarationError
from aot_cache.upstream.codec import unwrapping

POLICIES = ("fallback", "error", "observe")
VARIABLE = "AOT_CACHE_POLICY"
T = TypeVar("T")


class SourceSpan(NamedTuple):
    """Where a function is defined: its file, and its first and last line."""

    file: str
    first: int
    last: int


@dataclass(frozen=True)
class EagerImpl:
    """What runs in place of a kernel that misses inside a capture.

    Args:
        function: computes with torch what the kernel computes, into the same tensors.
        names: which of the kernel's arguments, and `grid`, the function takes.
    """

    function: Callable[..., object]
    names: frozenset[str]

    def __call__(self, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        known = {**arguments, "grid": grid}
        self.function(**{name: known[name] for name in known if name in self.names})


_default: str | None = None
_own: dict[SourceSpan, str] = {}
_twins: dict[SourceSpan, EagerImpl] = {}


def set_default(name: str | None) -> None:
    """Set the process's policy; None leaves it unchanged.

    Raises:
        DeclarationError: there is no such policy.
    """
    global _default
    if name is not None:
        _default = _known(name, "policy")


def from_environment() -> str | None:
    """The policy that AOT_CACHE_POLICY names, if it is set.

    Raises:
        DeclarationError: there is no such policy.
    """
    name = os.environ.get(VARIABLE)
    return _known(name, VARIABLE) if name else None


def default() -> str:
    """The process's policy: the one that was set, else AOT_CACHE_POLICY, else `fallback`."""
    return _default or from_environment() or "fallback"


def of(place: SourceSpan) -> str:
    """The policy for the function at `place`: its own, else that of the enclosing function, else the process's.

    A resume function, which Dynamo makes after a graph break, lies within the lines of its original function.
    """
    around = [own for own in _own if own.file == place.file and own.first <= place.first <= own.last]
    return _own[max(around, key=lambda own: own.first)] if around else default()


def eager_impl_of(place: SourceSpan) -> EagerImpl | None:
    """The twin of the kernel at `place`, if it has one."""
    return _twins.get(place)


def policy(name: str) -> Callable[[T], T]:
    """Decorator: set a policy for one function, compiled function, module, Triton kernel or autotuner.

    The decorated object is returned unchanged, so calls have no extra cost.

    Args:
        name: `fallback`, `error` or `observe`.

    Raises:
        DeclarationError: there is no such policy, or the decorated object is none of these.
    """
    _known(name, "policy")

    def decorate(what: T) -> T:
        _own[span_of(what)] = name
        return what

    return decorate


def fallback(kernel: object) -> Callable[[T], T]:
    """Decorator: declare an eager twin of a Triton kernel (or autotuner). It runs when a launch misses inside a capture.

    The twin is called with those of the kernel's arguments that it names, constexprs as plain values, and with `grid` (three
    integers) if it names that. It writes its results into the given tensors, and must not read tensor values on the host.
    The capture records the twin's operators.

    Raises:
        DeclarationError: `kernel` is no kernel, or the twin requires a parameter that the kernel does not have.
    """
    place = span_of(kernel)
    names = set(getattr(kernel, "arg_names", ()))
    if not names:
        raise DeclarationError(
            "a Triton kernel that gets an eager fallback", f"an object of type {type(kernel).__name__}"
        )

    def decorate(twin: T) -> T:
        parameters = inspect.signature(twin).parameters  # type: ignore[arg-type]  # a function: it is called below
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        taken = {n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        unknown = sorted(
            n for n in parameters.keys() - names - {"grid"} if parameters[n].default is inspect.Parameter.empty
        )
        if [n for n in unknown if n in taken or parameters[n].kind is inspect.Parameter.POSITIONAL_ONLY]:
            raise DeclarationError(
                f"an eager fallback that takes arguments of the kernel ({', '.join(sorted(names))}), or grid",
                f"one that takes {', '.join(unknown)}",
                "name its parameters as the kernel's",
            )
        accepted = frozenset(names if takes_all else taken & (names | {"grid"}))
        _twins[place] = EagerImpl(twin, accepted)  # type: ignore[arg-type]
        return twin

    return decorate


def span_of(what: object) -> SourceSpan:
    """Where the Python function under `what` is defined; `what` may also be a code object.

    Raises:
        DeclarationError: there is no function under `what`.
    """
    code = what if isinstance(what, types.CodeType) else unwrapping.code_of(what)
    if code is None:
        raise DeclarationError("a function, a module or a Triton kernel", f"an object of type {type(what).__name__}")
    lines = [line for _, _, line in code.co_lines() if line]
    return SourceSpan(code.co_filename, code.co_firstlineno, max([code.co_firstlineno, *lines]))


def _known(name: str, what: str) -> str:
    if name not in POLICIES:
        raise DeclarationError(f"{what} to be one of {', '.join(POLICIES)}", repr(name))
    return name
