"""What aot_cache/upstream/ takes for granted of torch and triton, a sentence each: a new release fails loudly.

Two halves. The first reads upstream/'s source and looks up every name of torch and triton in it. The second holds what
a name alone does not tell: signatures, results and who calls whom, with real kernels compiled for a GPU that is not
here. What is compiled by torch itself is in `test_torch_contract.py`. `tools/check_torch VERSION` runs both, and all
else that is marked `contract`, in an environment of that release; no GPU is needed.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from contracts import UPSTREAM, need, parameters, python
from triton import knobs
from triton.backends.compiler import GPUTarget, Language
from triton.compiler import ASTSource, CompiledKernel, make_backend
from triton.compiler import compiler as triton_compiler
from triton.runtime import build as triton_build
from triton.runtime.autotuner import Autotuner, Config
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, compute_cache_key

from aot_cache import tested
from aot_cache.artifact import target as targets
from aot_cache.artifact.plan import Plan
from aot_cache.upstream import versions
from aot_cache.upstream.codec import triton_jit, triton_names
from aot_cache.upstream.hooks import triton_launcher, triton_launches
from aot_cache.upstream.virtual import triton_driver

TRITON = tested.minor(triton.__version__)
H200, MI300X = targets.get("h200"), targets.get("mi300x")

nvidia: Any = importlib.import_module("triton.backends.nvidia.driver")

# Names that only some releases have; upstream/ asks before it uses them.
CONDITIONAL = {
    "triton.backends.nvidia.driver.make_launcher": "a launcher for each signature, up to 3.6",
    "triton.backends.nvidia.driver.compile_module_from_src": "up to 3.7; later the driver compiles its file",
    "triton.backends.nvidia.driver.compile_module_from_file": "from 3.8",
    "triton.runtime.build.compile_module_from_file": "from 3.8",
    "torch._dynamo.guards._try_is_cow_tensor": "from 2.14, with the kind of guard that asks for it",
    "torch._dynamo.guards._stream_is_current": "from 2.15, with the kind of guard that asks for it",
    "torch.fx.experimental.symbolic_shapes.ShapeEnv.transfer_symbols_from_foreign_shape_env": "from 2.13",
    "torch._C._host_emptyCache": "where torch is built with CUDA; where not, ours is the only one",
    "torch._C._cuda_getCurrentRawStream": "where torch is built with CUDA; where not, ours is the only one",
    "torch._C._StaticCudaLauncher": "where torch is built with CUDA; where not, no kernel is launched",
    "torch._C._StaticCudaLauncher._launch_kernel": "where torch is built with CUDA; where not, no kernel is launched",
    "torch._C._cuda_getDevice": "where torch is built with CUDA; where not, ours is the only one",
}


def after(minor: str) -> bool:
    """Whether this Triton is newer than `minor`."""

    def number(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    return number(TRITON) > number(minor)


# --- every name that the source says ----------------------------------------------------------------------------------


class Names(ast.NodeVisitor):
    """The dotted names of torch and triton in a module: imported, read, called or replaced."""

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.scopes: list[dict[str, str]] = [{}]

    def bind(self, name: str, dotted: str) -> None:
        self.scopes[-1][name] = dotted

    def resolve(self, node: ast.expr) -> str:
        """`jit.JITFunction` → `triton.runtime.jit.JITFunction`; empty for what is not of torch or triton."""
        if isinstance(node, ast.Name):
            return next((s[node.id] for s in reversed(self.scopes) if node.id in s), "")
        if isinstance(node, ast.Attribute):
            owner = self.resolve(node.value)
            return f"{owner}.{node.attr}" if owner else ""
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            name = ast.unparse(node.args[0]).strip("'")
            return name if name.startswith(("torch", "triton")) else ""
        return ""

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] in ("torch", "triton"):
                self.found.add(alias.name)
                top = alias.name.partition(".")[0]
                self.bind(alias.asname or top, alias.name if alias.asname else top)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").partition(".")[0] in ("torch", "triton"):
            for alias in node.names:
                self.found.add(f"{node.module}.{alias.name}")
                self.bind(alias.asname or alias.name, f"{node.module}.{alias.name}")

    def visit_Try(self, node: ast.Try) -> None:
        if any("ImportError" in ast.unparse(h.type) for h in node.handlers if h.type):
            return  # it copes
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.scopes.append({arg.arg: "" for arg in ast.walk(node.args) if isinstance(arg, ast.arg)})
        self.generic_visit(node)
        self.scopes.pop()

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            self.bind(node.targets[0].id, self.resolve(node.value))

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.generic_visit(node)
        if node.value is not None and isinstance(node.target, ast.Name):
            self.bind(node.target.id, self.resolve(node.value))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        dotted = self.resolve(node)
        if dotted:
            self.found.add(dotted)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        dotted = self.resolve(node)
        if dotted:
            self.found.add(dotted)
        self.generic_visit(node)


def names_in(source: str) -> set[str]:
    visitor = Names()
    visitor.visit(ast.parse(source))
    return visitor.found


def exists(dotted: str) -> bool:
    """Whether the name is there. What comes after a property is not looked up: `driver.active` wants a GPU."""
    parts = dotted.split(".")
    module, count = sys.modules[parts[0]], 1
    for count in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:count]))
            break
        except ImportError:
            continue
    value: Any = module
    for part in parts[count:]:
        if isinstance(inspect.getattr_static(value, part, None), property):
            return True
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize(
    "module",
    [pytest.param(name, marks=pytest.mark.contract(name)) for name in sorted(UPSTREAM)],
)
def test_every_name_that_upstream_uses_is_there(module: str) -> None:
    missing = [n for n in sorted(names_in(UPSTREAM[module].read_text())) if not exists(n)]
    unknown = [n for n in missing if n not in CONDITIONAL]
    need(not unknown, f"{UPSTREAM[module]} uses names that are gone: {', '.join(unknown)}")


def test_the_reader_of_names_reads_them() -> None:
    source = (
        "import torch, importlib\n"
        "import triton.runtime.build as b\n"
        "from triton.runtime.jit import JITFunction as J\n"
        "cuda: object = torch.cuda\n"
        "def f(torch_, b2=1):\n"
        "    d = importlib.import_module('triton.backends.nvidia.driver')\n"
        "    b._build = cuda._lazy_init\n"
        "    d.gone = J.run\n"
        "def g(b):\n"
        "    b.not_a_module\n"
        "    torch.ops.aten.item.default\n"
    )
    found = names_in(source)
    assert {"triton.runtime.build._build", "torch.cuda._lazy_init", "triton.runtime.jit.JITFunction.run"} <= found
    assert "triton.backends.nvidia.driver.gone" in found
    assert not [n for n in found if n.endswith("not_a_module")]
    assert exists("torch.cuda._lazy_init")
    assert exists("torch.ops.aten.item.default")
    assert exists("triton.runtime.driver.driver.active.utils")
    assert not exists("triton.backends.nvidia.driver.gone")
    assert not exists("triton.gone.driver")


# --- kernels, and a driver for a GPU that is not there ----------------------------------------------------------------


@triton.jit
def scale(x, y, n, BLOCK: tl.constexpr, NAME: tl.constexpr = "none"):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + offsets, tl.load(x + offsets, mask=offsets < n) * 2, mask=offsets < n)


class Plain:
    """What an autotuner wraps when nothing is to run: a kernel by its names only."""

    arg_names = ("x", "n", "BLOCK")
    fn = staticmethod(lambda x, n, BLOCK: None)

    def __init__(self) -> None:
        self.ran: list[dict[str, Any]] = []

    def run(self, *args: Any, **kwargs: Any) -> None:
        self.ran.append(kwargs)


def activate(monkeypatch: pytest.MonkeyPatch, target: targets.Target) -> Any:
    fake = triton_driver.VirtualDriver(target)
    monkeypatch.setattr(driver, "_active", fake)
    return fake


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Any:
    scale.device_caches.clear()
    yield activate(monkeypatch, H200)
    scale.device_caches.clear()


@pytest.fixture
def mi300x(monkeypatch: pytest.MonkeyPatch) -> Any:
    scale.device_caches.clear()
    yield activate(monkeypatch, MI300X)
    scale.device_caches.clear()


class At(torch.Tensor):
    """A tensor that says where it is."""

    place = 0

    def data_ptr(self) -> int:
        return self.place


def tensor_at(address: int, elements: int = 64) -> At:
    out = torch.zeros(elements).as_subclass(At)
    out.place = address
    return out


ARGS: tuple[Any, ...] = (tensor_at(1 << 21), tensor_at((1 << 21) + 4), 48)


# --- runtime/jit.py ---------------------------------------------------------------------------------------------------


@pytest.mark.contract("triton_driver")
def test_the_active_driver_can_be_set(h200: Any) -> None:
    need(driver.active is h200, "DriverConfig.active no longer answers what `_active` holds")
    driver.set_active(None)
    need(driver._active is None, "DriverConfig.set_active no longer sets `_active`")


@pytest.mark.contract("triton_kernel")
def test_device_caches_are_five(h200: Any) -> None:
    caches = scale.device_caches[0]
    need(isinstance(caches, tuple) and len(caches) == 5, "JITFunction.device_caches[device] is no tuple of five")
    kernels, keys, target, backend, binder = caches
    need(kernels == {} and keys == {}, "the first two of device_caches are no empty dicts: kernels and keys")
    need(target == GPUTarget("cuda", 90, 32), "the third of device_caches is not the driver's target")
    need(backend.binary_ext == "cubin", "the fourth of device_caches is not the target's backend")
    need(callable(binder), "the fifth of device_caches is not the binder")


@pytest.mark.contract("triton_jit")
def test_the_binder(h200: Any) -> None:
    *_, binder = scale.device_caches[0]
    bound, specialization, options = binder(*ARGS, BLOCK=64, num_warps=8, debug=False)
    need(list(bound) == ["x", "y", "n", "BLOCK", "NAME"], "the binder's first result is not the arguments by name")
    need(
        specialization == [("*fp32", "D"), ("*fp32", ""), ("i32", "D"), ("constexpr", 64), ("constexpr", "none")],
        f"the binder's second result is not a (type, attribute or value) for each parameter: {specialization}",
    )
    need(options == {"num_warps": 8, "debug": False}, "the binder's third result is not the other arguments")
    need(list(options) == ["num_warps", "debug"], "the binder reorders options; their order is part of Triton's key")


@pytest.mark.contract("triton_jit")
def test_amd_asks_for_the_size_of_storage(mi300x: Any) -> None:
    *_, binder = scale.device_caches[0]
    _, specialization, _ = binder(*ARGS, BLOCK=64)
    need(specialization[0] == ("*fp32", "DS"), "AMD's backend no longer asks whether a tensor is smaller than 2 GiB")


@pytest.mark.contract("triton_jit", "triton_kernel")
def test_the_key_in_memory(h200: Any) -> None:
    need(
        parameters(compute_cache_key) == ["kernel_key_cache", "specialization", "options"],
        "compute_cache_key does not take (kernel_key_cache, specialization, options)",
    )
    *_, binder = scale.device_caches[0]
    _, specialization, options = binder(*ARGS, BLOCK=64, num_warps=8)
    key = compute_cache_key({}, specialization, options)
    need(isinstance(key, str), "compute_cache_key's result is no str")
    need(key == compute_cache_key({}, specialization, dict(options)), "compute_cache_key is no function of its input")
    need(key == str(specialization) + str(options), "compute_cache_key is more than the two written out")


@pytest.mark.contract("triton_jit", "triton_launches")
def test_what_run_adds_to_the_arguments(h200: Any) -> None:
    source = inspect.getsource(triton_jit._ORIGINAL_RUN)
    added = list(dict.fromkeys(re.findall(r'kwargs\["(\w+)"\] = ', source)))
    ours = list(triton_jit.launch_defaults(scale, {}))
    need(ours == added, f"JITFunction.run adds {added} to a launch, launch_defaults adds {ours}")
    need(
        source.index("kwargs[") < source.index("binder(*args, **kwargs)") < source.index("compute_cache_key("),
        "JITFunction.run no longer adds its arguments, binds and makes the key, in this order",
    )


@pytest.mark.contract("triton_jit")
def test_pack_args(h200: Any) -> None:
    need(
        parameters(JITFunction._pack_args) == ["self", "backend", "kwargs", "bound_args", "specialization", "options"],
        "JITFunction._pack_args does not take (backend, kwargs, bound_args, specialization, options)",
    )
    *_, backend, binder = scale.device_caches[0]
    kwargs = {"BLOCK": 64, "num_warps": 8}
    bound, specialization, options = binder(*ARGS, **kwargs)
    packed = scale._pack_args(backend, kwargs, bound, specialization, options)
    need(len(packed) == 4, "JITFunction._pack_args does not return (options, signature, constexprs, attrs)")
    parsed, signature, constexprs, attrs = packed
    need(parsed.num_warps == 8 and "num_warps" in parsed.__dict__, "parsed options are no object with a __dict__")
    need(
        signature == {"x": "*fp32", "y": "*fp32", "n": "i32", "BLOCK": "constexpr", "NAME": "constexpr"},
        "the signature is not a type for each parameter's name",
    )
    need(constexprs == {(3,): 64, (4,): "none"}, f"constexprs are not a value for each path: {constexprs}")
    divisible = {path for path, attributes in attrs.items() if ["tt.divisibility", 16] in attributes}
    need(divisible == {(0,), (2,)}, f"attributes do not say what is divisible by 16, for each path: {attrs}")


@pytest.mark.contract("triton_jit")
def test_what_a_jit_function_tells(h200: Any) -> None:
    for name in ("fn", "src", "params", "arg_names", "debug", "pre_run_hooks", "signature", "__name__"):
        need(hasattr(scale, name), f"JITFunction has no {name}")
    need([p.name for p in scale.params][:3] == ["x", "y", "n"], "JITFunction.params no longer have names")
    need(scale.src.startswith("def scale("), "JITFunction.src is not the source without decorators")
    need(scale.fn.__qualname__ == "scale" and scale.fn.__globals__ is globals(), "JITFunction.fn is not the function")
    need(scale.is_gluon() is False, "JITFunction.is_gluon() is gone")
    need(issubclass(JITFunction, triton_jit.JITCallable), "JITFunction is no JITCallable")
    from triton.runtime.jit import ConstexprFunction

    need(issubclass(ConstexprFunction, triton_jit.JITCallable), "constexpr functions are no JITCallable")
    _ = scale.device_caches[0]
    need(scale.ASTSource is ASTSource, "create_binder no longer leaves the source class on the function")


@pytest.mark.contract("triton_launches")
def test_launching_goes_through_run(h200: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    need(parameters(JITFunction.run) == ["self", "args", "grid", "warmup", "kwargs"], "JITFunction.run's parameters")
    seen = []
    monkeypatch.setattr(JITFunction, "run", lambda self, *args, **kwargs: seen.append((self, kwargs)))
    scale[(1,)](*ARGS, BLOCK=64)
    need(
        seen == [(scale, {"grid": (1,), "warmup": False, "BLOCK": 64})],
        "kernel[grid](...) does not call JITFunction.run(grid=..., warmup=False, ...) on the class",
    )


@pytest.mark.contract("triton_launches")
def test_launchers_are_noted_by_signature(tmp_path: Path) -> None:
    """Also of a kernel inside a compiled graph, that no JITFunction launches: a plan has what their C source is made of."""
    if TRITON not in versions.LAUNCHER_PER_SIGNATURE:
        return
    log = triton_launches.LaunchLog()
    stop = triton_launches.record_launches(log)
    try:
        text = nvidia.make_launcher({}, {"x": "*bf16", "pair": ("i32", "*fp32"), "BLOCK": "constexpr"}, None)
    finally:
        stop()
    Plan(recipe="r", target="h200", launchers=tuple(log.launchers)).write(tmp_path / "a.plan.json")
    (types,) = Plan.read(tmp_path / "a.plan.json").launchers
    need(triton_launcher.launcher_source(types, None) == text, "the types are not enough")


@pytest.mark.contract("triton_miss")
def test_a_miss_goes_through_do_compile(h200: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    need(
        parameters(JITFunction._do_compile)[:4] == ["self", "key", "signature", "device"],
        "JITFunction._do_compile does not begin with (key, signature, device)",
    )
    launched = []
    stand_in = SimpleNamespace(
        run=lambda *args: launched.append(args), function=7, packed_metadata=(4, 1, 0), launch_metadata=lambda *_: None
    )
    asked = []

    def do_compile(self: Any, key: str, signature: Any, device: int, *rest: Any, **kwargs: Any) -> Any:
        asked.append((key, device))
        return stand_in

    monkeypatch.setattr(JITFunction, "_do_compile", do_compile)
    scale[(3,)](*ARGS, BLOCK=64)
    key = triton_jit.bind(scale, ARGS, triton_jit.launch_defaults(scale, {"BLOCK": 64}))[0]
    need(asked == [(key, 0)], "a launch that misses does not ask _do_compile with the key in memory and the device")
    need(launched and launched[0][:5] == (3, 1, 1, 0, 7), "a launch does not run what _do_compile returned")
    scale.device_caches[0][0][key] = stand_in
    scale[(3,)](*ARGS, BLOCK=64)
    need(len(asked) == 1 and len(launched) == 2, "a launch does not take what device_caches holds under the key")


@pytest.mark.contract("triton_jit")
def test_types_have_names() -> None:
    for name in ("fp32", "bf16", "int32", "fp8e4nv"):
        need(tl.dtype(name).name == name, f"tl.dtype({name!r}).name is not {name!r}")
    need(tl.constexpr(3).value == 3, "tl.constexpr has no value")
    for name in ("core", "math"):
        need(getattr(tl, name).__name__.startswith("triton."), "Triton's builtins no longer live in triton.*")


# --- compiler/compiler.py ---------------------------------------------------------------------------------------------


@pytest.fixture
def compiled(h200: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """`scale`, compiled for the H200."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    heard: list[dict[str, Any]] = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **event: heard.append(event))
    *_, backend, binder = scale.device_caches[0]
    bound, specialization, _ = binder(*ARGS, BLOCK=64)
    options, signature, constexprs, attrs = scale._pack_args(backend, {"BLOCK": 64}, bound, specialization, {})
    source = ASTSource(scale, signature, constexprs, attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options.__dict__)
    yield SimpleNamespace(kernel=kernel, source=source, heard=heard, options=options)
    triton_compiler.max_shared_mem.cache_clear()


