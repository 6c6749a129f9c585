"""What a serving process of these tests looks at: each call beside the ledger, Dynamo's own count and plain Python.

Imported by the scripts that the tests start, after whatever the order of imports under test is.
"""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._dynamo.utils import counters

import aot_cache

FACTS: dict[str, Any] = {}
"""What the test reads."""


def counts() -> dict[str, int]:
    """The ledger since the seal, and how many frames Dynamo itself says that it began to convert."""
    sealed = aot_cache.stats()["after_seal"]
    names = ("frame", "graph_compile", "graph", "gcc", "rejected_bundle")
    return {**{name: sealed[name] for name in names}, "dynamo": counters["frames"]["total"]}


def call(name: str, function: Callable[..., Any], *args: Any) -> None:
    """Call `function` compiled and as plain Python on equal arguments; note how far apart they are and what it took.

    The arguments are compared too, as they are afterwards.
    """
    mine, theirs = copied(args), copied(args)
    before, error, found = counts(), "", None
    try:
        found = function(*mine)
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"[:500]
    after = counts()
    with torch.compiler.set_stance("force_eager"):
        wanted = function(*theirs) if not error else None
    apart = max(distance(found, wanted), *(distance(a, b) for a, b in zip(mine, theirs)), 0.0)
    FACTS[name] = {**{key: after[key] - before[key] for key in after}, "distance": apart, "error": error, "why": ""}


def miss(name: str, function: Callable[..., Any], *args: Any) -> None:
    """As `call`, and beforehand what `explain` says of it. That would install what fits: for calls that are to miss."""
    ask(name, function, *args)
    why = FACTS[name]["why"]
    call(name, function, *args)
    FACTS[name]["why"] = why


def ask(name: str, function: Callable[..., Any], *args: Any) -> None:
    """Only what `explain` says of a call that is to miss: compiling what misses takes a second each."""
    FACTS[name] = {"why": json.dumps(aot_cache.explain(function, *copied(args)))}


def copied(args: tuple[Any, ...]) -> Any:
    """Equal arguments that share memory with each other as the given ones do, and with nothing else."""
    memo: dict[int, Any] = {}
    out = []
    for arg in args:
        if isinstance(arg, torch.Tensor):
            with torch.inference_mode(arg.is_inference()):  # a copy is of the mode that it is made in
                out.append(copy.deepcopy(arg, memo))
        else:
            out.append(arg)
    return tuple(out)


def distance(found: Any, wanted: Any) -> float:
    """Relative norm of the difference; infinite where the two are not even alike."""
    if isinstance(wanted, (list, tuple)):
        if len(found) != len(wanted):
            return float("inf")
        return max((distance(a, b) for a, b in zip(found, wanted)), default=0.0)
    if not isinstance(wanted, torch.Tensor):
        return 0.0
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return float("inf")
    with torch.no_grad():
        difference = torch.linalg.vector_norm(found.double() - wanted.double())
        return float(difference / torch.linalg.vector_norm(wanted.double()).clamp(min=1e-30))


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """For a while, another value under a name of a module, class or function."""
    old = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, old)


def norm(layer: int = 0) -> Any:
    """A fresh module as the recipe has it, with random values in everything that it owns."""
    import sample_model

    module = sample_model.Norm(layer).requires_grad_(False)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.copy_(torch.randn_like(tensor))
    return module


def say() -> None:
    """What the test reads, as one line of JSON."""
    FACTS["stats"] = aot_cache.stats()
    print(json.dumps(FACTS))
