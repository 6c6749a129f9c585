"""What the tests build: each way to compile something, over small ranges."""

from __future__ import annotations

from collections.abc import Sequence

import sample_model
import sample_twin_one
import sample_twin_two
import torch

from aot_cache import Call, Range, Recipe, Values, declare, device

ROWS = Range(2, 64)


def _rows(n: int) -> torch.Tensor:
    return torch.empty(n, sample_model.WIDTH, device=device())


@declare(n=ROWS)
def decorated(n: int) -> Call:
    return Call(sample_model.decorated, _rows(n))


@declare(n=ROWS, mode="no_grad")
def broken(n: int) -> Call:
    return Call(sample_model.compiled_broken, _rows(n))


def _through(x: torch.Tensor, layers: Sequence[torch.nn.Module]) -> torch.Tensor:
    for layer in layers:
        x = torch.compile(layer)(x)
    return x


@declare(n=Range(1, 64), mode="no_grad")
def layers(n: int) -> Call:
    with torch.device(device()):
        made = [sample_model.Norm(number).requires_grad_(False) for number in range(3)]
    return Call(_through, _rows(n), made)


@declare(n=ROWS, k=Range(2, 5))
def scaled(n: int, k: int) -> Call:
    return Call(sample_model.compiled_scaled, _rows(n), k)


@declare(n=Values(8, 16))
def tiled(n: int) -> Call:
    return Call(sample_model.compiled_tiled, _rows(n))


@declare(n=ROWS)
def method(n: int) -> Call:
    with torch.device(device()):
        step = sample_model.Step()
    return Call(torch.compile(step.run), _rows(n))


@declare(n=ROWS, mode="grad")
def weighted(n: int) -> Call:
    weight = torch.empty(sample_model.WIDTH, device=device(), requires_grad=True)
    return Call(sample_model.compiled_weighted, _rows(n), weight)


@declare(n=ROWS, mode="no_grad")
def pushed(n: int) -> Call:
    return Call(sample_model.compiled_pushed, _rows(n), _rows(n))


@declare(n=ROWS, mode="no_grad")
def elsewhere(n: int) -> Call:
    return Call(sample_model.compiled_elsewhere, _rows(n))


def _both(x: torch.Tensor) -> torch.Tensor:
    both: torch.Tensor = sample_twin_one.twin(x) + sample_twin_two.twin(x)
    return both


@declare(n=ROWS, mode="no_grad")
def twins(n: int) -> Call:
    return Call(_both, _rows(n))


few = Recipe("sample-few", [decorated, scaled, tiled])
recipe = Recipe("sample-graphs", [*few.cases, broken, layers, method, weighted, pushed, elsewhere, twins])
