"""Make `torch.nn` work with tensors without memory where it uses their values or their identity.

Upstream: `torch/nn/init.py` (`_no_grad_trunc_normal_`), `torch/nn/modules/module.py` (`Module.to`, which swaps by
`torch.utils.swap_tensors`), `torch/_subclasses/fake_tensor.py` (`FakeTensor.__deepcopy__`), `torch/_C` (`_swap_tensor_impl`,
`Tensor.data`).
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from aot_cache.upstream.virtual import this_gpu, torch_factories
from aot_cache.upstream.virtual.torch_fake import HostMode
from aot_cache.upstream.virtual.torch_tensor import VirtualTensor, become

_WITHOUT_VALUES = (FakeTensor, VirtualTensor)


def for_virtual_tensors() -> None:
    """Patch `torch.nn` for host code around kernels (`VirtualTensor`). Not undone."""
    _truncate_without_looking()
    _move_modules_by_name()
    _set_virtual_data()


def for_fake_tensors() -> None:
    """Patch `torch.nn` for host code around graphs (`FakeTensor`). Not undone."""
    _truncate_without_looking()
    _move_modules_by_name()
    _swap_fake_tensors()
    _copy_fake_tensors()
    _set_fake_data()


def _truncate_without_looking() -> None:
    """`trunc_normal_` redraws numbers that are out of bounds, but these tensors have no numbers."""
    init: Any = torch.nn.init
    original = init._no_grad_trunc_normal_

    def truncated(tensor: torch.Tensor, mean: float, std: float, *more: Any, **named: Any) -> torch.Tensor:
        if not isinstance(tensor, _WITHOUT_VALUES):
            return original(tensor, mean, std, *more, **named)  # type: ignore[no-any-return]
        with torch.no_grad():
            return tensor.normal_(mean, std)

    init._no_grad_trunc_normal_ = truncated


def _move_modules_by_name() -> None:
    """`module.to(0)` and `module.cuda(0)` would ask the driver for the device with that number."""
    module: Any = torch.nn.Module
    plain = module.to

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        args, kwargs = torch_factories.named(args, kwargs)
        return plain(self, *args, **kwargs)  # type: ignore[no-any-return]

    module.to = to
    module.cuda = lambda self, device=None: plain(self, this_gpu.device())


def _swap_fake_tensors() -> None:
    """`Module.to` keeps each parameter's identity (tied weights) by a swap, which refuses tensors that a fake mode references."""
    utils: Any = torch.utils
    original = utils.swap_tensors

    def swap(one: torch.Tensor, other: torch.Tensor) -> None:
        if not isinstance(one, FakeTensor) or not isinstance(other, FakeTensor):
            original(one, other)
            return
        _swap(one, other)

    utils.swap_tensors = swap


def _swap(one: torch.Tensor, other: torch.Tensor) -> None:
    torch._C._swap_tensor_impl(one, other)
    one.__dict__, other.__dict__ = other.__dict__, one.__dict__


def _copy_fake_tensors() -> None:
    """`copy.deepcopy` would copy the storage, which does not exist, and everything a tensor references, even the fake mode."""
    fake: Any = FakeTensor
    plain = fake.__deepcopy__

    def deepcopied(self: torch.Tensor, memo: dict[int, Any]) -> Any:
        if not isinstance(self.fake_mode, HostMode):  # type: ignore[attr-defined]
            return plain(self, memo)
        if id(self) not in memo:
            with self.fake_mode, torch.no_grad():  # type: ignore[attr-defined]
                made = self.detach().clone()
            extras = {name: value for name, value in self.__dict__.items() if name not in made.__dict__}
            made.__dict__.update(copy.deepcopy(extras, memo))
            memo[id(self)] = made.requires_grad_(self.requires_grad)
        return memo[id(self)]

    fake.__deepcopy__ = deepcopied


def _set_fake_data() -> None:
    """`parameter.data = ...` copies the C++ state of a tensor, which lacks a fake tensor's device."""
    fake: Any = FakeTensor
    plain: Any = torch.Tensor.data

    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        if not isinstance(value, FakeTensor):
            plain.__set__(self, value)
            return
        wanted, before = self.requires_grad, dict(self.__dict__)
        _swap(self, value.detach())
        self.__dict__.update({name: kept for name, kept in before.items() if name not in self.__dict__})
        self.requires_grad_(wanted)

    fake.data = property(plain.__get__, set_data)


def _set_virtual_data() -> None:
    """`parameter.data = ...` copies the C++ state of a tensor, which is only a part of a virtual tensor."""
    tensor: Any = torch.Tensor
    plain = tensor.data

    def set_data(self: torch.Tensor, value: torch.Tensor) -> None:
        if isinstance(value, VirtualTensor):
            become(self, value)
        else:
            plain.__set__(self, value)

    tensor.data = property(plain.__get__, set_data)
