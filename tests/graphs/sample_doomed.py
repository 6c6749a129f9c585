"""Recipes of which something cannot be built, or not in one graph."""

from __future__ import annotations

from typing import NamedTuple

import torch

from aot_cache import Call, Range, Recipe, declare, device


class Pair(NamedTuple):
    one: torch.Tensor
    two: torch.Tensor


def data_dependent(x: torch.Tensor) -> torch.Tensor:
    if x.sum().item() > 0:
        return x + 1
    return x - 1


def parted(x: torch.Tensor) -> torch.Tensor:
    return x * 2 if x.shape[0] > 8 else x + 1


def paired(x: torch.Tensor) -> Pair:
    return Pair(x + 1, x * 2)


def sound(x: torch.Tensor) -> torch.Tensor:
    return x * 3


compiled_data_dependent = torch.compile(data_dependent, fullgraph=True)
compiled_parted = torch.compile(parted)
compiled_paired = torch.compile(paired)
compiled_sound = torch.compile(sound)


def _rows(n: int) -> torch.Tensor:
    return torch.empty(n, 16, device=device())


@declare(n=Range(2, 4))
def branches(n: int) -> Call:
    return Call(compiled_data_dependent, _rows(n))


@declare(n=Range(2, 16))
def parts(n: int) -> Call:
    return Call(compiled_parted, _rows(n))


@declare(n=Range(2, 4))
def pairs(n: int) -> Call:
    return Call(compiled_paired, _rows(n))


@declare(n=Range(2, 4))
def sounds(n: int) -> Call:
    return Call(compiled_sound, _rows(n))


depends = Recipe("depends", [branches])
some = Recipe("some", [parts, pairs, sounds])
