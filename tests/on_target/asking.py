"""What Triton itself would ask for: its own `run`, up to the compiler, with CPU tensors. Nothing of aot-cache is in here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

Asked = tuple[str, str]
"""(name of a kernel, see `name_of`, Triton's key in memory)."""


def name_of(function: JITFunction) -> str:
    """`module:qualname`, and what a factory has put around it: its kernels have one name."""
    name = f"{function.fn.__module__}:{function.fn.__qualname__}"
    return " ".join([name, *(repr(cell.cell_contents) for cell in function.fn.__closure__ or ())])


@contextmanager
def asking() -> Iterator[set[Asked]]:
    """Collect what launches inside miss in Triton's in-memory cache; nothing is compiled, nothing is launched."""
    seen: set[Asked] = set()

    def _do_compile(self: JITFunction, key: str, *rest: Any) -> None:
        seen.add((name_of(self), key))  # where Triton begins to compile; without a kernel it goes no further

    with mock.patch.object(JITFunction, "_do_compile", _do_compile):
        yield seen


def asked_for(call: Callable[[], Any], *tuners: Autotuner) -> set[Asked]:
    """What `call` asks for when none of these tuners has made a choice."""
    for tuner in tuners:
        tuner.cache.clear()
    with asking() as seen:
        call()
    for tuner in tuners:
        tuner.cache.clear()
    return seen
