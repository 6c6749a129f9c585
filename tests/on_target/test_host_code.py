"""Host code around kernels, on virtual tensors: what it makes is what it makes on a CPU."""

from __future__ import annotations

from typing import Any

import host_code
import pytest
import torch
from host_code import Code
from torch.utils import _pytree as pytree

from aot_cache.builder import virtual_gpu
from aot_cache.errors import TraceError

MODES: dict[str, Any] = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> Any:
    return MODES[request.param]


def facts(made: Any, device: str) -> list[Any]:
    """Of every tensor in `made`; `device` is called `here`."""
    tensors = [value for value in pytree.tree_leaves(made) if isinstance(value, torch.Tensor)]
    return [
        (tuple(t.shape), t.stride(), str(t.dtype), t.device.type.replace(device, "here"), t.requires_grad)
        for t in tensors
    ]


def made(code: Code, mode: Any) -> list[Any]:
    with virtual_gpu.tensors(), mode():
        return facts(code("cuda"), "cuda")


def made_on_the_cpu(code: Code, mode: Any) -> list[Any]:
    with mode():
        return facts(code("cpu"), "cpu")


@pytest.mark.contract("torch_streams", "torch_random")
@pytest.mark.parametrize("what", host_code.DEVICE)
def test_what_is_asked_about_the_device(what: str, mode: Any) -> None:
    made(host_code.DEVICE[what], mode)


@pytest.mark.contract("torch_modules")
@pytest.mark.parametrize("what", {**host_code.MODULES, **host_code.INIT})
def test_modules_and_their_weights(what: str, mode: Any) -> None:
    code = {**host_code.MODULES, **host_code.INIT}[what]
    assert made(code, mode) == made_on_the_cpu(code, mode) != []


@pytest.mark.contract("torch_factories")
@pytest.mark.parametrize("what", host_code.NUMBERED)
def test_a_device_by_its_number(what: str, mode: Any) -> None:
    ((shape, _, _, place, _),) = made(host_code.NUMBERED[what], mode)
    assert (shape, place) == ((4, 4), "here")


@pytest.mark.contract("torch_factories")
@pytest.mark.parametrize("what", {**host_code.PINNED, **host_code.FROM_DATA})
def test_pinned_memory(what: str, mode: Any) -> None:
    with virtual_gpu.tensors(), mode():
        pinned = {**host_code.PINNED, **host_code.FROM_DATA}[what]("cuda")
        assert pinned.is_pinned() and pinned[:1].is_pinned() and pinned.device.type == "cpu"
        assert not torch.empty_like(pinned).is_pinned() and pinned.pin_memory() is pinned
        moved = pinned.to("cuda", non_blocking=True)
        assert moved.is_cuda and moved.shape == pinned.shape and not moved.is_pinned()
        pinned.copy_(moved, non_blocking=True)


def test_pinned_values_are_read() -> None:
    with virtual_gpu.tensors():
        lengths = torch.empty(3, dtype=torch.int64, pin_memory=True)
        lengths.copy_(torch.tensor([4, 5, 6]))
        assert lengths.to("cuda", non_blocking=True).tolist() == [4, 5, 6]


def test_time_is_not_made_up() -> None:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with pytest.raises(TraceError, match="measures GPU time"):
        start.elapsed_time(end)


@pytest.mark.contract("torch_streams", "torch_random")
def test_streams_of_the_cpu_stay_torchs() -> None:
    assert torch.Stream(device="cpu").device.type == "cpu" and torch.Generator().device.type == "cpu"
