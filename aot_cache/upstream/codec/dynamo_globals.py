"""The surroundings of Dynamo's bytecode: global names that it uses, modes and settings that it was made under.

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
    # How compiling is done, by whom and with what notes, not what comes out of it.
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
    # Backends that `torch.compile` does not use for the targets of aot-cache's table.
    "halide.",
    "xpu.",
    "tpu_",
    "cutlass.",
    "cuda.cutlass",
    "rocm.",
    "cpp.cxx",
)
"""Settings that do not count, by their beginnings."""


def install_modules(imports: Mapping[str, str], f_globals: dict[str, Any]) -> None:
    """Modules that bytecode and guards call by an alias of Dynamo's."""
    for alias, module in imports.items():
        f_globals.setdefault(alias, importlib.import_module(module))


def prepare_modules(modules: Iterable[str]) -> None:
    """What Dynamo does when it first looks into a package (`trace_rules.add_module_init_func`): einops fills a registry
    on which guards depend."""
    waiting: Any = trace_rules._lazy_module_init
    for package in {module.partition(".")[0] for module in modules}:
        if package in waiting and package in sys.modules:
            for prepare in waiting.pop(package):
                prepare()


def install_resume(name: str, code: types.CodeType, module: str, free: bool) -> None:
    """The function that goes on after a graph break, among the globals of `module`."""
    f_globals = sys.modules[module].__dict__
    if name in f_globals:
        return

    def with_closure(closure: tuple[types.CellType, ...]) -> types.FunctionType:
        return types.FunctionType(code, f_globals, name, None, closure)

    f_globals[name] = with_closure if free else types.FunctionType(code, f_globals, name)


def not_traced(function: Any) -> Any:
    """`function`, into which Dynamo does not look."""
    disable: Any = torch._dynamo.disable
    return disable(function, reason="a compiled graph")


def mode() -> str:
    """The grad mode in force: `inference`, `no_grad` or `grad`."""
    if torch.is_inference_mode_enabled():
        return "inference"
    return "grad" if torch.is_grad_enabled() else "no_grad"


def settings() -> str:
    """Inductor's settings that its code depends on, as JSON: name → value as text."""
    from torch._inductor import config

    return _settings(config.get_hash())


@lru_cache(maxsize=4)
def _settings(_hash: bytes) -> str:
    from torch._inductor import config

    values = {name: repr(v) for name, v in config.save_config_portable().items() if not name.startswith(_HOW)}
    return json.dumps(values, sort_keys=True)


def bound_to(target: Mapping[str, Json]) -> dict[str, Json]:
    """What graphs made in this process are bound to; see `key.graph_parts`."""
    return graph_parts(
        torch=torch_release.release(),
        git=torch_release.git(),
        python=f"{sys.version_info.major}.{sys.version_info.minor}",
        triton="" if target["backend"] == "cpu" else str(installed("triton") or ""),
        target=dict(target) if target["backend"] != "cpu" else {"backend": "cpu", "isa": torch_release.cpu_isa()},
    )
