"""aot_cache.upstream.codec.inductor_source and inductor_later: what loading and calling a graph does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aot_cache.upstream.codec import inductor_source
from aot_cache.upstream.hooks import inductor_later

pytestmark = pytest.mark.contract("inductor_source", "inductor_later")
ROOT = Path(__file__).parents[1]

HEADER = """# AOT ID: ['0_inference']
import torch
from torch._inductor.hooks import run_intermediate_hooks
from torch._inductor.codegen.memory_planning import _align as align
from torch import device, empty_strided
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.select_algorithm import extern_kernels

aten = torch.ops.aten
async_compile = AsyncCompile()
"""
UNUSED = ("run_intermediate_hooks", "align", "extern_kernels")


def test_what_is_not_used_is_not_imported() -> None:
    found = inductor_source.lean(HEADER)
    assert not any(name in found for name in UNUSED)
    kept = [line for line in HEADER.splitlines() if not any(name in line for name in UNUSED)]
    assert found.splitlines() == kept


def test_plain_library_calls_are_those_of_torch() -> None:
    found = inductor_source.lean(HEADER + "extern_kernels.mm(a, b, out=c)\nextern_kernels.addmm(a, b, c)\n")
    assert "from aot_cache.upstream.codec.inductor_source import extern_kernels\n" in found
    assert "select_algorithm" not in found


USED = {
    "extern_kernels.bias_addmm(a, b, c)": "from torch._inductor.select_algorithm import extern_kernels",
    "x = align(3)": "from torch._inductor.codegen.memory_planning import _align as align",
}


@pytest.mark.parametrize("used", USED)
def test_what_is_used_is_imported_as_upstream_has_it(used: str) -> None:
    assert USED[used] in inductor_source.lean(f"{HEADER}{used}\n").splitlines()


@pytest.mark.parametrize("name", vars(inductor_source.extern_kernels))
def test_library_calls_are_what_upstream_registers(name: str) -> None:
    """The contract: upstream's own object of that name is the plain function."""
    import torch._inductor.kernel  # noqa: F401 - registers them
    from torch._inductor.select_algorithm import extern_kernels

    assert getattr(extern_kernels, name) is getattr(inductor_source.extern_kernels, name)


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wrapping_does_not_import_the_compiler_and_answers_as_before() -> None:
    said = run("""
import sys, torch, torch._dynamo
from aot_cache.upstream.hooks import inductor_later
undo = inductor_later.import_when_compiling()
mine = torch.compile(lambda x: x, options={"epilogue_fusion": False})
before = "torch._inductor.compile_fx" in sys.modules
found = mine.get_compiler_config()
undo()
wanted = torch.compile(lambda x: x, options={"epilogue_fusion": False}).get_compiler_config()
print(before, dict(found) == wanted, found["epilogue_fusion"], len(found) == len(wanted))
""")
    assert said.split() == ["False", "True", "False", "True"]


def test_debug_is_the_real_one_for_whoever_wants_it() -> None:
    said = run("""
import sys, torch, torch._inductor
from aot_cache.upstream.hooks import inductor_later
inductor_later.call_without_debug()
standing_in = torch._inductor.debug
print(standing_in.RECORD_GRAPH_EXECUTION, "torch._inductor.debug" in sys.modules)
from torch._inductor import debug
print(debug.DebugContext is sys.modules["torch._inductor.debug"].DebugContext, torch._inductor.debug is not standing_in)
print(standing_in.RECORD_GRAPH_EXECUTION == torch._inductor.debug.RECORD_GRAPH_EXECUTION)
""")
    assert said.split() == ["False", "False", "True", "True", "True"]


def test_a_mapping_is_made_once_and_late() -> None:
    made = []
    later = inductor_later.Later(lambda: made.append(1) or {"a": torch.float32})  # type: ignore[func-returns-value]
    assert made == []
    assert dict(later) == {"a": torch.float32} and len(later) == 1 and made == [1]
