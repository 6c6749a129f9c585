"""What SGLang's kernel libraries compile outside of Triton does nothing here: sgl-kernel, FlashInfer, CuTe DSL, its own C++.

Their Python code allocates what they write to, so that running nothing is enough. None of it is in a bundle.

Upstream: `sgl_kernel` (operators in C++; those that return nothing need no rule), SGLang's `load_jit`
(`sglang/kernels/jit/utils/compile/loader.py`, up to 0.5.16 `sglang/jit_kernel/utils/compile.py`), FlashInfer's
`flashinfer/jit/core.py` (`JitSpec.build_and_load`), CuTe DSL's `cutlass/base_dsl/compiler.py` (`CompileCallable`, which is
`cute.compile`), SGLang's `sglang/srt/layers/deep_gemm_wrapper/entrypoint.py` and
`sglang/srt/model_executor/runner_backend_utils/breakable_cuda_graph` (`_is_stream_capturing`), which ask the driver.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

from aot_cache.upstream.virtual import flash_attention, operator_rules

LOADERS = ("sglang.kernels.jit.utils.compile.loader", "sglang.jit_kernel.utils.compile")
DEEP_GEMM = "sglang.srt.layers.deep_gemm_wrapper.entrypoint"
GRAPHS = "sglang.srt.model_executor.runner_backend_utils.breakable_cuda_graph.breakable_cuda_graph"
_OPERATORS = ("sgl_kernel", "sgl_kernel.flash_attn")


class Nothing:
    """A compiled kernel, or a module of them: what is called does nothing."""

    def __call__(self, *_: Any, **__: Any) -> None: ...

    def plan(self, *_: Any, **__: Any) -> list[int]:
        """FlashInfer hands a plan back to its kernels, and nobody else reads it."""
        return []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # no protocol of Python's: it is no tensor and no sequence
            raise AttributeError(name)
        return Nothing()


def run_nothing() -> None:
    """Replace all compilers of kernels but Triton and Inductor. To be called before SGLang's kernels are imported."""
    for module, owner, name in _PLACES:
        with contextlib.suppress(ImportError, AttributeError):
            _replace(getattr(importlib.import_module(module), owner), name, lambda *_, **__: Nothing())
    for module in LOADERS:
        with contextlib.suppress(ImportError):
            everywhere(importlib.import_module(module).load_jit, lambda *_, **__: Nothing())
    with contextlib.suppress(ImportError):  # asks the driver how many multiprocessors there are
        everywhere(importlib.import_module(DEEP_GEMM).update_deep_gemm_config, lambda *_: None)
    with contextlib.suppress(ImportError):  # no stream beside the captured one has anything to wait for
        graphs: Any = importlib.import_module(GRAPHS)
        graphs._is_stream_capturing = lambda stream: False
    for module in _OPERATORS:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    operator_rules.add(_RULES)


_PLACES = (
    ("flashinfer.jit.core", "JitSpec", "build_and_load"),
    ("cutlass.base_dsl.compiler", "CompileCallable", "__call__"),
)
"""Module, class and method of other compilers, which may not be installed."""


def _replace(owner: Any, name: str, by: Callable[..., Any]) -> None:
    for one in (owner, *_subclasses(owner)):
        if name in vars(one):
            setattr(one, name, by)


def _subclasses(owner: Any) -> Iterator[Any]:
    for one in owner.__subclasses__():
        yield one
        yield from _subclasses(one)


def everywhere(function: types.FunctionType, by: Callable[..., Any]) -> None:
    """Replace a function of SGLang's, also where it was imported from its module by name."""
    for name, module in list(sys.modules.items()):
        if name.startswith("sglang.") and vars(module).get(function.__name__) is function:
            setattr(module, function.__name__, by)


_RULES: dict[str, Callable[..., Any]] = {
    "sgl_kernel::fwd": flash_attention.forward_3,
    "sgl_kernel::get_scheduler_metadata": flash_attention.metadata_3,
    "sgl_kernel::weak_ref_tensor": operator_rules.same,
}
"""SGLang itself registers those of quantized products."""
