"""Calls with tensors of other types than `torch.Tensor`: quantized weights of torchao, DTensors over two devices."""

from __future__ import annotations

from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from aot_cache import Call, Range, Recipe, Values, declare, device

if not dist.is_initialized():
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
MESH = init_device_mesh("cpu", (2,))


@cache
def quantized() -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32))
    module = module.to(device()).eval()
    quantize_(module, Int8WeightOnlyConfig())
    return torch.compile(module)  # type: ignore[return-value]


@declare(n=Range(2, 6))
def int8_weights(n: int) -> Call:
    return Call(quantized(), torch.randn(n, 64, device=device()))


@cache
def sharded() -> DTensor:
    return distribute_tensor(torch.randn(64, 32, device=device()), MESH, [Shard(1)])


@torch.compile
def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.relu(x @ w)


def of_dtensors(n: int) -> Call:
    x = DTensor.from_local(torch.randn(n, 64, device=device()), MESH, [Replicate()], run_check=False)
    return Call(product, x, sharded())


static_dtensors = declare(name="static_dtensors", n=Values(2, 4))(of_dtensors)
dtensors = declare(name="dtensors", n=Range(2, 4))(of_dtensors)

recipe = Recipe("subclasses", [int8_weights, static_dtensors])
dynamic = Recipe("dynamic-dtensors", [dtensors])
