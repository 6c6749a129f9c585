"""What a kernel may write to is not known afterwards: read from its source, and compared with what torch finds in Triton's IR."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import sample_writes as sample
import torch
from torch._higher_order_ops import triton_kernel_wrap

from aot_cache.builder import virtual_gpu
from aot_cache.errors import DataDependent
from aot_cache.upstream.codec import triton_jit, triton_writes
from aot_cache.upstream.hooks.triton_launches import LaunchLog, intercept_launch

POINTERS = {"x", "y", "z", "index", "count"}


@pytest.mark.contract("triton_writes")
@pytest.mark.parametrize("kernel", sample.KERNELS, ids=lambda kernel: kernel.__name__)
def test_it_is_read_from_the_source(kernel: Any) -> None:
    assert triton_writes.written_by(kernel) & POINTERS == sample.KERNELS[kernel]


def written_by_torch(kernel: Any, given: dict[str, Any]) -> set[str]:
    if hasattr(triton_kernel_wrap, "identify_mutated_tensors"):  # up to torch 2.11
        return set(triton_kernel_wrap.identify_mutated_tensors(kernel, given, {}))
    return {one.name for one in triton_kernel_wrap.identify_accessed_tensors(kernel, given, {}).read_writes.writes}


@pytest.mark.contract("triton_writes")
@pytest.mark.parametrize("kernel", sample.KERNELS, ids=lambda kernel: kernel.__name__)
def test_triton_s_ir_writes_to_nothing_else(kernel: Any) -> None:
    """torch reads it from Triton's IR, for one specialization, and says "all" where it cannot tell."""
    with torch._subclasses.FakeTensorMode():
        given = {
            name: torch.zeros(64, dtype=torch.int32, device="cpu") if name in POINTERS else 16
            for name in kernel.arg_names
        }
        found = written_by_torch(kernel, given)
    pointers = {name for name in kernel.arg_names if name in POINTERS}
    # torch also follows values that a called function has loaded.
    found -= {"index"} if kernel is sample.by_a_function else set()
    assert found & sample.KERNELS[kernel] or not sample.KERNELS[kernel], "it finds nothing"
    assert found & pointers <= triton_writes.written_by(kernel) or found >= pointers


@pytest.mark.contract("triton_writes")
def test_tables_of_a_kernel_library_are_only_read() -> None:
    """fla's kernels read sequences and chunks from tables that host code knows; they must stay known."""
    rooms = ("common.chunk_delta_h", "common.chunk_o", "gated_delta_rule.fused_recurrent", "utils.cumsum")
    found = 0
    for room in rooms:
        module = importlib.import_module(f"fla.ops.{room}")
        for value in vars(module).values():
            kernel = triton_jit.unwrap(value) if hasattr(value, "fn") else None
            if kernel is None or kernel.fn.__module__ != module.__name__:
                continue
            found += 1
            written = triton_writes.written_by(kernel)
            assert not written & {"cu_seqlens", "chunk_indices", "chunk_offsets"}, kernel
            assert written & {"o", "h", "dq", "dh", "dv", "ht"}, kernel
    assert found >= 8


def launch(kernel: Any, *arguments: Any, **more: Any) -> None:
    with intercept_launch(LaunchLog(), virtual_gpu.kernel_was_launched):
        kernel[(1,)](*arguments, **more)


def test_what_a_kernel_wrote_is_not_known() -> None:
    with virtual_gpu.tensors():
        x, y, index = (torch.tensor([1, 2, 3, 4], device="cuda") for _ in range(3))
        view = y[1:]
        launch(sample.by_a_function, x, y, index, B=4)
        assert x.tolist() == index.tolist() == [1, 2, 3, 4]
        for written in (y, view):
            with pytest.raises(DataDependent):
                written.tolist()
        launch(sample.by_a_name, B=4, index=index, y=x, x=index)
        assert index.tolist() == [1, 2, 3, 4]
        with pytest.raises(DataDependent):
            x.tolist()
