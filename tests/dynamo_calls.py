"""Calls of functions that Dynamo compiles with a backend that keeps the graph as it is: no compiler, no GPU."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from aot_cache.upstream.codec import dynamo_guards, dynamo_package
from aot_cache.upstream.hooks import dynamo_frames
from aot_cache.upstream.hooks.dynamo_frames import Frame
from aot_cache.upstream.virtual import dynamo_inputs


@contextlib.contextmanager
def hooked(undo: Callable[[], None]) -> Iterator[None]:
    """A hook that is taken out, whatever happens."""
    try:
        yield
    finally:
        undo()


def as_it_is(graph: Any, inputs: Any) -> Any:
    """A backend that compiles nothing."""
    return graph.forward


class Kept:
    """What a package was told of each frame."""

    def __init__(self) -> None:
        self.frames: list[tuple[dynamo_package.CompiledFrame, Frame]] = []
        self.called: list[str] = []
        self.identities: list[list[list[str]]] = []
        self.values: list[list[list[str]]] = []
        self.nameless: list[list[str]] = []

    def package(self, code: types.CodeType, module: str) -> Any:
        kept = self

        class Recorder(dynamo_package.Package):
            def __getattribute__(self, name: str) -> Any:
                if not name.startswith("_") and name != "frame":
                    kept.called.append(name)
                return super().__getattribute__(name)

        return Recorder(code, module)


def compiled_by_dynamo(what: Callable[..., Any], *args: Any, backend: Any = as_it_is) -> Kept:
    """Call `what`, compiled, with our package in place of Dynamo's."""
    kept = Kept()

    def keep(frame: Frame, go_on: Any) -> Any:
        found = kept.package(frame.code, frame.module)
        answer = go_on(found)
        kept.frames.append((found.frame, frame))
        kept.identities.append(list(written.identities))
        kept.values.append(list(written.values))
        kept.nameless.append(list(written.nameless))
        return answer

    with hooked(dynamo_frames.intercept_compile(keep)):
        with dynamo_inputs.session({}, 8), dynamo_guards.writing() as written:
            torch.compile(what, backend=backend)(*args)
    return kept