@pytest.mark.contract("triton_compile")
def test_compile_without_a_gpu(compiled: Any) -> None:
    kernel = compiled.kernel
    need(isinstance(kernel, CompiledKernel), "triton.compile returns no CompiledKernel")
    need(kernel.kernel[:4] == b"\x7fELF", "CompiledKernel.kernel is not the binary's bytes")
    files = [path for name, path in kernel.metadata_group.items() if name.endswith(".json")]
    need(len(files) == 1, "metadata_group does not have one .json path")
    document = json.loads(Path(files[0]).read_text())
    needed = {"name", "hash", "target", "shared", "num_warps", "num_ctas", "warp_size", "launch_pdl"}
    needed |= {"global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"}
    needed |= {"launch_cooperative_grid"}
    need(needed <= set(document), f"the metadata lacks {sorted(needed - set(document))}, which a launch reads")


@pytest.mark.contract("triton_compile", "triton_kernel")
def test_the_attributes_of_a_compiled_kernel(compiled: Any) -> None:
    own = set(vars(compiled.kernel))
    known = {"metadata", "packed_metadata", "src", "hash", "name", "asm", "metadata_group", "kernel"}
    known |= {"module", "function", "_run"}
    need(known <= own, f"CompiledKernel.__init__ no longer sets {sorted(known - own)}")
    # From Triton 3.8 a kernel that goes away unloads its module; from 3.9 only in the process that loaded it.
    new = own - known - {"_module_pid"}
    need(not new, f"CompiledKernel.__init__ sets {sorted(new)}, which a kernel made by upstream/ would lack")
    need(compiled.kernel.module is None and compiled.kernel.function is None, "a new kernel is loaded already")
    need(parameters(CompiledKernel.__init__) == ["self", "src", "metadata_group", "hash"], "CompiledKernel.__init__")
    source = {"fn", "language", "ext", "name", "signature", "constants", "attrs"}
    need(set(vars(compiled.source)) == source, f"ASTSource has other attributes: {sorted(vars(compiled.source))}")
    need({"TRITON", "GLUON"} <= set(Language.__members__), "Language has no TRITON and GLUON")
    packed = make_backend(compiled.kernel.metadata.target).pack_metadata(compiled.kernel.metadata)
    need(packed == compiled.kernel.packed_metadata, "packed_metadata is not what backend.pack_metadata makes")
    need(isinstance(triton_compiler.AsmDict({"cubin": b""}), dict), "AsmDict is not made from a dict")
    lazy = inspect.getsource(CompiledKernel.launch_metadata)
    need("launch_enter_hook is None" in lazy, "launch_metadata no longer does nothing without a hook")


