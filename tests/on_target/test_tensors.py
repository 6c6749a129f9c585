"""upstream.virtual.torch_tensor: what host code does with tensors gives the geometry, and the values, that it gives on a CPU.

On a torch without CUDA each of these used to be a way into a device guard that is not there.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_cache.builder import virtual_gpu
from aot_cache.errors import DataDependent, TraceError
from aot_cache.upstream.virtual import torch_shortcuts, torch_tensor
from aot_cache.upstream.virtual.torch_tensor import VirtualTensor

Op = Callable[[torch.Tensor], Any]
NUMBERS = itertools.count()
"""For names of libraries, which torch has only once in a process."""

OPS: dict[str, Op] = {
    "~": lambda x: ~(x > 0),
    "float()": lambda x: x.float(),
    "half()": lambda x: x.half(),
    "bfloat16()": lambda x: x.bfloat16(),
    "long()": lambda x: x.long(),
    "int()": lambda x: x.int(),
    "bool()": lambda x: x.bool(),
    "to(dtype)": lambda x: x.to(torch.float16),
    "to(tensor)": lambda x: x.to(x.float()),
    "type(dtype)": lambda x: x.type(torch.float64),
    "type_as": lambda x: x.type_as(x.float()),
    "contiguous": lambda x: x.t().contiguous(),
    "clone": lambda x: x.clone(),
    "detach": lambda x: x.detach(),
    "copy_": lambda x: torch.zeros_like(x).copy_(x),
    "fill_": lambda x: x.clone().fill_(3),
    "zero_": lambda x: x.clone().zero_(),
    "add_": lambda x: x.clone().add_(1),
    "in place operator": lambda x: _iadd(x.clone()),
    "unsqueeze_": lambda x: x.clone().unsqueeze_(1),
    "squeeze_": lambda x: x.clone().unsqueeze_(0).squeeze_(0),
    "t_": lambda x: x.clone().t_(),
    "transpose_": lambda x: x.clone().transpose_(0, 1),
    "unsqueeze_ of a view": lambda x: x.clone()[1:].unsqueeze_(-1),
    "written after unsqueeze_": lambda x: x.clone().unsqueeze_(0).add_(1),
    "t": lambda x: x.t(),
    "T": lambda x: x.T,
    "transpose": lambda x: x.transpose(0, 1),
    "permute": lambda x: x.permute(1, 0),
    "view": lambda x: x.view(-1),
    "view as dtype": lambda x: x.view(torch.int32),
    "reshape": lambda x: x.t().reshape(2, 12),
    "flatten": lambda x: x.flatten(),
    "expand": lambda x: x[None].expand(3, -1, -1),
    "repeat": lambda x: x.repeat(2, 1),
    "chunk": lambda x: x.chunk(2, dim=-1),
    "split": lambda x: x.split([1, 3]),
    "unbind": lambda x: x.unbind(0),
    "iterating": lambda x: list(x),
    "unsqueeze": lambda x: x.unsqueeze(1),
    "as_strided": lambda x: x.as_strided((2, 2), (1, 2), 3),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "an index": lambda x: x[1],
    "a slice": lambda x: x[1:3, ::2],
    "ellipsis": lambda x: x[..., 1],
    "newaxis": lambda x: x[:, None],
    "a tensor as index": lambda x: x[torch.tensor([2, 0], device=x.device)],
    "two tensors as index": lambda x: x[torch.tensor([2, 0], device=x.device), torch.tensor([1, 1], device=x.device)],
    "a list as index": lambda x: x[[0, 2]],
    "setting an index": lambda x: _set(x.clone(), 1, 5),
    "setting a slice": lambda x: _set(x.clone(), slice(1, 3), 0),
    "setting by a tensor": lambda x: _set(x.clone(), (slice(None), 1), torch.ones(4, dtype=x.dtype, device=x.device)),
    "comparing": lambda x: (x > 3) & (x != 5),
    "where": lambda x: torch.where(x > 3, x, 0),
    "masked_fill": lambda x: x.masked_fill(x > 3, 0),
    "matmul": lambda x: x.float() @ x.float().t(),
    "a scalar of the CPU": lambda x: x * torch.tensor(2.0),
    "cat": lambda x: torch.cat([x, x], dim=1),
    "stack": lambda x: torch.stack([x, x]),
    "pad": lambda x: torch.nn.functional.pad(x, (0, 2)),
    "softmax": lambda x: x.float().softmax(-1),
    "rms norm": lambda x: x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6),
    "max": lambda x: x.max(dim=1),
    "topk": lambda x: x.topk(2, dim=1),
    "sort": lambda x: x.sort(dim=1),
    "cumsum": lambda x: x.cumsum(0),
    "argmax": lambda x: x.argmax(),
    "diff": lambda x: x.diff(dim=0),
    "new_empty": lambda x: x.new_empty(3, 5).shape,
    "new_zeros": lambda x: x.new_zeros((3, 5)),
    "new_full": lambda x: x.new_full((2,), 7),
    "new_tensor": lambda x: x.new_tensor([1, 2]),
    "zeros_like": lambda x: torch.zeros_like(x),
    "ones_like": lambda x: torch.ones_like(x, dtype=torch.int32),
    "full_like": lambda x: torch.full_like(x, 2),
    "arange": lambda x: torch.arange(2, 9, 3, device=x.device),
    "arange of one": lambda x: torch.arange(x.shape[0], device=x.device, dtype=torch.int32),
    "zeros": lambda x: torch.zeros(3, device=x.device),
    "full": lambda x: torch.full((2, 3), 7, device=x.device),
    "eye": lambda x: torch.eye(3, device=x.device),
    "tril": lambda x: x.tril(),
    "as_tensor": lambda x: torch.as_tensor([1, 2], device=x.device),
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=0),
    "scatter_": lambda x: x.clone().scatter_(0, torch.zeros(1, 6, dtype=torch.int64, device=x.device), x[:1]),
    "index_select": lambda x: x.index_select(1, torch.tensor([0, 3], device=x.device)),
    "gather": lambda x: x.gather(1, torch.tensor([[0], [1]], device=x.device)),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "requires_grad_": lambda x: x.float().requires_grad_(False),
    "parameter": lambda x: torch.nn.Parameter(x.float(), requires_grad=False).data,
    "einsum": lambda x: torch.einsum("ij,kj->ik", x.float(), x.float()),
    "linear": lambda x: torch.nn.functional.linear(x.float(), x.float()),
    "layer_norm": lambda x: torch.nn.functional.layer_norm(x.float(), (6,)),
    "silu and chunk": lambda x: torch.nn.functional.silu(x.float()).chunk(2, -1)[0],
    "any": lambda x: (x > 3).any(dim=1),
}


def _iadd(x: torch.Tensor) -> torch.Tensor:
    x += 1
    return x


def _set(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    x[index] = value
    return x


SCALARS: dict[str, Op] = {
    "item": lambda x: x[0, 1].item(),
    "int": lambda x: int(x.max()),
    "float": lambda x: float(x[1, 1]),
    "bool": lambda x: bool((x > 3).any()),
    "index": lambda x: list(range(30))[x[0, 1]],
    "tolist": lambda x: x.tolist(),
    "len": lambda x: len(x),
    "numel": lambda x: x.numel(),
    "nonzero": lambda x: x.nonzero().shape,
    "nonzero as tuple": lambda x: len(x.nonzero(as_tuple=True)),
    "a mask": lambda x: x[x > 3].shape,
    "masked_select": lambda x: x.masked_select(x > 3).shape,
    "unique": lambda x: x.unique().shape,
    "a slice by a value": lambda x: x[: x[0, 1]].shape,
    "equal": lambda x: torch.equal(x, x),
    "contains": lambda x: 5 in x,
    "is_contiguous": lambda x: x.t().is_contiguous(),
    "is_cuda": lambda x: x.device.type in ("cuda", "cpu"),
    "element_size": lambda x: x.element_size(),
    "alignment": lambda x: [x.view(-1)[n:].data_ptr() % 16 for n in range(9)],
    "size of the storage": lambda x: x.untyped_storage().nbytes(),
}


def base(device: str) -> torch.Tensor:
    """4 x 6 known integers."""
    return torch.arange(24, device=device).view(4, 6) % 7


def facts(value: Any) -> Any:
    """Shape, strides, offset, type and, where they are known, values of every tensor in `value`."""
    if isinstance(value, (list, tuple)):
        return [facts(v) for v in value]
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.storage_offset(), str(value.dtype)
    return value


def assert_values(virtual: Any, real: Any) -> None:
    """What is known is true; that it is known at all is another matter."""
    if isinstance(virtual, (list, tuple)):
        for one, other in zip(virtual, real):
            assert_values(one, other)
    elif isinstance(virtual, VirtualTensor):
        if virtual.known is not None:
            assert torch.equal(virtual.known, real), "values that host code would read are wrong"
    elif isinstance(virtual, torch.Tensor):
        assert torch.equal(virtual, real)


@pytest.fixture(params=["inference", "no_grad", "grad"])
def mode(request: pytest.FixtureRequest) -> Any:
    modes: dict[str, Any] = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}
    return modes[request.param]


@pytest.mark.parametrize("what", OPS)
def test_an_operation(what: str, mode: Any) -> None:
    with mode():
        real = OPS[what](base("cpu"))
        with virtual_gpu.tensors():
            virtual = OPS[what](base("cuda"))
    assert facts(virtual) == facts(real)
    assert_values(virtual, real)


def views(virtual: Any, real: Any, of: torch.Tensor) -> list[VirtualTensor]:
    """The virtual tensors whose real ones share memory with `of`."""
    if isinstance(virtual, (list, tuple)):
        return [found for one, other in zip(virtual, real) for found in views(one, other, of)]
    if not isinstance(virtual, VirtualTensor) or virtual.device.type == "cpu":  # a move to the CPU is a copy
        return []
    return [virtual] if real.untyped_storage().data_ptr() == of.untyped_storage().data_ptr() else []


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("what", OPS)
def test_an_operation_in_inference_mode_on_what_was_made_before(what: str, known: bool) -> None:
    """An engine's buffers are made at its start, outside of that mode: a view of one is no inference tensor."""

    def made(device: str) -> torch.Tensor:
        return base(device) if known else base(device) + torch.empty(4, 6, dtype=torch.int64, device=device).zero_()

    real_base = made("cpu")
    with torch.inference_mode():
        real = OPS[what](real_base)
    with virtual_gpu.tensors():
        virtual_base = made("cuda")
        with torch.inference_mode():
            virtual = OPS[what](virtual_base)
            again = OPS[what](virtual_base[:])
    assert facts(virtual) == facts(again) == facts(real)
    assert not any(view.is_inference() for view in views(virtual, real, real_base))
    assert_values(virtual, real)


