"""Kernels that compilers other than Triton and Inductor build: counted by name, and not prevented.

That the compilers have these functions is what `tools/check_vllm --compilers` holds, against the wheels that vLLM asks for.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from aot_cache.runtime.session import Session
from aot_cache.upstream.hooks import vllm_compilers

FAKES = {
    "flashinfer/jit/core.py": "def run_ninja(workdir, ninja_file, verbose):\n    return workdir\n",
    "tilelang/jit/kernel.py": (
        "class JITKernel:\n    def _compile_and_create_adapter(self, tilelang_func, out_idx):\n        return out_idx\n"
    ),
    "cutlass/base_dsl/dsl.py": (
        "class BaseDSL:\n"
        "    def compile_and_cache(self, module, module_hash, function_name, pipeline):\n        return pipeline\n"
    ),
}


@pytest.fixture
def session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name, text in FAKES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True)
        for folder in (file.parent, file.parent.parent):
            (folder / "__init__.py").touch()
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    roots = {name.split("/")[0] for name in FAKES}
    for name in [name for name in sys.modules if name.split(".")[0] in roots]:
        monkeypatch.delitem(sys.modules, name)
    session = Session(lambda _: None)
    session.arm()
    yield session
    session.disarm()
    for name in [name for name in sys.modules if name.split(".")[0] in roots]:
        del sys.modules[name]


def test_each_is_counted_by_name(session: Session) -> None:
    core, kernel, dsl = (
        importlib.import_module(name) for name in ("flashinfer.jit.core", "tilelang.jit.kernel", "cutlass.base_dsl.dsl")
    )
    function = SimpleNamespace(attrs={"global_symbol": "main"})
    assert core.run_ninja(Path("/cache/sampling"), Path("x"), verbose=False) == Path("/cache/sampling")
    assert kernel.JITKernel()._compile_and_create_adapter(function, [1]) == [1]
    session.ledger.seal()
    assert dsl.BaseDSL().compile_and_cache("module", "hash", function_name="gemm", pipeline="p") == "p"
    found = session.stats()
    assert found["total"]["other_compile"] == 3 and found["after_seal"]["other_compile"] == 1
    names = [event["name"] for event in found["events"] if event["kind"] == "other_compile"]
    assert names == ["FlashInfer: sampling", "TileLang: main", "CuTe DSL: gemm"]
    session.disarm()
    core.run_ninja(Path("/cache/sampling"), Path("x"), verbose=False)
    assert session.stats()["total"]["other_compile"] == 3


def test_a_release_without_the_function_is_left_alone(session: Session, tmp_path: Path) -> None:
    (tmp_path / "tilelang" / "jit" / "kernel.py").write_text("class JITKernel: ...\n")
    assert (
        vars(importlib.import_module("tilelang.jit.kernel").JITKernel)
        .keys()
        .isdisjoint({"_compile_and_create_adapter"})
    )


def test_each_compiler_is_one_line_of_the_table() -> None:
    assert [one.name for one in vllm_compilers.COMPILERS] == ["FlashInfer", "TileLang", "CuTe DSL"]
