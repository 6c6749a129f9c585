"""aot_cache.upstream.virtual.torch_shortcuts: results have the geometry that ATen gives them, whatever the operands look like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aot_cache.builder import virtual_gpu
from aot_cache.errors import TraceError
from aot_cache.upstream.virtual import torch_shortcuts, torch_tensor

pytestmark = pytest.mark.contract("torch_shortcuts")

Made = Callable[[str, torch.dtype], torch.Tensor]

PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
}
ONES: dict[str, Callable[[Any], Any]] = {
    "neg": lambda a: -a,
    "pow": lambda a: a**2,
    "cos": lambda a: a.cos(),
    "softplus": lambda a: torch.nn.functional.softplus(a),
    "to": lambda a: a.to(torch.float64),
    "mean": lambda a: a.mean(-1, keepdim=True) if a.dim() else a,
    "mean without": lambda a: a.mean(-1) if a.dim() else a,
}


@st.composite
def tensors(draw: Any, shape: list[int]) -> Made:
    """A tensor of a shape: permuted in memory, a part of a wider one."""
    order = draw(st.permutations(range(len(shape))))
    wider = [draw(st.sampled_from([0, 0, 0, 1])) for _ in shape]

    def make(device: str, dtype: torch.dtype) -> torch.Tensor:
        whole = torch.zeros([shape[d] + more for d, more in zip(order, wider)], dtype=dtype, device=device)
        for at, (dim, more) in enumerate(zip(order, wider)):
            whole = whole.narrow(at, 0, shape[dim]) if more else whole
        return whole.permute([order.index(dim) for dim in range(len(shape))])

    return make


SHAPES = st.lists(st.sampled_from([1, 1, 2, 3, 8]), max_size=4)


@st.composite
def pairs(draw: Any) -> tuple[Made, Made | float]:
    """Two tensors that can be broadcast, or a tensor and a number."""
    shape = draw(SHAPES)
    first = draw(tensors([draw(st.sampled_from([size, size, size, 1])) for size in shape]))
    if draw(st.integers(0, 4)) == 0:
        return first, 2.0
    return first, draw(tensors([draw(st.sampled_from([size, size, 1])) for size in shape[draw(st.integers(0, 1)) :]]))


def same(virtual: Any, real: Any) -> bool:
    return (virtual.shape, virtual.stride(), virtual.dtype) == (real.shape, real.stride(), real.dtype)


@given(pairs(), st.sampled_from(sorted(PAIRS)), st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=400, deadline=None)
def test_two_operands(pair: tuple[Made, Any], name: str, dtype: torch.dtype) -> None:
    one, other = pair
    run = PAIRS[name]
    real = run(one("cpu", dtype), other if isinstance(other, float) else other("cpu", dtype))
    with virtual_gpu.tensors():
        virtual = run(one("cuda", dtype), other if isinstance(other, float) else other("cuda", dtype))
    assert same(virtual, real), f"{virtual.stride()} is not {real.stride()}"


@given(SHAPES.flatmap(tensors), st.sampled_from(sorted(ONES)))
@settings(max_examples=150, deadline=None)
def test_one_operand(made: Made, name: str) -> None:
    real = ONES[name](made("cpu", torch.float32))
    with virtual_gpu.tensors():
        virtual = ONES[name](made("cuda", torch.float32))
    assert same(virtual, real), f"{virtual.stride()} is not {real.stride()}"


KNOWN: dict[str, Callable[[Any, Any], Any]] = {
    **PAIRS,
    "xor": lambda a, b: a ^ b,
    "shift": lambda a, b: a >> 1,
    "where": lambda a, b: torch.where(a > 1, a, b),
    "masked": lambda a, b: a.masked_fill(b > 1, 5),
    "clamp": lambda a, b: a.clamp(min=1),
    "remainder": lambda a, b: a % 3,
    "not": lambda a, b: a.bitwise_not(),
    "clone": lambda a, b: a.clone(),
    "float": lambda a, b: (a.float() * 0.5).round(),
    "filled": lambda a, b: torch.full([2, 3], 7, device=a.device),
    "counted": lambda a, b: torch.arange(2, 9, 3, device=a.device),
}


@given(pairs(), st.sampled_from(sorted(KNOWN)))
@settings(max_examples=300, deadline=None)
def test_values_that_are_known(pair: tuple[Made, Any], name: str) -> None:
    one, other = pair
    run = KNOWN[name]

    def made(device: str) -> Any:
        second = 2 if isinstance(other, float) else other(device, torch.int64) + 1
        if not isinstance(second, torch.Tensor) and name in ("where", "masked"):
            second = torch.full((), second, device=device)
        first = one(device, torch.int64)
        return run(first + first.new_tensor(2), second)

    real = made("cpu")
    with virtual_gpu.tensors():
        virtual = made("cuda")
    assert same(virtual, real), f"{virtual.stride()} is not {real.stride()}"
    assert virtual.known is not None and torch.equal(virtual.known, real)


def test_a_factory_called_by_names() -> None:
    with virtual_gpu.tensors():
        for given in ({"fill_value": 3}, {"fill_value": 3, "dtype": torch.int32}):
            small: Any = torch.ops.aten.full.default(size=[2], device="cuda", **given)
            large: Any = torch.ops.aten.full.default(size=[1 << 20], device="cuda", **given)
            assert small.known.tolist() == [3, 3] and large.known is None
        floats: Any = torch.ops.aten.full.default(size=[2], fill_value=3.0, device="cuda")
        assert floats.known is None and floats.dtype == torch.float32


def test_what_is_too_large_to_be_kept_is_not_computed() -> None:
    """A causal mask: thousands of positions beside as many."""
    with virtual_gpu.tensors():
        positions = torch.arange(3000, device="cuda")
        assert positions.known is not None  # type: ignore[attr-defined]
        mask: Any = positions[:, None] >= positions
        small: Any = positions[:5, None] >= positions
    assert mask.known is None and mask.shape == (3000, 3000) and mask.stride() == (3000, 1)
    assert small.known is not None and small.known.sum() == 15


@given(st.data(), SHAPES.filter(bool))
@settings(max_examples=150, deadline=None)
def test_joined(data: st.DataObject, shape: list[int]) -> None:
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    made = [data.draw(tensors([*shape[:dim], size, *shape[dim:][1:]])) for size in (shape[dim], 3)]
    real = torch.cat([make("cpu", torch.float32) for make in made], dim)
    with virtual_gpu.tensors():
        virtual = torch.cat([make("cuda", torch.float32) for make in made], dim)
    assert same(virtual, real), f"{virtual.stride()} is not {real.stride()}"


TYPES: dict[str, Callable[[Any], Any]] = {
    "halves and floats": lambda like: like(torch.bfloat16, 3, 4) * like(torch.float32, 4),
    "a float without dimensions": lambda like: like(torch.bfloat16, 3, 4) * like(torch.float32),
    "half without dimensions": lambda like: like(torch.bfloat16) * like(torch.float32, 3),
    "half times a number": lambda like: like(torch.float16, 3, 4) * 2.5,
    "integers": lambda like: like(torch.int64, 3, 4) * like(torch.int64, 4) + 7,
    "integers and a float": lambda like: like(torch.int64, 3, 4) * 2.5,
    "integers over integers": lambda like: like(torch.int64, 3, 4) / like(torch.int64, 4),
    "truth added": lambda like: like(torch.bool, 3, 4) + like(torch.bool, 4),
    "truth times floats": lambda like: like(torch.float32, 3, 4) * like(torch.bool, 4),
    "truth of both": lambda like: like(torch.bool, 3, 4) & like(torch.bool, 4),
    "bits": lambda like: like(torch.int64, 3, 4) ^ like(torch.int32, 4),
    "bits and a number": lambda like: like(torch.int32, 3, 4) & 0xFF,
    "integers compared": lambda like: like(torch.int64, 3, 4) <= like(torch.int32, 4),
    "product": lambda like: like(torch.bfloat16, 3, 4) @ like(torch.bfloat16, 5, 4).t(),
    "mean of a type": lambda like: like(torch.bfloat16, 3, 4).mean(-1, dtype=torch.float32),
    "joined": lambda like: torch.cat([like(torch.int64, 3, 4), like(torch.int32, 3, 1)], 1),
    "with a factor": lambda like: torch.add(like(torch.float32, 3, 4), like(torch.float32, 4), alpha=2),
    "nothing": lambda like: like(torch.float32, 0, 4) + like(torch.float32, 4),
}


@pytest.mark.parametrize("what", TYPES)
def test_types(what: str) -> None:
    def like(device: str) -> Any:
        # Larger than what is known of it, and cut: of values that nobody knows.
        return lambda dtype, *shape: torch.zeros(1 << 17, device=device).to(dtype)[: shape_size(shape)].view(shape)

    real = TYPES[what](like("cpu"))
    with virtual_gpu.tensors():
        virtual = TYPES[what](like("cuda"))
    assert virtual.known is None and same(virtual, real)


def shape_size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


REFUSED: dict[str, Callable[[Any], Any]] = {
    "a sum": lambda like: like(3) + like(4),
    "a product": lambda like: torch.mm(like(3, 4), like(3, 4)),
    "a product of vectors": lambda like: torch.mm(like(4), like(4)),
    "joined": lambda like: torch.cat([like(3, 4), like(3, 5)]),
    "nothing joined": lambda like: torch.cat([]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_does_not_fit_is_torchs_to_refuse(what: str) -> None:
    with (
        virtual_gpu.tensors(),
        pytest.raises((TraceError, RuntimeError, ValueError), match=r"shape|siz|matrix|list"),
    ):
        REFUSED[what](lambda *shape: torch.zeros(*shape, device="cuda"))


def test_values_that_are_known_stay_known() -> None:
    with virtual_gpu.tensors():
        positions = torch.arange(6, device="cuda").view(2, 3)
        assert (positions * 2 + 1)[1].tolist() == [7, 9, 11]
        assert torch.cat([positions, positions])[2].tolist() == [0, 1, 2]
        assert float((torch.full((3,), 2, dtype=torch.int64, device="cuda") / 4).sum()) == 1.5
        table = torch.arange(torch_tensor.KNOWN_FLOATS + 1, device="cuda")
        assert table.known is not None and table.float().known is None  # type: ignore[attr-defined]


def test_the_short_way_is_taken() -> None:
    """Or all of the above would hold without it."""
    before = torch_shortcuts._ordered.cache_info()
    with virtual_gpu.tensors():
        torch.zeros(5, 7, 11, device="cuda").transpose(0, 1) * torch.zeros(5, 11, device="cuda")
    after = torch_shortcuts._ordered.cache_info()
    assert after.hits + after.misses > before.hits + before.misses
