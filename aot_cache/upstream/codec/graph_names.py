"""What the pickles, imports and bytecode of a graph may name: what graphs contain, and nothing else.

Unpickling calls what a pickle names, and importing runs a module. So where nothing proves a bundle (no pinned digest, no
signature), its pickles are read with stand-ins, which do nothing, before torch unpickles them. This is no sandbox: an artifact
also holds source and machine code, which run. It keeps what only looks like a graph from running.

Upstream: `torch/_dynamo/package.py` (`load_guards_state`), `torch/_dynamo/aot_compile_types.py`
(`BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts`): both unpickle whatever is named.
"""

from __future__ import annotations

import dis
import enum
import importlib
import io
import pickle  # noqa: TID251  # with stand-ins only
import re
import sys
import types
from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

from aot_cache.errors import Untrusted

_HINT = "pin the bundle's digest (AOT_CACHE_DIGEST) if you built it yourself"

_CLASSES_OF = frozenset(
    {
        "sympy.core.add",
        "sympy.core.mul",
        "sympy.core.numbers",
        "sympy.core.power",
        "sympy.core.relational",
        "sympy.core.symbol",
        "sympy.logic.boolalg",
        "torch._dynamo.source",
        "torch._functorch._aot_autograd.aot_autograd_result",
        "torch._functorch._aot_autograd.descriptors",
        "torch._functorch._aot_autograd.functional_utils",
        "torch._functorch._aot_autograd.runtime_wrappers",
        "torch._functorch._aot_autograd.schemas",
        "torch._functorch._aot_autograd.subclass_utils",
        "torch._guards",
        "torch._inductor.cudagraph_utils",
        "torch._inductor.remote_cache",
        "torch._inductor.runtime.autotune_cache",
        "torch._inductor.runtime.hints",
        "torch._inductor.triton_bundler",
        "torch.distributed.tensor._dtensor_spec",
        "torch.distributed.tensor.placement_types",
        "torch.utils._ordered_set",
        "torch.utils._sympy.functions",
        "torch.utils._sympy.value_ranges",
    }
)
"""Modules of which a pickle may name every class: they hold data."""

_NAMES = {
    "aot_cache.upstream.codec.dynamo_guards": "_operator",
    "builtins": "bool bytes complex dict float frozenset int list range set slice str tuple",
    "collections": "Counter OrderedDict defaultdict deque",
    "functools": "partial",
    "inspect": "Parameter Signature _ParameterKind _empty",
    "torch": "Size SymBool SymFloat SymInt device",
    "torch._C._dynamo.guards": "GlobalStateGuard",
    "torch._dynamo.guards": "GuardsState ShapeCodeParts",
    "torch._dynamo.output_graph": "OutputGraphGuardsState",
    "torch._inductor.decomposition": "select_decomp_table",
    "torch._inductor.metrics": "CachedMetricsDeltas",
    "torch._inductor.output_code": "CompiledFxGraph",
    "torch._inductor.runtime.coordinate_descent_tuner": "CoordescTuner",
    "torch._inductor.runtime.static_triton_launcher": "StaticallyLaunchedCudaKernel StaticallyLaunchedXpuKernel",
    "torch._inductor.runtime.triton_heuristics": "CachingAutotuner InductorConfig StaticTritonCompileResult _ConstRepr",
    "torch._inductor.utils": "BoxedBool",
    "torch._library.fake_class_registry": "FakeScriptObject",
    "torch._subclasses.functional_tensor": "FunctionalTensor",
    "torch.compiler._cache": "CacheArtifactRecorder",
    "torch.distributed.device_mesh": "DeviceMesh",
    "torch.fx.experimental.symbolic_shapes": "SymIntEqByExpr _ShapeGuardsHelper",
    "torch.fx.graph_module": "reduce_graph_module",
    "torch.serialization": "_get_layout",
    "torch.utils._device": "DeviceContext",
    "triton.language.core": "constexpr",
    "triton.runtime.autotuner": "Config",
    "triton.runtime.jit": "JITFunction KernelParam",
}
_ALLOWED = frozenset((module, name) for module, names in _NAMES.items() for name in names.split())

_ATTRIBUTES = frozenset(
    {
        (("torch._inductor.runtime.autotune_cache", "AutotuneCache"), "save"),
        (("triton.runtime.jit", "JITFunction"), "create_binder"),
    }
)
"""The only uses of `getattr` in a pickle: methods of what it holds."""

_CLASS = re.compile(r"_?[A-Z]\w*", re.ASCII)
_METHOD = re.compile(r"GuardBuilder\.[A-Z_]+", re.ASCII)


class _StandIn:
    """Does nothing, whatever is done with it. Each name in a pickle has a subclass of its own."""

    stands_for = ("", "")

    def __new__(cls, *_: object, **__: object) -> _StandIn:
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> _StandIn:
        return _StandIn()

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, *_: object) -> None: ...

    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...

    def add(self, _: object) -> None: ...