@pytest.mark.contract("triton_events", "triton_kernel")
def test_loading(compiled: Any, h200: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`_init_handles` makes the launcher, loads the module once, and tells the hook."""
    kernel, calls = compiled.kernel, []

    def load_binary(*args: Any) -> tuple[int, int, int, int, int]:
        calls.append(("load", *args))
        return 11, 22, 32, 0, 1024

    def unload_module(module: int) -> None:
        calls.append(("unload", module))

    monkeypatch.setattr(h200, "launcher_cls", lambda src, metadata: ("launcher", src, metadata), raising=False)
    h200.utils.load_binary = load_binary
    h200.utils.unload_module = unload_module
    triton_compiler.max_shared_mem.cache_clear()

    def hook(*args: Any) -> None:
        calls.append(("hook", *args))

    knobs.runtime.kernel_load_end_hook.add(hook)
    try:
        kernel._init_handles()
        kernel._init_handles()
    finally:
        knobs.runtime.kernel_load_end_hook.remove(hook)
    name, group = kernel.metadata.name, kernel.metadata_group
    need(
        calls
        == [
            ("load", name, kernel.kernel, kernel.metadata.shared, 0),
            ("hook", 11, 22, name, group, kernel.hash),
        ],
        f"_init_handles does not load once by load_binary(name, binary, shared, device) and tell the hook: {calls}",
    )
    need((kernel.module, kernel.function) == (11, 22), "_init_handles does not keep module and function")
    need(kernel._run == ("launcher", kernel.src, kernel.metadata), "_init_handles does not keep the launcher as _run")
    calls.clear()
    if hasattr(kernel, "__del__"):
        kernel.__del__()
    need(calls == ([("unload", 11)] if after("3.7") else []), f"whether a kernel unloads its module changed: {calls}")
    kernel.module = None


@pytest.mark.contract("triton_events")
def test_the_listener_of_compilations(compiled: Any) -> None:
    need(len(compiled.heard) == 1, "knobs.compilation.listener is not called once for a compilation")
    event = compiled.heard[0]
    need({"src", "cache_hit"} <= set(event), f"the listener is not told src and cache_hit: {sorted(event)}")
    need(event["cache_hit"] is False and event["src"].name == "scale", "the listener is told something else")
    triton.compile(compiled.source, target=GPUTarget("cuda", 90, 32), options=compiled.options.__dict__)
    need([e["cache_hit"] for e in compiled.heard] == [False, True], "the listener is not told of a disk hit")


@pytest.mark.contract("triton_compile")
def test_errors_that_prune_a_config() -> None:
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    caught = re.findall(r"except \(([^)]*)\)", inspect.getsource(Autotuner._bench))
    names = {name.strip() for group in caught for name in group.split(",")}
    ours = {error.__name__ for error in (CompileTimeAssertionFailure, OutOfResources, PTXASError)}
    need(names == ours, f"an autotuner prunes on {sorted(names)}, virtual/triton_compile.py on {sorted(ours)}")


@pytest.mark.contract("triton_compile")
def test_the_toolkit() -> None:
    from triton.backends.nvidia.compiler import get_ptxas

    for arch in (80, 90, 100, 120):
        need(Path(get_ptxas(arch).path).is_file(), f"get_ptxas({arch}).path is no file")


@pytest.mark.contract("triton_compile")
def test_the_environment_that_changes_code(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton._C.libtriton import get_cache_invalidating_env_vars

    before = dict(get_cache_invalidating_env_vars())
    for name in ("DISABLE_LLVM_OPT", "TRITON_DEFAULT_FP_FUSION", "TRITON_DISABLE_LINE_INFO"):
        monkeypatch.setenv(name, "1")
        need(name in get_cache_invalidating_env_vars(), f"Triton no longer lists {name} among what changes code")
        monkeypatch.delenv(name)
    need(dict(get_cache_invalidating_env_vars()) == {k: v for k, v in before.items() if k in os.environ}, "it caches")


@pytest.mark.parametrize("target", [H200, MI300X], ids=lambda t: t.id)
@pytest.mark.contract("triton_compile")
def test_options(target: targets.Target) -> None:
    backend = make_backend(triton_driver.gpu_target(target))
    need(backend.binary_ext == ("cubin" if target is H200 else "hsaco"), "the backend's binary_ext")
    options = backend.parse_options({"num_warps": 8})
    need(options.__dict__["num_warps"] == 8 and "num_stages" in options.__dict__, "parse_options gives no dataclass")


# --- runtime/driver.py and backends -----------------------------------------------------------------------------------


@pytest.mark.contract("triton_driver")
def test_the_virtual_driver_answers_what_a_driver_must() -> None:
    from triton.backends.driver import DriverBase

    asked = set(DriverBase.__abstractmethods__) - {"is_active"}
    missing = [name for name in sorted(asked) if not hasattr(triton_driver.VirtualDriver, name)]
    need(not missing, f"DriverBase asks for {missing}, which VirtualDriver does not answer")
    need(GPUTarget("cuda", 90, 32) == triton_driver.gpu_target(H200), "GPUTarget is not (backend, arch, warp_size)")


@pytest.mark.parametrize("backend", ["nvidia", "amd"])
@pytest.mark.contract("triton_driver")
def test_the_properties_that_drivers_report(backend: str) -> None:
    source = Path(nvidia.dirname, "..", backend, "driver.c").read_text()
    report = re.search(r'Py_BuildValue\(\s*"[^"]*",\s*("max_shared_mem".*?)\);', source, re.DOTALL)
    need(report, f"{backend}'s driver.c does not report device properties beginning with max_shared_mem")
    assert report is not None
    reported = set(re.findall(r'"(\w+)"', report[1]))
    ours = set(triton_driver.VirtualDriver(H200).utils.get_device_properties(0))
    # AMD's, which no Python code of Triton reads.
    more = {"arch", "cooperativeLaunch", "max_threads_per_sm"} if backend == "amd" else set()
    need(ours <= reported, f"{backend} no longer reports {sorted(ours - reported)}")
    need(reported - ours <= more, f"{backend} reports {sorted(reported - ours - more)}, the virtual driver does not")


# --- C modules --------------------------------------------------------------------------------------------------------


@pytest.mark.contract("triton_launcher")
def test_what_is_known_of_the_c_modules() -> None:
    need(Path(nvidia.dirname, "driver.c").is_file(), "triton/backends/nvidia/driver.c is not where the driver says")
    need(all(Path(path, "cuda.h").is_file() for path in nvidia.include_dirs), "cuda.h is not in include_dirs")
    need(callable(nvidia.library_dirs), "library_dirs is no function")
    need(nvidia.libraries == ["libcuda.so.1"], "the C modules link against more than libcuda.so.1")
    need(parameters(triton_build._build)[:2] == ["name", "src"], "triton.runtime.build._build does not begin with name")
    need(
        parameters(triton_build.compile_module_from_src)[:2] == ["src", "name"],
        "triton.runtime.build.compile_module_from_src does not begin with (src, name)",
    )


@pytest.mark.contract("triton_launcher")
def test_who_compiles_the_driver() -> None:
    """Exactly one of two ways, imported by name: replacing it in triton.runtime.build alone would change nothing."""
    ways = {name for name in ("compile_module_from_src", "compile_module_from_file") if hasattr(nvidia, name)}
    need(len(ways) == 1, f"NVIDIA's driver has {sorted(ways) or 'none'} of the known ways to compile its C module")
    (way,) = ways
    need(f"{way}(" in inspect.getsource(nvidia.CudaUtils.__init__), f"CudaUtils does not compile by {way}")
    need(getattr(nvidia, way) is getattr(triton_build, way), f"{way} is not the one of triton.runtime.build")
    need(f"{triton_launcher.UTILS!r}".strip("'") in inspect.getsource(nvidia.CudaUtils.__init__), "its name changed")
    if way == "compile_module_from_file":
        first = parameters(getattr(triton_build, way))[:2]
        need(first == ["src_path", "name"], f"{way} does not begin with (src_path, name)")


@pytest.mark.contract("triton_launcher")
def test_where_launchers_come_from() -> None:
    each = TRITON in versions.LAUNCHER_PER_SIGNATURE
    need(hasattr(nvidia, "make_launcher") == each, "versions.LAUNCHER_PER_SIGNATURE is wrong about make_launcher")
    text = inspect.getsource(nvidia.CudaLauncher.__init__)
    need(("compile_module_from_src(" in text) == each, "versions.LAUNCHER_PER_SIGNATURE is wrong about CudaLauncher")
    if each:
        need(
            parameters(nvidia.make_launcher) == ["constants", "signature", "tensordesc_meta"],
            "make_launcher does not take (constants, signature, tensordesc_meta)",
        )
        one = nvidia.make_launcher({}, {0: "*fp32", 1: "i32", 2: "constexpr"}, None)
        two = nvidia.make_launcher({(2,): 64}, {0: "*fp32", 1: "i32", 2: "constexpr"}, None)
        need(one == two, "a launcher's source depends on constants, not only on the signature")


SERVE = """
from aot_cache.upstream.hooks import triton_launcher
from triton.backends.nvidia import driver
class Reached(Exception): ...
def lookup(key):
    assert key == triton_launcher.source_key(triton_launcher.utils_source()), "asked for another source"
    raise Reached
triton_launcher.serve(lookup)
try:
    driver.CudaUtils()
except Reached:
    print("asked")
except Exception as error:
    print("not asked:", type(error).__name__, error)
"""


@pytest.mark.contract("triton_launcher")
def test_the_driver_asks_us_for_its_c_module(tmp_path: Path) -> None:
    """What `triton_launcher.serve` replaces is what the driver calls when it comes up."""
    environment = {"TRITON_LIBCUDA_PATH": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path), "CC": "false"}
    done = python(SERVE, environment)
    assert done.returncode == 0, done.stderr
    need(done.stdout.startswith("asked"), f"when Triton's driver comes up, serve() is {done.stdout.strip()}")


# --- runtime/autotuner.py ---------------------------------------------------------------------------------------------


def tuner_of(plain: Plain, configs: list[Config], bench: Callable[..., Any], prune: Any = None) -> Any:
    prune_by = {"early_config_prune": prune} if prune else None
    return Autotuner(plain, plain.arg_names, configs, ["n"], None, None, prune_configs_by=prune_by, do_bench=bench)


def times(kernel_call: Callable[[], None], quantiles: Any) -> tuple[float, ...]:
    kernel_call()
    return (1.0,) * len(quantiles)


CONFIGS = [Config({"BLOCK": 64}, num_warps=4), Config({"BLOCK": 128}, num_warps=8)]


@pytest.mark.contract("triton_tuner_miss", "triton_tuning")
def test_what_an_autotuner_has() -> None:
    tuner = tuner_of(Plain(), CONFIGS, times)
    for name in ("cache", "keys", "arg_names", "configs", "fn", "base_fn", "cache_results"):
        need(hasattr(tuner, name), f"Autotuner has no {name}")
    need(tuner.configs == CONFIGS and tuner.keys == ["n"] and tuner.cache == {}, "Autotuner.configs, keys or cache")
    need(parameters(Autotuner.prune_configs) == ["self", "kwargs"], "Autotuner.prune_configs does not take (kwargs)")
    need(parameters(Autotuner._bench)[-2:] == ["config", "meta"], "Autotuner._bench does not take (config, **meta)")
    need(parameters(Autotuner.run) == ["self", "args", "kwargs"], "Autotuner.run does not take (*args, **kwargs)")
    wanted = {"BLOCK": 64, "num_warps": 4, "num_ctas": 1, "num_stages": 3}
    need(CONFIGS[0].all_kwargs() == wanted, f"Config.all_kwargs gives {CONFIGS[0].all_kwargs()}")
    need(CONFIGS[0].pre_hook is None, "Config has no pre_hook")
    heuristics = triton.heuristics({"BLOCK": lambda args: 64})(scale)
    need(isinstance(heuristics, triton_launches.Heuristics) and heuristics.fn is scale, "Heuristics has no fn")
    need(triton_jit.unwrap(heuristics) is scale, "heuristics do not lead to their kernel by fn")


@pytest.mark.contract("triton_tuning")
def test_the_key_of_an_autotuner() -> None:
    plain = Plain()
    tuner = tuner_of(plain, CONFIGS, times)
    args = (torch.zeros(4, dtype=torch.bfloat16), 7)
    seen = []

    def run(*a: Any, **kw: Any) -> None:
        seen.append(tuner.nargs)

    plain.run = run  # type: ignore[method-assign]
    tuner.run(*args, grid=(1,))
    key = triton_jit.tuning_key(tuner, args, {"grid": (1,)})
    need(list(tuner.cache) == [key], f"an autotuner's key is made otherwise: {list(tuner.cache)}, not {[key]}")
    need(list(tuner.cache) == [(7, "torch.bfloat16")], "an autotuner's key is not the named arguments and the dtypes")
    need(all(nargs is seen[0] for nargs in seen), "Autotuner.nargs is not one dict for a run")
    need(list(seen[0]) == ["x", "n"], "Autotuner.nargs is not the positional arguments by name")
    need(len(seen) == len(CONFIGS) + 1, "an autotuner does not launch each candidate once, then the choice")


@pytest.mark.contract("triton_tuner_miss", "triton_tuning")
def test_an_autotuner_takes_what_its_cache_holds() -> None:
    plain = Plain()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("benchmarked")

    tuner = tuner_of(plain, CONFIGS, never)
    tuner.cache[(7, "torch.float32")] = CONFIGS[1]
    tuner.run(torch.zeros(4), 7, grid=(1,))
    need(plain.ran == [{"grid": (1,), **CONFIGS[1].all_kwargs()}], "an autotuner does not launch what its cache holds")


@pytest.mark.contract("triton_tuning")
def test_an_autotuner_with_one_config_left() -> None:
    """Triton 3.8 takes the only config that pruning leaves; before, it benchmarks it. The choice is the same."""
    plain, benchmarks = Plain(), []

    def bench(kernel_call: Callable[[], None], quantiles: Any) -> tuple[float, ...]:
        benchmarks.append(1)
        return times(kernel_call, quantiles)

    tuner = tuner_of(plain, CONFIGS, bench, prune=lambda configs, nargs, **kwargs: configs[1:])
    tuner.nargs = {}
    need(tuner.prune_configs({}) == CONFIGS[1:], "prune_configs does not ask early_config_prune with (configs, nargs)")
    tuner.run(torch.zeros(4), 7, grid=(1,))
    need(tuner.cache == {(7, "torch.float32"): CONFIGS[1]}, "the only config that is left is not the choice")
    need(len(benchmarks) == (0 if after("3.7") else 1), "how often a lone config is benchmarked changed")


# --- torch: wrapper tensors -------------------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    """The least that virtual/torch_tensor.py builds on."""

    __torch_function__ = torch._C._disabled_torch_function_impl
    seen: list[Any] = []  # noqa: RUF012 - one test at a time

    @staticmethod
    def __new__(cls: Any, meta: torch.Tensor) -> Any:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            meta.size(),
            strides=meta.stride(),
            storage_offset=meta.storage_offset(),
            dtype=meta.dtype,
            layout=meta.layout,
            device="cpu",
        )

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append((func, args, kwargs or {}))
        return 1.5 if func._schema.name in ("aten::item", "aten::_local_scalar_dense") else args[0]


def dispatched(action: Callable[[Any], Any], mode: Any = torch.no_grad) -> list[Any]:
    Wrapped.seen = []
    with mode():
        action(Wrapped(torch.empty(4, 6, device="meta")))
    return Wrapped.seen


@pytest.mark.contract("torch_tensor")
def test_wrapper_tensors_have_a_geometry() -> None:
    meta = torch.empty(8, 6, dtype=torch.bfloat16, device="meta")[2:, ::2]
    wrapped = Wrapped(meta)
    need(
        (wrapped.shape, wrapped.stride(), wrapped.storage_offset(), wrapped.dtype)
        == (meta.shape, meta.stride(), meta.storage_offset(), meta.dtype),
        "_make_wrapper_subclass does not take strides, storage_offset, dtype, layout and device by name",
    )


@pytest.mark.contract("torch_tensor")
def test_what_dispatch_is_handed() -> None:
    ((func, _, _),) = dispatched(lambda t: t.add_(1))
    need(func is torch.ops.aten.add_.Tensor, "Tensor.add_ does not dispatch aten.add_.Tensor")
    need(func.namespace == "aten" and func._schema.name == "aten::add_", "an operator has no namespace or schema")
    need(func._schema.is_mutable is True, "a schema no longer says that it writes")
    need([a.name for a in func._schema.arguments][:2] == ["self", "other"], "a schema's arguments have no names")
    need(func.name() == "aten::add_.Tensor", "an operator's name() is not namespace::name.overload")
    tags = torch.ops.aten.nonzero.default.tags
    need(torch.Tag.dynamic_output_shape in tags, "nonzero is not tagged dynamic_output_shape")
    need(
        torch.Tag.data_dependent_output in torch.ops.aten._local_scalar_dense.default.tags,
        "_local_scalar_dense is not tagged data_dependent_output",
    )


@pytest.mark.contract("torch_tensor")
def test_to() -> None:
    """Outside of inference mode `Tensor.to` arrives as `_to_copy`; inside, whole and under its own name."""
    ((func, _, kwargs),) = dispatched(lambda t: t.to(torch.float64))
    need(func is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.float64, "`to` does not become _to_copy")
    with torch.inference_mode():
        made = Wrapped(torch.empty(4, 6, device="meta"))
        Wrapped.seen = []
        made.to(torch.float64)
        made.to("meta", torch.float64, copy=True)
    names = {func._schema.name for func, _, _ in Wrapped.seen}
    need(names == {"aten::to"}, f"under inference mode `to` arrives as {sorted(names)}, not as aten::to")
    known = {"self", "other", "dtype", "device", "copy", "memory_format", "layout", "pin_memory", "non_blocking"}
    for overload in torch.ops.aten.to.overloads():
        arguments = {a.name for a in getattr(torch.ops.aten.to, overload)._schema.arguments}
        need(arguments <= known, f"aten::to.{overload} has arguments that are not handled: {sorted(arguments - known)}")


@pytest.mark.contract("torch_tensor")
def test_reading_a_value() -> None:
    """`item()` is one operator that asks for the number: under inference mode it keeps its own name."""
    names = {}
    for mode in (torch.no_grad, torch.inference_mode):
        Wrapped.seen = []
        with mode():
            need(Wrapped(torch.empty((), device="meta")).item() == 1.5, "item() is not what the operator returned")
        names[mode.__name__] = [func._schema.name for func, _, _ in Wrapped.seen]
    need(
        names == {"no_grad": ["aten::_local_scalar_dense"], "inference_mode": ["aten::item"]},
        f"item() arrives as {names}",
    )


@pytest.mark.contract("torch_tensor")
def test_custom_operators_run_their_implementation() -> None:
    library = torch.library.Library("aot_cache_contract", "DEF")
    try:
        library.define("twice(Tensor x) -> Tensor")
        library.define("thrice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CUDA")
        library.impl("thrice", lambda x: x * 3, "CompositeExplicitAutograd")
        twice, thrice = torch.ops.aot_cache_contract.twice.default, torch.ops.aot_cache_contract.thrice.default
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        need(has(twice.name(), "CUDA"), "_dispatch_has_kernel_for_dispatch_key does not find a CUDA kernel")
        need(not has(thrice.name(), "CUDA"), "_dispatch_has_kernel_for_dispatch_key finds one that is not there")
        need(has(thrice.name(), "CompositeExplicitAutograd"), "it does not find a composite kernel")
        keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
        x = torch.ones(2)
        need(twice.redispatch(keys, x).tolist() == [2, 2], "redispatch does not run the kernel of the key set given")
        need(thrice.redispatch(keys, x).tolist() == [3, 3], "redispatch does not run a composite kernel")
    finally:
        library._destroy()


# --- names in a kernel ------------------------------------------------------------------------------------------------


@triton.constexpr_function
def doubled(n):
    return 2 * n


@triton.jit
def called(x):
    return tl.exp(x) * doubled(2)


@pytest.mark.contract("triton_names")
def test_what_names_in_a_kernel_stand_for() -> None:
    for function in (scale, called, doubled):
        need(isinstance(function, triton_names.JITCallable), f"a {type(function).__name__} is no JITCallable")
        need(inspect.isfunction(function.fn), f"a {type(function).__name__} has no Python function `fn`")
        need(f"def {function.fn.__name__}(" in function.src, f"a {type(function).__name__} has no source `src`")
    need({"tl.exp", "doubled"} <= set(triton_names.in_source(called.src)), "a kernel's source is not as it was written")
    meaning = triton_names.meaning(triton_names.look_up(called, "tl.exp"))
    need(meaning == "triton language.math.exp", f"tl.exp is {meaning}, and not known by Triton's module")
    need(triton_names.meaning(called) == f"jit {__name__}:called", "a function of kernels has no name of its own")


@pytest.mark.contract("triton_names")
def test_which_globals_a_kernel_may_use() -> None:
    """What has no meaning in words must be refused by Triton, or it could change code that is taken for the same."""
    from triton.compiler import code_generator

    source = inspect.getsource(code_generator.CodeGenerator)
    for kind in ("ModuleType", "JITCallable", "constexpr", "triton.language"):
        need(kind in source, f"the compiler no longer asks whether a global is of {kind}")
    need("Cannot access global variable" in source, "the compiler lets a kernel use any global")


# --- torch.cuda -------------------------------------------------------------------------------------------------------


@pytest.mark.contract("torch_cuda")
def test_what_pretending_replaces_is_there() -> None:
    """A name that torch.cuda no longer has would be replaced without any effect."""
    tree = ast.parse(UPSTREAM["torch_cuda"].read_text())
    tables = [n for n in ast.walk(tree) if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "answers"]
    names, more = [
        [key.value for key in table.value.keys if isinstance(key, ast.Constant)]
        for table in tables
        if isinstance(table.value, ast.Dict)
    ]
    assert len(names) > 15 and len(more) > 10
    missing = [name for name in names if not hasattr(torch.cuda, str(name))]
    lacking = {str(name) for name in more if not hasattr(torch.accelerator, str(name))}
    added_later = {"get_device_capability", "get_memory_info"}
    need(lacking <= added_later, f"torch.accelerator no longer has {sorted(lacking - added_later)}")
    need(not missing, f"torch.cuda no longer has {missing}, which torch_cuda.pretend replaces")
    need(callable(torch._C._ensureCUDADeviceGuardSet), "torch._C._ensureCUDADeviceGuardSet is gone")
    need(hasattr(torch.version, "cuda") and hasattr(torch.version, "hip"), "torch.version has no cuda and hip")


@pytest.mark.skipif(not hasattr(torch._C, "_CudaDeviceProperties"), reason="a CPU build of torch knows no CUDA device")
@pytest.mark.contract("torch_cuda")
def test_the_properties_that_torch_reports() -> None:
    from aot_cache.upstream.virtual import torch_cuda

    real = {name for name in dir(torch._C._CudaDeviceProperties) if not name.startswith("_")}
    ours = set(vars(torch_cuda.device_properties(H200)))
    need(ours <= real, f"device properties no longer have {sorted(ours - real)}")
    more = {"uuid", "pci_bus_id", "pci_device_id", "pci_domain_id"}
    more |= {"clock_rate", "memory_clock_rate", "memory_bus_width"}
    need(real - ours <= more, f"device properties have {sorted(real - ours - more)}, which the virtual device lacks")


@pytest.mark.contract("torch_capture")
def test_where_a_capture_begins() -> None:
    need("capture_begin" in vars(torch.cuda.CUDAGraph), "torch.cuda.CUDAGraph has no capture_begin of its own")
    source = inspect.getsource(torch.cuda.graphs.graph.__enter__)
    need("self.cuda_graph.capture_begin(" in source, "torch.cuda.graph does not begin a capture by capture_begin")
    need(callable(torch.cuda.is_current_stream_capturing), "is_current_stream_capturing is gone")
    need(torch.cuda.is_initialized() is False, "something here initialised CUDA")


PRETEND = """
import json, sys, torch
from aot_cache.artifact import target
from aot_cache.upstream.virtual import torch_cuda
from aot_cache.upstream.virtual.torch_tensor import VirtualMode, VirtualTensor
torch_cuda.pretend(target.get("h200"))
assert torch.cuda.get_device_name() == "NVIDIA H200"
def tensor(*shape):
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)
def values():
    return torch.tensor([3, 5], device="cuda")
