"""What a bundle says of an autotuner, by which of its candidates' units could be compiled."""

from __future__ import annotations

from typing import Any

import pytest

from aot_cache.artifact.manifest import KernelUnit
from aot_cache.artifact.plan import Tuning, Unit
from aot_cache.builder import assemble


def unit(number: int, *via: tuple[int, int]) -> Unit:
    rest: dict[str, Any] = {"source": "s", "overrides": [], "reached": {}}
    return Unit(kernel="m:k", specialization=[number], options={}, via=[list(pair) for pair in via], **rest)


def compiled(one: Unit) -> KernelUnit:
    facts = {
        "key": "k",
        "memory_key": "m",
        "option_order": [],
        "object": "o",
        "metadata": {},
        "reached": {},
        "ranks": [],
    }
    return KernelUnit(kernel=0, specialization=one.specialization, options={}, via=one.via, **facts)


A, B, C = unit(0, (0, 0), (1, 0)), unit(1, (0, 0)), unit(2, (0, 1))


@pytest.mark.parametrize(
    ("made", "default"), [((A, B, C), 0), ((A, C), 1), ((B, C), 1), ((A, B), 0), ((A,), None), ((), None)]
)
def test_the_default_is_the_first_candidate_that_is_there_with_all_its_units(
    made: tuple[Unit, ...], default: int | None
) -> None:
    tuning = Tuning(
        kernel="m:k", tuner=0, key=[], candidates=[{"BLOCK": 16}, {"BLOCK": 32}, {"BLOCK": 64}], choice=None
    )
    found = assemble._tuning(0, tuning, {"m:k": 0}, [compiled(one) for one in made], [A, B, C])
    assert found.default == default
