"""Makes the arguments of one point twice, equal, for the bundle and for eager; and keeps the memory that both share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from aot_cache.recipes.declare import Call, Case
from aot_cache.recipes.dimensions import Point
from aot_cache.rehearsal.leaves import tensors
from aot_cache.upstream.codec import real_tensors

SEED = 20_240_229
_TRIES = 3


@dataclass(frozen=True)
class Pair:
    """Two calls with equal arguments.

    Args:
        bundle, eager: the calls.
        different: path of a tensor that differs between them each time they are made; empty if all are equal.
    """

    bundle: Call
    eager: Call
    different: str = ""


def make(case: Case, point: Point, device: str) -> Call:
    """The call at a point, with a fixed seed and with uninitialised tensors filled."""
    import torch

    torch.manual_seed(SEED)
    with case.modes(device), real_tensors.Filling(SEED):
        return case.call(point)


def pair(case: Case, point: Point, device: str) -> Pair:
    """Two calls at a point. They may differ the first time, when a recipe makes what it then keeps: that draws random numbers,
    too. Made again, they are equal."""
    one = make(case, point, device)
    different = ""
    for _ in range(_TRIES):
        other = make(case, point, device)
        different = _first_difference(one, other)
        if not different:
            return Pair(one, other)
        one = other
    return Pair(one, make(case, point, device), different)


def _first_difference(one: Call, other: Call) -> str:
    mine, theirs = dict(tensors_of(one)), dict(tensors_of(other))
    if mine.keys() != theirs.keys():
        return min(mine.keys() ^ theirs.keys())
    return next((path for path, tensor in mine.items() if not _equal(tensor, theirs[path])), "")


def tensors_of(call: Call) -> list[tuple[str, Any]]:
    """(path, tensor) of all arguments, and of what the function holds, as a module or in its closure."""
    return [*tensors(call.args, "args"), *tensors(call.kwargs, "kwargs"), *tensors(call.fn, "function")]


def _equal(one: Any, other: Any) -> bool:
    import torch

    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if one.device.type == "meta":
        return True
    if one.dtype.itemsize == 1:  # several 8-bit dtypes have no comparison
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    same = one == other
    return bool((same | ((one != one) & (other != other))).all())


@dataclass
class Shared:
    """Memory that both calls of a pair use, such as the caches of a model that the recipe keeps. Parameters are excluded.

    It is saved, so that the second call does not see what the first one wrote.
    """

    _pieces: list[tuple[Any, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, made: Pair) -> Shared:
        """Save its present contents."""
        mine, theirs = _storages(made.bundle), _storages(made.eager)
        return cls([(storage, storage.clone()) for key, storage in mine.items() if key in theirs])

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def put_back(self) -> None:
        """Restore the saved contents."""
        for storage, kept in self._pieces:
            storage.copy_(kept)


def _storages(call: Call) -> dict[Any, Any]:
    import torch

    found = [real_tensors.storage_of(t) for _, t in tensors_of(call) if not isinstance(t, torch.nn.Parameter)]
    return dict(one for one in found if one is not None)