class _Names(pickle.Unpickler):
    """Reads a pickle as torch does, and calls stand-ins only."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.found: set[tuple[str, str]] = set()
        self.attributes: set[tuple[tuple[str, str], str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return self._getattr
        self.found.add((module, name))
        return type("_StandIn", (_StandIn,), {"stands_for": (module, name)})

    def _getattr(self, owner: Any, name: str, *_: object) -> _StandIn:
        self.attributes.add((getattr(owner, "stands_for", ("", "")), str(name)))
        return _StandIn()

    def persistent_load(self, _: object) -> _StandIn:
        return _StandIn()


def require_pickle(data: bytes, whose: str) -> None:
    """Check the names in a pickle. Nothing that it names is called, and only modules of imported packages are imported.

    Raises:
        Untrusted: it names what no graph contains, or is no pickle.
    """
    names = _Names(data)
    try:
        names.load()
    except Exception as error:
        raise Untrusted(f"{whose} cannot be unpickled: {type(error).__name__}: {error}", hint=_HINT) from error
    strange = [f"{module}.{name}" for module, name in sorted(names.found) if not _is_allowed(module, name)]
    strange += [f"{'.'.join(owner)}.{name}" for owner, name in sorted(names.attributes - _ATTRIBUTES)]
    if strange:
        raise Untrusted(f"{whose} names {strange[0][:200]}, which no graph contains", hint=_HINT)


def _is_allowed(module: str, name: str) -> bool:
    if (module, name) in _ALLOWED:
        return True
    if module in _CLASSES_OF:
        return bool(_CLASS.fullmatch(name))
    if module == "torch._dynamo.guards":
        return bool(_METHOD.fullmatch(name))
    if module.startswith("torch._C."):  # of a view: `torch._C._functionalization.slice_Tensor_ViewMeta`
        return name.endswith("ViewMeta") or name == "InverseReturnMode"
    torch = sys.modules["torch"]
    if name.startswith("torch.") and getattr(sys.modules.get(module), "torch", None) is torch:
        module, name = (
            "torch",
            name.removeprefix("torch."),
        )  # `torch.channels_last`, found in the first module that has it
    found = _found(module, name)
    if module == "torch" and isinstance(found, (torch.dtype, torch.layout, torch.memory_format)):
        return True
    # Users' tensors, and what they consist of: `torchao.quantization.Int8Tensor`.
    return isinstance(found, type) and (issubclass(found, (torch.Tensor, tuple, enum.Enum)) or is_dataclass(found))


def _found(module: str, name: str) -> Any:
    """A class or another attribute of a module whose package the process has imported; else None."""
    if not is_imported(module) or "." in name:
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # a module that cannot be imported here
        return None


def is_imported(module: str) -> bool:
    """Whether the process has imported a module or its package: importing it then runs no package that it does not use."""
    return module in sys.modules or module.partition(".")[0] in sys.modules.keys() - sys.stdlib_module_names


def require_modules(modules: Iterable[str], whose: str) -> None:
    """Check the modules that a graph imports.

    Raises:
        Untrusted: one is of a package that the process has not imported.
    """
    for module in modules:
        if not is_imported(module):
            raise Untrusted(f"{whose} imports {module}, which this process has not imported", hint=_HINT)


_RUNS_TEXT = frozenset({"__builtins__", "__import__", "breakpoint", "eval", "exec", "globals", "open"})
_IMPORTS = frozenset(dis.opmap[name] for name in ("IMPORT_NAME", "IMPORT_FROM", "IMPORT_STAR") if name in dis.opmap)


def require_code(code: types.CodeType, own: types.CodeType, whose: str) -> None:
    """Check the bytecode of a graph: Dynamo's imports nothing, and has a name like `exec` only where the function has it.

    CPython does not check bytecode, so what a forger makes of it can still crash the process.

    Args:
        code: what runs instead of the function.
        own: the function's own code.

    Raises:
        Untrusted: it does something else, or its arguments point outside of its tables.
    """
    ours = {name for one in _each(own) for name in one.co_names}
    for one in _each(code):
        strange = sorted((_RUNS_TEXT & set(one.co_names)) - ours)
        if _IMPORTS & set(one.co_code[::2]):
            strange.append("an import")
        try:
            for _ in dis.get_instructions(one):
                pass
        except (IndexError, KeyError, ValueError) as error:
            strange.append(f"an instruction that does not fit it ({error})")
        if strange:
            raise Untrusted(f"{whose} has {strange[0][:200]}, which no graph's bytecode has", hint=_HINT)


def _each(code: types.CodeType) -> Iterable[types.CodeType]:
    yield code
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _each(value)
