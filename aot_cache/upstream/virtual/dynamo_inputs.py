"""Prepare Dynamo for a call before it traces the call.

Upstream: `torch/_dynamo/decorators.py` (`mark_dynamic`, `mark_unbacked`), `torch.compiler.config.dynamic_sources`,
`torch/fx/experimental/symbolic_shapes.py` (`StrictMinMaxConstraint`; in newer releases
`ShapeEnv.transfer_symbols_from_foreign_shape_env`, called for fake tensors by `torch/_subclasses/meta_utils.py`).
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import types
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import torch
import torch._dynamo as dynamo
from torch._dynamo import bytecode_transformation, config
from torch._dynamo.output_graph import OutputGraph, get_builtins_dict
from torch.fx.experimental.symbolic_shapes import ShapeEnv, StrictMinMaxConstraint

from aot_cache.upstream.hooks.dynamo_frames import Frame
from aot_cache.upstream.virtual.torch_fake import HostMode

BUILTINS = "__aot_builtins__"


def alias_of(module: str) -> str:
    """The global name under which Dynamo's guards and bytecode use an imported module."""
    return f"__import_{module.replace('.', '_dot_')}"


Dynamic = Mapping[str, Sequence[Sequence[int]]]
"""Expression → [dimension, low, high] for each size that changes; dimension -1 is an integer argument."""


@contextlib.contextmanager
def session(dynamic: Dynamic, most_graphs: int) -> Iterator[None]:
    """Dynamo's settings for tracing the calls of one signature, in a process that has traced nothing else."""
    integers = ",".join(path for path, dims in dynamic.items() if dims[0][0] < 0)
    with (
        _lasting_names(),
        _ranges_may_split(),
        _unbacked_sizes_of_virtual_tensors(),
        config.patch(
            recompile_limit=most_graphs,
            accumulated_recompile_limit=8 * most_graphs,
            fail_on_recompile_limit_hit=True,
            automatic_dynamic_shapes=False,  # dynamic sizes are known beforehand
            suppress_errors=False,
        ),
    ):
        compiler: Any = torch.compiler.config
        with compiler.patch(dynamic_sources=integers):
            yield


@contextlib.contextmanager
def _lasting_names() -> Iterator[None]:
    """Give Dynamo's globals names that are valid in every process, and the same in every build.

    Dynamo numbers the global for the builtins, and those for modules that a guard or bytecode needs; in the serving process
    such a number may be taken. Modules get an alias made from their name, as imported ones have. Names of graphs come from
    uuid4 and end up in the artifact, so uuid4 is replaced by a constant.
    """
    graph: Any = OutputGraph
    original, by_id = graph.install_builtins_dict_in_fglobals, graph.install_global_by_id

    def install(self: Any) -> str:
        self.global_scope.setdefault(BUILTINS, get_builtins_dict(self.global_scope))
        return BUILTINS

    def install_global_by_id(self: Any, prefix: str, value: Any) -> str:
        if not isinstance(value, types.ModuleType):
            return str(by_id(self, prefix, value))
        alias = alias_of(value.__name__)
        self.global_scope.setdefault(alias, value)
        if self.package is not None:
            self.package.add_import_source(alias, value.__name__)
        return alias

    graph.install_builtins_dict_in_fglobals, graph.install_global_by_id = install, install_global_by_id
    names: Any = bytecode_transformation
    lots = names.uuid
    names.uuid = types.SimpleNamespace(uuid4=lambda: uuid.UUID(int=0))
    try:
        yield
    finally:
        graph.install_builtins_dict_in_fglobals, graph.install_global_by_id = original, by_id
        names.uuid = lots


@contextlib.contextmanager
def _ranges_may_split() -> Iterator[None]:
    """Let code branch within the bounds of a marked dimension. Such a graph serves a part of the range, and a point outside
    that part is traced again. Upstream raises an error, because it takes the bounds as a promise."""
    constraint: Any = StrictMinMaxConstraint
    start = constraint.__init__

    def __init__(self: Any, **fields: Any) -> None:
        start(self, **{**fields, "warn_only": True})

    constraint.__init__ = __init__
    try:
        yield
    finally:
        constraint.__init__ = start


@contextlib.contextmanager
def _unbacked_sizes_of_virtual_tensors() -> Iterator[None]:
    """Trace sizes that the program marks as unbacked as such. Upstream makes constants of a fake tensor's sizes, if they are
    numbers, whatever the marks say: one graph for each size, which a server would not find with its real tensors."""
    env: Any = ShapeEnv
    original = getattr(env, "transfer_symbols_from_foreign_shape_env", None)
    if original is None:  # this release does with them as with real tensors
        yield
        return

    def transfer(self: Any, sizes: Any, strides: Any, offset: Any, source: Any, **more: Any) -> Any:
        if any(isinstance(size, torch.SymInt) for size in (*sizes, *strides, offset)):
            return original(self, sizes, strides, offset, source, **more)
        return self._create_symbolic_sizes_strides_storage_offset(
            sizes, strides, offset, [False] * len(sizes), source, **more
        )

    env.transfer_symbols_from_foreign_shape_env = transfer
    try:
        yield
    finally:
        env.transfer_symbols_from_foreign_shape_env = original


def mark(frame: Frame, dynamic: Dynamic) -> None:
    """Mark the dimensions of a call's tensors that change, with their bounds."""
    for path, dims in dynamic.items():
        value = _get(frame, path)
        if isinstance(value, torch.Tensor):
            for dim, low, high in dims:
                dynamo.mark_dynamic(value, dim, min=low, max=high)


def _get(frame: Frame, path: str) -> Any:
    # The paths are our own (`builder.call_signatures`), built from names in the call's structure.
    return eval(path, {"L": frame.f_locals})  # noqa: S307


def forget() -> None:
    """Make Dynamo forget what it has traced in this process."""
    dynamo.reset()


def warm_up(device: str) -> None:
    """Import and initialise what every compile needs, once, before children are forked."""
    from aot_cache.upstream.hooks import inductor_artifact, inductor_cpp

    if device == "cpu":
        inductor_cpp.find_vector_instructions()

    @torch.compile
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    def keep(_wrapper: Any, backend: Any, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        backend(graph, inputs, **kwargs)
        return graph.forward

    with HostMode(device), torch.no_grad(), inductor_artifact.instead(keep):
        double(torch.empty(8, 8, device=device))
    dynamo.reset()


@cache
def module_of(code: types.CodeType) -> str | None:
    """The imported module that defines `code`; None for torch, the standard library and generated code."""
    path = os.path.realpath(code.co_filename)
    roots = (os.path.dirname(os.path.realpath(torch.__file__)), os.path.realpath(sysconfig.get_paths()["stdlib"]))
    site = os.path.realpath(sysconfig.get_paths()["purelib"])
    if path.startswith(roots[0]) or (path.startswith(roots[1]) and not path.startswith(site)):
        return None
    return _files(len(sys.modules)).get(path)


@cache
def _files(_imported: int) -> dict[str, str]:
    """File → module, for all imported modules. Recomputed when their number changes."""
    found: dict[str, str] = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__dict__", {}).get("__file__")  # not `getattr`: lazy modules would import something
        if isinstance(file, str):
            found.setdefault(os.path.realpath(file), name)
    return found
