"""A program for `aot-cache record` that calls compiled functions on the CPU, and, without arguments, what needs a recipe.

With `serve` it calls them again under a bundle, with sizes between those of the recording too, and prints what was traced and
the largest distance from eager.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import recorded_steps as steps
import torch

SIZES = (2, 5, 9, 1)


def calls(sizes: Sequence[int]) -> list[torch.Tensor]:
    mine = torch.compile(steps.plain, options={"epilogue_fusion": False})
    out: list[Any] = []
    weights = {"w": torch.ones(8, 4)}
    with torch.inference_mode():
        for n in sizes:
            x = torch.arange(n * 8.0).reshape(n, 8)
            out.append(steps.step(x, weights))
            out.append(steps.step(x, weights, 3, bias=[torch.ones(4)]))
            values = torch.arange(n * 6.0).reshape(n, 6)
            of = torch.full((n, 1), 5.0)
            torch._dynamo.decorators.mark_unbacked(values, 0)
            torch._dynamo.decorators.mark_unbacked(of, 0)
            out.append(steps.Counts.greater(values, of))
    with torch.no_grad():
        for n in sizes:
            out.append(mine(torch.arange(80.0).reshape(10, 8), torch.arange(n)))
            buffer = torch.zeros(20)
            out.append(steps.overlap(buffer, buffer[3 : 3 + n]))
    return out


def need_a_recipe() -> None:
    torch.compile(steps.Model())(torch.ones(2, 8))
    torch.compile(lambda x: x + 1)(torch.ones(3))
    torch.compile(steps.plain, backend="eager")(torch.zeros(4, 8), torch.arange(2))


def serve() -> None:
    import aot_cache.auto

    aot_cache.ready(strict=True)
    aot_cache.seal()
    from torch._dynamo.utils import counters

    sizes = (*SIZES, 3, 7)
    found = calls(sizes)
    traced = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("force_eager"):
        wanted = calls(sizes)
    distance = max(float((a.double() - b.double()).norm()) for a, b in zip(found, wanted, strict=True))
    print(json.dumps({"traced": traced, "distance": distance, "stats": aot_cache.stats()}))


if __name__ == "__main__":
    if sys.argv[1:] == ["serve"]:
        serve()
    else:
        calls(SIZES)
        need_a_recipe()
