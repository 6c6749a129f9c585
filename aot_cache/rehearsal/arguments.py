"""The arguments of one point, made twice and equal: once for the bundle, once for eager; and the memory that both share."""

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
    """Two calls of equal arguments.

    Args:
        bundle, eager: the calls.
        different: an argument that is not equal in the two, however often they are made; empty where all are.
    """

    bundle: Call
    eager: Call
    different: str = ""


def make(case: Case, point: Point, device: str) -> Call:
    """The call at a point, under a fixed seed, with nothing in its tensors that happened to be in memory."""
    import torch

    torch.manual_seed(SEED)
    with case.modes(device), real_tensors.Filling(SEED):
        return case.call(point)


def pair(case: Case, point: Point, device: str) -> Pair:
    """Two calls at a point. What a recipe makes once and keeps draws its numbers the first time only: made again, they agree."""
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
    """(name, tensor) of all arguments, and of what the function holds: a module's, or a closure's."""
    return [*tensors(call.args, "args"), *tensors(call.kwargs, "kwargs"), *tensors(call.fn, "function")]


def _equal(one: Any, other: Any) -> bool:
    import torch

    if one is other:
        return True
    if one.shape != other.shape or one.dtype != other.dtype or one.device != other.device:
        return False
    if one.device.type == "meta":
        return True
    if one.dtype.itemsize == 1:  # several of 8 bits know no comparison
        one, other = one.view(torch.uint8), other.view(torch.uint8)
    same = one == other
    return bool((same | ((one != one) & (other != other))).all())


@dataclass
class Shared:
    """Memory that both calls of a pair use, such as the caches of a model that the recipe keeps; parameters are not.

    The first call must not change what the second one sees.
    """

    _pieces: list[tuple[Any, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, made: Pair) -> Shared:
        """Keep what is in it now."""
        mine, theirs = _storages(made.bundle), _storages(made.eager)
        return cls([(storage, storage.clone()) for key, storage in mine.items() if key in theirs])

    def __bool__(self) -> bool:
        return bool(self._pieces)

    def put_back(self) -> None:
        """Put into it what was there at first."""
        for storage, kept in self._pieces:
            storage.copy_(kept)


def _storages(call: Call) -> dict[Any, Any]:
    import torch

    found = [real_tensors.storage_of(t) for _, t in tensors_of(call) if not isinstance(t, torch.nn.Parameter)]
    return dict(one for one in found if one is not None)