failed = {}
for what, code in json.loads(sys.argv[2]).items():
    try:
        with VirtualMode(), getattr(torch, sys.argv[1])():
            t = tensor(4, 16)
            assert type(t) is VirtualTensor and t.is_cuda and t.device == torch.device("cuda", 0), t
            assert eval(code), code
    except Exception as error:
        failed[what] = f"{type(error).__name__}: {error}"
print(json.dumps(failed))
"""

HOST_CODE = {
    "alignment": "t.data_ptr() % 16 == 0 and t[1:, 3].data_ptr() % 16 == 6",
    "index": "t[None].shape == (1, 4, 16) and t[..., :2].shape == (4, 2) and t[-1].shape == (16,)",
    "set": "t.__setitem__(0, 0) is None",
    "to a type": "t.to(torch.float32).dtype == torch.float32 and t.float().dtype == torch.float32",
    "compute": "(t @ t.T).shape == (4, 4) and torch.nn.functional.silu(t).shape == (4, 16)",
    "new": "t.new_empty(3).is_cuda and torch.zeros(3, device='cuda').is_cuda",
    "to the same place": "t.to('cuda') is t",
    "values": "values().tolist() == [3, 5] and values().cpu().tolist() == [3, 5]",
    "one value": "int(values()[1]) == 5",
    "contiguous": "t.T.contiguous().is_contiguous()",
    "copy": "t.copy_(t.clone()) is t",
}


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
@pytest.mark.contract("torch_cuda")
def test_a_gpu_that_is_not_there(mode: str) -> None:
    """The virtual device's tensors live without a GPU, with a CUDA build and with a CPU build (no device guard)."""
    done = python(PRETEND, {"CUDA_VISIBLE_DEVICES": ""}, mode, json.dumps(HOST_CODE))
    need(done.returncode == 0, f"a process cannot pretend to have a GPU: {done.stderr[-900:]}")
    failed = json.loads(done.stdout.splitlines()[-1])
    need(not failed, f"virtual tensors fail at {failed}")


def test_nothing_here_left_something_behind() -> None:
    """The driver and the hooks are as an import leaves them."""
    assert not isinstance(driver._active, triton_driver.VirtualDriver)
    assert knobs.compilation.listener is None
    assert isinstance(functools.reduce(getattr, ["runtime", "kernel_load_end_hook", "calls"], knobs), list)
