"""Functions under `torch.compile` that a program calls in all the ways that a recording can make again."""

import torch


@torch.compile
def step(x, weights, scale=2, *, bias=None):  # type: ignore[no-untyped-def]
    y = (x @ weights["w"]).relu() * scale
    return y if bias is None else y + bias[0]


def plain(x, ids):  # type: ignore[no-untyped-def]
    x.index_add_(0, ids, torch.ones_like(x[: ids.shape[0]]))
    return x.sum(-1)


@torch.compile(dynamic=True)
def overlap(buffer, part):  # type: ignore[no-untyped-def]
    buffer.add_(1)
    return part * 2


class Counts:
    @staticmethod
    @torch.compile(fullgraph=True)
    def greater(values, of):  # type: ignore[no-untyped-def]
        return (values > of).sum(-1)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.layer(x).tanh()
        return found