@pytest.mark.parametrize("what", SCALARS)
def test_reading(what: str, mode: Any) -> None:
    with mode():
        real = SCALARS[what](base("cpu"))
        with virtual_gpu.tensors():
            virtual = SCALARS[what](base("cuda"))
    assert virtual == real


NUMPY: dict[str, Op] = {
    "cpu().numpy()": lambda x: x.cpu().numpy(),
    "numpy(force=True)": lambda x: x.numpy(force=True),
    "asarray": lambda x: np.asarray(x.cpu()),
    "a mask": lambda x: x.cpu().numpy()[0][x.cpu().numpy()[0] > 2],
}


@pytest.mark.parametrize("what", NUMPY)
def test_as_an_array(what: str, mode: Any) -> None:
    with mode(), virtual_gpu.tensors():
        assert NUMPY[what](base("cuda")).tolist() == NUMPY[what](base("cpu")).tolist()
        with pytest.raises(DataDependent):
            NUMPY[what](unknown(base("cuda")))
        with pytest.raises(TypeError, match=re.escape("Use Tensor.cpu()")):
            base("cuda").numpy()


TO_THE_HOST: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "copy_": lambda x: torch.zeros(4, 6, dtype=torch.int64).copy_(x),
    "copy_ into a view": lambda x: _copied_in(torch.zeros(9, 6, dtype=torch.int64), x),
    "copy_ into pinned memory": lambda x: torch.zeros(4, 6, dtype=torch.int64, pin_memory=x.is_cuda).copy_(
        x, non_blocking=True
    ),
    "setting a slice": lambda x: _set(torch.zeros(6, 6, dtype=torch.int64), slice(1, 5), x),
}


