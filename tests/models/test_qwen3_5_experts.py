"""The kernel of the experts, in Triton's interpreter, and the plain loop say what a product for each pair says.

In bfloat16 the interpreter cannot multiply.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from limits import HANGS
from torch import Tensor

from aot_cache.models.qwen3_5 import experts

Product = tuple[Tensor, Tensor, Tensor, Tensor]

# In a process of its own: a kernel is for the interpreter or not from when it is made.
CHILD = """
import sys
import torch
from aot_cache.models.qwen3_5.experts_kernel import launch
torch.save([launch(*one) for one in torch.load(sys.argv[1])], sys.argv[2])
"""


def chosen(tokens: int, each: int, count: int) -> Tensor:
    return torch.rand(tokens, count).topk(each).indices


def products() -> list[tuple[Product, Tensor]]:
    """Arguments of `grouped`, and the result by way of each pair's own weight."""
    torch.manual_seed(0)
    out = []
    for numbers, count, columns, width in (
        (chosen(1, 2, 8), 8, 64, 64),
        (chosen(20, 4, 6), 6, 96, 80),  # parts of tiles, in all directions
        (chosen(3, 2, 40), 40, 64, 16),  # most experts have nobody
        (torch.full((50, 1), 3), 5, 16, 64),  # one has all, in four tiles
        (
            torch.cat([torch.zeros(16, 1), torch.full((32, 1), 4)]).long(),
            5,
            64,
            33,
        ),  # whole tiles; the first and the last
    ):
        weight, pairs = torch.randn(count, columns, width), experts.order(numbers, count)
        for rows in (numbers.shape[0], numbers.numel()):
            x = torch.randn(rows, width)
            spread = x.repeat_interleave(numbers.numel() // rows, 0)
            out.append(((x, weight, *pairs), torch.einsum("pk,pnk->pn", spread, weight[numbers.flatten()])))
    return out


def test_the_loop() -> None:
    for arguments, wanted in products():
        torch.testing.assert_close(experts.grouped(*arguments), wanted)


def test_the_kernel(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    made = products()
    torch.save([arguments for arguments, _ in made], tmp_path / "arguments")
    root = str(Path(__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path / "arguments"), str(tmp_path / "results")],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": root},
        check=True,
        timeout=HANGS,
    )
    for got, (_, wanted) in zip(torch.load(tmp_path / "results"), made, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
