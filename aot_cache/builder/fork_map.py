"""Runs a function over items in forked children that may die.

A compiler can crash its process (LLVM aborts, the OOM killer). multiprocessing.Pool then waits forever, and ProcessPoolExecutor
fails all items. Here only one item is lost, with a reason, and a new child continues.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Died:
    """The result for an item whose child died."""

    why: str


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run(
    function: Callable[[T], object], items: Sequence[T], workers: int | None = None, fresh: bool = False
) -> Iterator[tuple[int, Any]]:
    """Yield (index, result) as items finish; a result is what `function` returned, or `Died`.

    With `fresh`, each item runs in a new child.

    `function` must not raise; it returns its errors. Children are forked, so they share the parent's imports.
    """
    context = multiprocessing.get_context("fork")
    waiting = list(range(len(items)))[::-1]
    children: dict[Connection, tuple[BaseProcess, int]] = {}

    def start() -> None:
        ours, theirs = context.Pipe()
        child = context.Process(target=_child, args=(function, items, theirs, [ours, *children]), daemon=True)
        child.start()
        theirs.close()
        index = waiting.pop()
        ours.send(index)
        children[ours] = (child, index)

    try:
        while waiting or children:
            while waiting and len(children) < (workers or cores()):
                start()
            for pipe in wait(list(children)):
                assert isinstance(pipe, Connection)
                child, index = children[pipe]
                try:
                    result = pipe.recv()
                except (EOFError, OSError):
                    child.join()
                    del children[pipe]
                    yield index, Died(_how(child.exitcode))
                    continue
                yield index, result  # before the next item starts, so that the caller can store it for equal items
                if waiting and not fresh:
                    following = waiting.pop()
                    children[pipe] = (child, following)
                    try:
                        pipe.send(following)
                    except OSError:  # it died after its answer: another child takes the item
                        child.join()
                        del children[pipe]
                        waiting.append(following)
                else:
                    with contextlib.suppress(OSError):
                        pipe.send(None)
                    child.join()
                    del children[pipe]
    finally:
        for child, _ in children.values():
            child.kill()


def _child(function: Callable[[T], object], items: Sequence[T], pipe: Connection, others: list[Connection]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    gc.freeze()  # imports stay: a collection of them would dirty copy-on-write pages (~5 % of a graph compile)
    for other in others:
        other.close()  # an inherited end would keep the pipe of a dead sibling open
    while (index := pipe.recv()) is not None:
        pipe.send(function(items[index]))


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"its process was killed by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"