def _copied_in(buffer: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    buffer[2:6].copy_(x)
    return buffer


@pytest.mark.parametrize("what", TO_THE_HOST)
def test_what_is_copied_to_the_host_is_known(what: str, mode: Any) -> None:
    """A plain tensor has values, and host code reads them. Left as they were, they would be taken for the device's."""
    with mode(), virtual_gpu.tensors():
        found = TO_THE_HOST[what](base("cuda"))
        assert type(found) is torch.Tensor and torch.equal(found, TO_THE_HOST[what](base("cpu")))
        with pytest.raises(DataDependent, match="to a tensor on the CPU"):
            TO_THE_HOST[what](unknown(base("cuda")))


# Host code computes tables and masks on the CPU, too, and the short cuts are asked about every operator that there is.
ON_THE_CPU: dict[str, Op] = {
    **{name: lambda x, name=name: getattr(torch.ops.aten, name)(x) for name in torch_shortcuts._POINTWISE},
    "abs()": lambda x: x.abs(),
    "view": lambda x: x.view(-1),
    "view of a transposed one": lambda x: x.t().reshape(-1),
    "empty_like": lambda x: torch.empty_like(x).fill_(1),
    "new_zeros": lambda x: x.new_zeros(3),
    "new_empty": lambda x: x.new_empty(3).fill_(2),
    "zeros": lambda x: torch.zeros(3),
    "full": lambda x: torch.empty(3).fill_(2),
    "of no dimension": lambda x: x.sum().sqrt(),
    "empty": lambda x: x[:0].exp(),
}


@pytest.mark.parametrize("what", ON_THE_CPU)
def test_plain_tensors_beside_virtual_ones(what: str, mode: Any) -> None:
    with mode():
        real = ON_THE_CPU[what](torch.ones(3, 2))
        with virtual_gpu.tensors():
            beside = ON_THE_CPU[what](torch.ones(3, 2))
    assert type(beside) is torch.Tensor and beside.device.type == "cpu"
    assert facts(beside) == facts(real) and torch.equal(beside, real)


def test_a_plain_tensor_that_is_moved_is_virtual(mode: Any) -> None:
    with mode(), virtual_gpu.tensors():
        moved = torch.ones(3).abs().to("cuda")
        assert isinstance(moved, VirtualTensor) and moved.is_cuda
        assert isinstance(moved.neg(), VirtualTensor)


WRITES: dict[str, Op] = {
    "a view": lambda x: _iadd(x[1:3]),
    "a row": lambda x: x[2].zero_(),
    "all": lambda x: x.fill_(9),
    "an index": lambda x: _set(x, 1, 5),
    "indices": lambda x: _set(x, torch.tensor([2, 0]), 5),
    "indices of a row": lambda x: _set(x, (1, torch.tensor([2, 0])), 5),
    "indices, by a tensor": lambda x: _set(x, torch.tensor([2, 0]), x[1:3].clone()),
    "a list": lambda x: _set(x, [2, 0], 5),
    "a mask": lambda x: _set(x, x > 6, 5),
    "an array": lambda x: _set(x, np.array([2, 0]), 5),
    "a mask as an array": lambda x: _set(x, np.array([True, False, False, True]), 5),
    "a mask of rows": lambda x: _set(x, (x.sum(-1) > 30, ...), 5),
    "a transposed view": lambda x: x.t()[0].add_(1),
    "copy_": lambda x: x[0].copy_(x[1]),
    "a view of a view": lambda x: x.view(-1)[3:9].mul_(2),
    "out=": lambda x: torch.add(x, 1, out=x),
}


@pytest.mark.parametrize("what", WRITES)
def test_writing_through_a_view_is_seen(what: str, mode: Any) -> None:
    real = base("cpu")
    with mode():
        WRITES[what](real)
        with virtual_gpu.tensors():
            virtual = base("cuda")
            WRITES[what](virtual)
            assert virtual.tolist() == real.tolist()


def unknown(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


UNKNOWN: dict[str, Op] = {
    "copy_": lambda x: x.copy_(unknown(x)),
    "copy_ into a view": lambda x: x[1:3].copy_(unknown(x[1:3])),
    "setting an index": lambda x: _set(x, 1, unknown(x[1])),
    "adding": lambda x: x.add_(unknown(x)),
    "adding to a view": lambda x: x[0].add_(unknown(x[0])),
    "out=": lambda x: torch.add(x, unknown(x), out=x),
    "random_": lambda x: x.random_(0, 3),
    "random_ of a view": lambda x: x[0].random_(0, 3),
    "setting indices": lambda x: _set(x, torch.tensor([2, 0]), unknown(x[1:3])),
    "setting unknown indices": lambda x: _set(x, unknown(x[0]), 5),
    "setting an unknown mask": lambda x: _set(x, unknown(x) > 0, 5),
    "setting an unknown mask of rows": lambda x: _set(x, ((unknown(x[:, 0]) > 0), ...), 5),
    "setting an unknown mask of a row": lambda x: _set(x, (1, unknown(x[0]) > 0), 5),
    "scatter_ by unknown indices": lambda x: x.scatter_(0, unknown(x), x),
}


@pytest.mark.parametrize("what", UNKNOWN)
def test_values_that_were_written_over_are_not_read(what: str, mode: Any) -> None:
    """Old values in place of ones that nobody knows would make a plan that is wrong and looks right."""
    with mode(), virtual_gpu.tensors():
        x = base("cuda")
        UNKNOWN[what](x)
        with pytest.raises(DataDependent):
            x.tolist()


def test_a_view_forgets_what_its_base_is_written_over_with(mode: Any) -> None:
    with mode(), virtual_gpu.tensors():
        x = base("cuda")
        view = x[0]
        x.copy_(unknown(x))
        with pytest.raises(DataDependent):
            view.tolist()
        view.copy_(torch.tensor([1, 2, 3, 4, 5, 6], device="cuda"))
        x.fill_(0)
        with contextlib.suppress(DataDependent):  # to have forgotten is right as well
            assert view.tolist() == [0] * 6


def test_what_is_only_read_keeps_its_values(mode: Any) -> None:
    """Declared indices are used to write into states that nobody knows, and read again afterwards."""
    with mode(), virtual_gpu.tensors():
        state, index = torch.empty(8, 4, device="cuda"), torch.tensor([5, 2], device="cuda")
        state[index] = 0
        state.index_add_(0, index, torch.empty(2, 4, device="cuda"))
        assert index.tolist() == [5, 2]


@pytest.mark.parametrize(
    "make", [torch.rand_like, torch.randn_like, torch.bernoulli, lambda x: torch.dropout(x, 0.5, True)]
)
def test_random_numbers_are_not_known(make: Op, mode: Any) -> None:
    with mode(), virtual_gpu.tensors(), pytest.raises(DataDependent):
        make(torch.tensor([0.25, 0.5], device="cuda")).tolist()


@given(data=st.data())
def test_views_of_views(data: st.DataObject) -> None:
    """Any chain of slices, selections and transpositions has the geometry, the address and the values of the real one."""
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    size = torch.Size(shape).numel()
    with virtual_gpu.tensors():
        real, virtual = torch.arange(size).view(shape), torch.arange(size, device="cuda").view(shape)
        for _ in range(data.draw(st.integers(1, 4))):
            if real.dim() == 0:
                break
            dim = data.draw(st.integers(0, real.dim() - 1))
            kind = data.draw(st.sampled_from(["slice", "select", "transpose", "unsqueeze"]))
            index: list[Any] = [slice(None)] * dim
            if kind == "slice":
                bounds = st.none() | st.integers(-6, 6)
                index.append(slice(data.draw(bounds), data.draw(bounds), data.draw(st.sampled_from([None, 1, 2]))))
            elif kind == "select":
                if not real.shape[dim]:
                    break
                index.append(data.draw(st.integers(-real.shape[dim], real.shape[dim] - 1)))
            elif kind == "unsqueeze":
                index.append(None)
            if kind == "transpose":
                real, virtual = real.transpose(0, dim), virtual.transpose(0, dim)
            else:
                real, virtual = real[tuple(index)], virtual[tuple(index)]
        assert facts(virtual) == facts(real)
        assert json.dumps(virtual.tolist()) == json.dumps(real.tolist())
        if real.numel():
            assert virtual.data_ptr() % 16 == real.storage_offset() * 8 % 16


@pytest.mark.parametrize("key", ["CPU", "CompositeExplicitAutograd"])
def test_an_operator_of_others_on_what_is_not_virtual_is_run_once(key: str) -> None:
    """Libraries call some of their own while they are imported, which recipes do on the virtual device."""
    library = torch.library.Library(f"of_others_{key.lower()}", "DEF")
    library.define("more(Tensor x) -> Tensor")
    called = []
    library.impl("more", lambda x: called.append(1) or x + 1, key)
    assert torch.equal(getattr(torch.ops, library.ns).more(torch.ones(2)), torch.full((2,), 2.0))
    assert called == [1]


def test_an_operator_without_code_for_the_cpu_keeps_no_values(mode: Any) -> None:
    """A compiled operator of an engine has a shape rule and code for the GPU. Its arguments may be known, its result is not."""
    library = torch.library.Library(f"compiled_for_gpus_{next(NUMBERS)}", "DEF")
    library.define("doubled(Tensor x) -> Tensor")
    torch.library.register_fake(f"{library.ns}::doubled", lambda x: x.new_empty(2 * x.shape[0]), lib=library)
    with mode(), virtual_gpu.tensors():
        found = getattr(torch.ops, library.ns).doubled(torch.tensor([1, 2, 3], device="cuda"))
        assert isinstance(found, VirtualTensor) and found.shape == (6,)
        with pytest.raises(DataDependent):
            found.tolist()


def test_compiled_code_without_a_shape_rule_is_named(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = torch.library.Library(f"compiled_without_a_rule_{next(NUMBERS)}", "DEF")
    library.define("norm(Tensor x) -> Tensor")

    def in_cpp(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("its data is not allocated yet")

    library.impl("norm", in_cpp, "CUDA")
    monkeypatch.setattr(torch_tensor, "is_python", lambda *_: False)  # as if it were registered from C++
    with (
        mode(),
        virtual_gpu.tensors(),
        pytest.raises(TraceError, match="is compiled code, and has no shape rule") as said,
    ):
        getattr(torch.ops, library.ns).norm(torch.ones(3, device="cuda"))
    assert "torch.library.register_fake" in str(said.value)


# --- what engines do --------------------------------------------------------------------------------------------------


@given(sizes=st.lists(st.integers(1, 5000), min_size=2, max_size=8))
def test_tensors_that_exist_at_once_do_not_overlap(sizes: list[int]) -> None:
    """Host code tells buffers apart by their address (vLLM counts the segments of its KV cache so)."""
    with virtual_gpu.tensors():
        made = [torch.empty(size, device="cuda", dtype=torch.uint8) for size in sizes]
        places = sorted((one.data_ptr(), one.data_ptr() + one.numel()) for one in made)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(places))
        assert all(start % 512 == 0 for start, _ in places)
        assert made[0][1:].data_ptr() == made[0].data_ptr() + 1 if sizes[0] > 1 else True
        assert made[1].view(-1).data_ptr() == made[1].data_ptr()


def test_what_nobody_knows_is_ones_if_that_is_asked_for(mode: Any) -> None:
    noted = []
    with mode(), virtual_gpu.tensors():
        sampled = torch.rand(3, 5, device="cuda").argmax(-1)
        with virtual_gpu.assuming(lambda what, place: noted.append((what, place))):
            assert sampled.tolist() == [1, 1, 1] and int(sampled[0]) == 1
            assert sampled.cpu().numpy().tolist() == [1, 1, 1]
            host = torch.zeros(3, dtype=torch.int64)
            host.copy_(sampled)
            assert host.tolist() == [1, 1, 1]
            known = torch.tensor([4, 5], device="cuda")
            assert known.tolist() == [4, 5], "what is known stays known"
        with pytest.raises(DataDependent):
            sampled.tolist()
    assert len(noted) == 4 and all(place.startswith(__file__) for _, place in noted)
    assert "tolist() of VirtualTensor(shape=(3,)" in noted[0][0]


def test_a_view_of_host_memory_has_what_the_host_writes(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    library = torch.library.Library(f"of_an_engine_{next(NUMBERS)}", "DEF")
    library.define("gpu_view(Tensor x) -> Tensor")
    operator = getattr(torch.ops, library.ns).gpu_view
    monkeypatch.setattr(torch_tensor, "VIEWS_OF_HOST", {operator.default})
    with mode(), virtual_gpu.tensors():
        host = torch.zeros(4, dtype=torch.int32)
        view = operator(host)
        assert isinstance(view, VirtualTensor) and view.is_cuda and view.tolist() == [0, 0, 0, 0]
        host[2] = 7
        assert view.tolist() == [0, 0, 7, 0] and view[2:].tolist() == [7, 0]


def test_a_host_tensor_larger_than_memory(mode: Any) -> None:
    """vLLM makes one to ask for its strides."""
    with mode(), virtual_gpu.tensors():
        huge = torch.empty(1 << 14, 3, 1 << 20, dtype=torch.float32)  # 192 GiB
        assert huge.stride() == (3 << 20, 1 << 20, 1) and huge.device.type == "cpu"
        huge[5, 1, 2] = 4.0
        assert huge[5, 1].sum() == 4.0


def test_operators_on_host_tensors_of_any_size_are_torch_s_own() -> None:
    with virtual_gpu.tensors():
        assert torch.empty(3, dtype=torch.float16).untyped_storage().nbytes() == 6
