"""What is done where a call misses: for the process, and for single functions; and the eager twins of kernels.

fallback  inside a capture: run without compiling, tuning or loading, count it, explain it (the default)
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
    """Where a function stands: its file, and its first and last line."""

    file: str
    first: int
    last: int


@dataclass(frozen=True)
class EagerImpl:
    """What runs in place of a kernel that is missing inside a capture.

    Args:
        function: computes with torch what the kernel does, into the same tensors.
        names: the arguments that it takes, of the kernel's and `grid`.
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
    """The process's policy; None leaves it as it is.

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
    """The process's policy: what was set, else AOT_CACHE_POLICY, else `fallback`."""
    return _default or from_environment() or "fallback"


def of(place: SourceSpan) -> str:
    """The policy for the function at `place`: its own, or that of the function in which it stands, or the process's.

    What Dynamo makes of the rest of a function, after a graph break, stands in that function.
    """
    around = [own for own in _own if own.file == place.file and own.first <= place.first <= own.last]
    return _own[max(around, key=lambda own: own.first)] if around else default()


def eager_impl_of(place: SourceSpan) -> EagerImpl | None:
    """The twin of the kernel at `place`, if it has one."""
    return _twins.get(place)


def policy(name: str) -> Callable[[T], T]:
    """Decorator: another policy for one function, compiled function, module, Triton kernel or autotuner.

    Returns it unchanged: nothing is put between a call and what it calls.

    Raises:
        DeclarationError: there is no such policy, or what is decorated is no function.
    """
    _known(name, "policy")

    def decorate(what: T) -> T:
        _own[span_of(what)] = name
        return what

    return decorate


def fallback(kernel: object) -> Callable[[T], T]:
    """Decorator: an eager twin for a Triton kernel (or autotuner), for launches that miss inside a capture.

    The twin is called with the kernel's arguments by name, as far as it takes them, constexprs as plain values, and
    with `grid` (three integers) if it takes that; it writes its results into the tensors that it is given, and must not
    read their values on the host. Its operators are what the capture records.

    Raises:
        DeclarationError: `kernel` is no kernel, or the twin takes what the kernel has not.
    """
    place = span_of(kernel)
    names = set(getattr(kernel, "arg_names", ()))
    if not names:
        raise DeclarationError(
            "a Triton kernel that gets an eager fallback", f"an object of type {type(kernel).__name__}"
        )

    def decorate(twin: T) -> T:
        parameters = inspect.signature(twin).parameters  # type: ignore[arg-type]  # it is called below
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
    """Where the Python function under `what` stands; `what` may also be its code.

    Raises:
        DeclarationError: there is none.
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
