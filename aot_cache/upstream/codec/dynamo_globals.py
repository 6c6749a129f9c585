"""The environment of Dynamo's bytecode: the globals that it uses, and the modes and settings under which it was compiled.

Upstream: `torch/_dynamo/output_graph.py` (`install_global_unsafe`, `install_resume_function_global`),
`torch/_dynamo/package.py` (`CompilePackage.install`), `torch/_inductor/config.py`.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import torch
import torch._dynamo
from torch._dynamo import trace_rules

from aot_cache.artifact.key import graph_parts
from aot_cache.tested import installed
from aot_cache.upstream.codec import torch_release

Json = Any

_HOW = (
    # How compilation runs, and what it logs; no influence on the generated code.
    "compile_threads",
    "worker_",
    "torchinductor_worker",
    "quiesce_",
    "log_",
    "profile_bandwidth",
    "autotune_num_choices",
    "aot_inductor",
    "test_configs",
    "TYPE_CHECKING",
    # Backends that `torch.compile` does not use for aot-cache's targets.
    "halide.",
    "xpu.",
    "tpu_",
    "cutlass.",
    "cuda.cutlass",
    "rocm.",
    "cpp.cxx",
)
"""Prefixes of settings that are not compared."""


def install_modules(imports: Mapping[str, str], f_globals: dict[str, Any]) -> None:
    """Import the modules that bytecode and guards use under an alias made by Dynamo, and add the aliases to the globals."""
    for alias, module in imports.items():
        f_globals.setdefault(alias, importlib.import_module(module))


def prepare_modules(modules: Iterable[str]) -> None:
    """Run the functions that Dynamo calls when it first traces into a package (`trace_rules.add_module_init_func`): einops
    fills a registry on which guards depend."""
    waiting: Any = trace_rules._lazy_module_init
    for package in {module.partition(".")[0] for module in modules}:
        if package in waiting and package in sys.modules:
            for prepare in waiting.pop(package):
                prepare()


def install_resume(name: str, code: types.CodeType, module: str, free: bool) -> None:
    """Add a resume function (the code after a graph break) to the globals of `module`."""
    f_globals = sys.modules[module].__dict__
    if name in f_globals:
        return

    def with_closure(closure: tuple[types.CellType, ...]) -> types.FunctionType:
        return types.FunctionType(code, f_globals, name, None, closure)

    f_globals[name] = with_closure if free else types.FunctionType(code, f_globals, name)


def not_traced(function: Any) -> Any:
    """`function`, wrapped so that Dynamo does not trace into it."""
    disable: Any = torch._dynamo.disable
    return disable(function, reason="a compiled graph")


def mode() -> str:
    """The current grad mode: `inference`, `no_grad` or `grad`."""
    if torch.is_inference_mode_enabled():
        return "inference"
    return "grad" if torch.is_grad_enabled() else "no_grad"


def settings() -> str:
    """The Inductor settings that affect generated code, as JSON: name → `repr` of the value."""
    from torch._inductor import config

    return _settings(config.get_hash())


@lru_cache(maxsize=4)
def _settings(_hash: bytes) -> str:
    from torch._inductor import config

    values = {name: repr(v) for name, v in config.save_config_portable().items() if not name.startswith(_HOW)}
    return json.dumps(values, sort_keys=True)


def bound_to(target: Mapping[str, Json]) -> dict[str, Json]:
    """The key parts to which graphs compiled in this process are bound (see `key.graph_parts`)."""
    return graph_parts(
        torch=torch_release.release(),
        git=torch_release.git(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        triton="" if target["backend"] == "cpu" else str(installed("triton") or ""),
        target=dict(target) if target["backend"] != "cpu" else {"backend": "cpu", "isa": torch_release.cpu_isa()},
    )
