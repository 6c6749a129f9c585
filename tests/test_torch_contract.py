"""What aot_cache/upstream/ takes for granted of Dynamo, Inductor and fake tensors, a sentence each.

As `test_upstream_contract.py`, which also looks up every name: here is what a name does not tell. Frames are compiled by
a backend that keeps the graph as it is; no C++ compiler and no GPU is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import inspect
import json
import os
import pickle
import re
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
import torch._functorch.config
import torch._inductor.config
from contracts import ROOT, UPSTREAM, need, parameters, python
from dynamo_calls import as_it_is, compiled_by_dynamo, hooked
from torch._dynamo import convert_frame, eval_frame, guards, output_graph, package
from torch._dynamo.types import ConvertFrameReturn, GuardedCode, wrap_guarded_code
from torch._guards import CompileId, Guard
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from aot_cache import tested
from aot_cache.upstream.codec import (
    code_bytes,
    dynamo_globals,
    dynamo_guards,
    dynamo_package,
    guard_facts,
    real_tensors,
)
from aot_cache.upstream.hooks import (
    dynamo_frames,
    dynamo_guard_timing,
    inductor_artifact,
    inductor_binaries,
    inductor_cpp,
    inductor_events,
    second_count,
)
from aot_cache.upstream.hooks.dynamo_frames import Frame
from aot_cache.upstream.virtual import dynamo_answers, dynamo_inputs, inductor_target, torch_fake

HAS_NO_REASON = tested.minor(torch.__version__) in ("2.11", "2.12")
inductor: Any = torch._inductor.config
functorch: Any = torch._functorch.config


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Dynamo knows nothing of the tests before."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- _dynamo/convert_frame.py -----------------------------------------------------------------------------------------


@pytest.mark.contract("dynamo_frames")
def test_compile_is_given_its_arguments_by_name() -> None:
    needed = {"code", "globals", "locals", "compiler_fn", "one_graph", "package"}
    found = inspect.signature(convert_frame._compile).parameters
    first = dynamo_frames._ARGUMENTS
    need(tuple(found)[: len(first)] == first, f"convert_frame._compile does not begin with {', '.join(first)}")
    need(needed <= set(found), f"convert_frame._compile no longer takes {sorted(needed - set(found))}")
    need(found["package"].default is None, "convert_frame._compile's package is not None by default")
    need(
        list(found).index("package") >= 10 and "**" not in str(found),
        "convert_frame._compile takes its package among the first",
    )


@pytest.mark.contract("dynamo_frames")
def test_compile_is_called_by_name_in_its_module() -> None:
    """A hook replaces `convert_frame._compile`; a caller that held the function would not see it."""
    seen = []
    with hooked(dynamo_frames.intercept_compile(lambda frame, go_on: seen.append(frame) or go_on(None))):
        torch.compile(function, backend=as_it_is, fullgraph=True)(torch.ones(3))
    need(len(seen) == 1, "a frame is compiled past convert_frame._compile")
    (frame,) = seen
    need(frame.code is function.__code__, "convert_frame._compile's code is not the frame's own")
    need(frame.f_globals is globals() and frame.module == __name__, "its globals are not the frame's")
    need(list(frame.f_locals) == ["x"] and torch.equal(frame.f_locals["x"], torch.ones(3)), "its locals are not")
    need(frame.fullgraph is True, "its one_graph is not fullgraph")
    need(frame.wrapping is None, "a backend of the user's is taken for Inductor")


def function(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("options", [{}, {"max_autotune": True, "epilogue_fusion": False}])
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.contract("dynamo_frames")
def test_the_chain_of_backends_leads_to_the_wrapping(fullgraph: bool, options: dict[str, Any], dynamic: Any) -> None:
    """From the callback of `torch.compile`, and from what `_compile` is handed, by `_torchdynamo_orig_backend`."""
    seen: list[Any] = []
    before: list[Any] = []
    original: Any = convert_frame.CatchErrorsWrapper.__call__

    def __call__(self: Any, frame: Any, cache_entry: Any, frame_state: Any) -> Any:
        before.append(self)
        return original(self, frame, cache_entry, frame_state)

    def look(frame: Frame, go_on: Any) -> Any:
        seen.append(frame)
        return go_on(None)

    def run(wrapper: Any, backend: Any, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        return graph.forward

    with pytest.MonkeyPatch.context() as patch, hooked(dynamo_frames.intercept_compile(look)):
        patch.setattr(convert_frame.CatchErrorsWrapper, "__call__", __call__)
        with inductor_artifact.instead(run):
            torch.compile(function, options=options, dynamic=dynamic, fullgraph=fullgraph)(torch.ones(3))
    wanted = {"backend": "inductor", "options": dict(sorted(options.items())), "dynamic": dynamic}
    need(
        [frame.wrapping for frame in seen] == [wanted],
        f"_compile's compiler_fn does not lead to Inductor's wrapper: {[frame.wrapping for frame in seen]}",
    )
    wrapper = before[0]
    need(dynamo_frames.compile_config_of(wrapper) == wanted, "the callback does not lead to the same wrapper")
    inner = wrapper._torchdynamo_orig_backend
    found = getattr(getattr(inner, "_inner_convert", inner), "_one_graph", None)
    need(found is fullgraph, "ConvertFrame._inner_convert._one_graph is not fullgraph")
    need(seen[0].fullgraph is fullgraph, "_compile's one_graph is not fullgraph")


@pytest.mark.contract("dynamo_frames")
def test_a_mode_is_options() -> None:
    one = torch._TorchCompileInductorWrapper("max-autotune-no-cudagraphs", None, None)
    need(one.config.get("max_autotune") is True, "a mode's options are not in the wrapper's config")
    need(one.dynamic is None, "Inductor's wrapper does not say `dynamic`")
    need("__call__" in vars(type(one)), "Inductor's wrapper has no __call__ of its own")
    need(parameters(type(one).__call__)[:3] == ["self", "model_", "inputs_"], "its __call__ takes other arguments")


@pytest.mark.contract("dynamo_frames")
def test_the_callback_of_a_frame() -> None:
    wrapper = convert_frame.CatchErrorsWrapper
    need("__call__" in vars(wrapper), "CatchErrorsWrapper has no __call__ of its own")
    need(
        parameters(wrapper.__call__) == ["self", "frame", "cache_entry", "frame_state"],
        "CatchErrorsWrapper is not called with (frame, cache_entry, frame_state)",
    )
    need("_torchdynamo_orig_backend" in inspect.getsource(wrapper.__init__), "it does not keep what it wraps")


@pytest.mark.contract("dynamo_frames")
def test_what_a_callback_returns() -> None:
    fields = {field.name for field in dataclasses.fields(ConvertFrameReturn)}
    need({"frame_exec_strategy", "apply_to_code", "guarded_code"} <= fields, "ConvertFrameReturn's fields")
    need(("skip_reason" in fields) is not HAS_NO_REASON, "from torch 2.13 on ConvertFrameReturn has a skip_reason")
    need(ConvertFrameReturn().guarded_code is None, "ConvertFrameReturn() has code")
    need(
        parameters(GuardedCode) == ["code", "guard_manager", "compile_id", "trace_annotation"],
        "GuardedCode is not (code, guard_manager, compile_id, trace_annotation)",
    )
    need(str(CompileId(frame_id=3, frame_compile_id=0)) == "3/0", "CompileId is not made of two numbers")
    code = GuardedCode(function.__code__, None, CompileId(frame_id=0, frame_compile_id=0), "x")  # type: ignore[arg-type]
    made = wrap_guarded_code(code)
    need(isinstance(made, ConvertFrameReturn) and made.guarded_code is code, "wrap_guarded_code does not wrap it")
    ours = dynamo_frames.run_without_compiling()
    need(ours.apply_to_code is False and ours.guarded_code is None, "an answer without code is not for one call only")


@pytest.mark.contract("dynamo_frames")
def test_a_skipped_call_is_asked_about_again() -> None:
    """`run_without_compiling` is for this call, and for what it calls, only."""
    seen = []

    def look(frame: Frame, _go_on: Any) -> Any:
        seen.append(frame.code.co_name)
        return dynamo_frames.run_without_compiling()

    with hooked(dynamo_frames.intercept_compile(look)):
        compiled = torch.compile(outer, backend=as_it_is)
        made = [compiled(torch.ones(3)) for _ in range(2)]
    need([m.tolist() for m in made] == [[3] * 3] * 2, "a frame that is skipped does not run as plain Python")
    need(seen == ["outer", "outer"], f"frames that were skipped for one call: {seen}")


@pytest.mark.contract("dynamo_frames")
def test_a_call_that_is_skipped_may_want_its_whole_graph() -> None:
    """Looking at calls, and explaining them, compiles nothing, whatever `fullgraph` says."""
    with hooked(dynamo_frames.intercept_compile(lambda *_: dynamo_frames.run_without_compiling())):
        made = torch.compile(outer, backend=as_it_is, fullgraph=True)(torch.ones(3))
    need(made.tolist() == [3] * 3, "a frame that is skipped does not run as plain Python")


def outer(x: torch.Tensor) -> torch.Tensor:
    return function(x) + 1


@dataclasses.dataclass
class Found:
    """Finds `function` compiled to something else, and counts how often it was asked."""

    asked: int = 0

    def __post_init__(self) -> None:
        self.kept = compiled_by_dynamo(function, torch.ones(3))
        torch._dynamo.reset()

    def __call__(self, frame: Frame) -> dynamo_frames.Found:
        self.asked += 1
        ((made, _),) = self.kept.frames
        for name in made.graphs:
            frame.f_globals[name] = dynamo_globals.not_traced(lambda x: (x * 30,))
        manager, why = dynamo_guards.build(
            made.guards, self.kept.identities[0], self.kept.values[0], frame.code, frame.f_globals, frame.f_locals
        )
        assert manager is not None, why
        assert made.dynamo_code is not None
        return dynamo_frames.Found(made.dynamo_code, manager, 7)


@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.contract("dynamo_frames")
def test_code_that_is_found_goes_into_the_cache(fullgraph: bool) -> None:
    """What `before_compiling` answers runs, and is not asked for again while its guards hold."""
    found = Found()
    with hooked(dynamo_frames.before_compiling(found, lambda code: code is function.__code__)):
        compiled = torch.compile(function, backend=as_it_is, fullgraph=fullgraph)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(convert_frame, "_compile", None)  # it must not come so far
            first, second, other = (compiled(torch.full((3,), n)) for n in (1.0, 1.0, 2.0))
    # Where `reset` looks for code whose cache is to be emptied: not left to the next test.
    convert_frame.input_codes.add(function.__code__)
    need(first.tolist() == second.tolist() == [30] * 3, "code that is found does not run")
    need(other.tolist() == [60] * 3, "code that is found does not run on other values")
    need(found.asked == 1, f"Dynamo asks {found.asked} times for what it has")
    need(convert_frame.CatchErrorsWrapper.__call__.__module__.startswith("torch"), "the hook stays")


@pytest.mark.contract("dynamo_frames")
def test_a_reset_forgets_what_was_found() -> None:
    """torch._dynamo.reset empties the caches of the codes in `input_codes`."""
    found = Found()
    with hooked(dynamo_frames.before_compiling(found, lambda code: code is function.__code__)):
        compiled = torch.compile(function, backend=as_it_is)
        compiled(torch.ones(3))
        torch._dynamo.reset()
        compiled(torch.ones(3))
    convert_frame.input_codes.add(function.__code__)
    assert found.asked == 2


@pytest.mark.contract("dynamo_package")
def test_output_codes_are_known() -> None:
    """Dynamo must not trace into code that it made."""
    from torch._dynamo.utils import orig_code_map

    for known in (convert_frame.output_codes, convert_frame.input_codes):
        need(callable(getattr(known, "add", None)), "Dynamo's sets of known code have no `add`")
    code = function.__code__.replace(co_name="made")
    orig_code_map[code] = function.__code__
    need(orig_code_map[code] is function.__code__, "orig_code_map is no mapping")


@pytest.mark.contract("dynamo_frames")
def test_what_is_counted() -> None:
    heard = []
    with hooked(dynamo_frames.count(lambda kind, name: heard.append((kind, name)))):
        compiled = torch.compile(function, backend=as_it_is)
        compiled(torch.ones(3))
        compiled(torch.ones(3))
    need(heard == [("frame", f"{__name__}:function"), ("graph_compile", "as_it_is")], f"what is counted: {heard}")
    need("call_user_compiler" in vars(output_graph.OutputGraph), "OutputGraph has no call_user_compiler")


# --- _dynamo/package.py -----------------------------------------------------------------------------------------------


def breaking(x: torch.Tensor) -> torch.Tensor:
    y = torch.nn.functional.silu(x) * 2
    torch._dynamo.graph_break()
    return re_exported(y) + 1


def re_exported(x: torch.Tensor) -> torch.Tensor:
    return x * 3


@pytest.mark.contract("dynamo_package")
def test_dynamo_tells_a_package_all_that_it_makes() -> None:
    kept = compiled_by_dynamo(breaking, torch.ones(3))
    need(len(kept.frames) == 2, f"a graph break makes {len(kept.frames)} frames, not the function and its rest")
    (first, _), (rest, frame) = kept.frames
    wanted = {"code_context", "add_guarded_code", "add_inlined_source", "update_device_type"}
    wanted |= {"add_resume_function", "add_backend_id"}
    need(wanted <= set(kept.called), f"Dynamo no longer calls {sorted(wanted - set(kept.called))} of a package")
    ours = {name for name in vars(dynamo_package.Package) if not name.startswith("_")}
    need(set(kept.called) <= ours, f"Dynamo calls {sorted(set(kept.called) - ours)}, which ours does not have")
    need(first.code is breaking.__code__ and isinstance(first.dynamo_code, types.CodeType), "bytecode")
    need(pickle.loads(first.guards) is not None, "guards are no pickled state")
    need(len(first.graphs) == len(rest.graphs) == 1, "a frame's graphs are not told by add_backend_id")
    need(set(first.graphs) <= set(first.dynamo_code.co_names), "bytecode does not call its graph by that name")
    (name,) = first.resumes
    code, module = first.resumes[name]
    need(module == __name__ and isinstance(code, types.CodeType), "add_resume_function(code, module, name)")
    need(name in first.dynamo_code.co_names, "bytecode does not call the rest by the name that a package is told")
    need(rest.code is code and frame.code is code, "the rest is not compiled as the code that a package was told")
    need(frame.module == __name__, "the rest does not see the function's globals")
    need(first.inlined[0] is breaking.__code__, "add_inlined_source is not told the frame's own code")
    need(re_exported.__code__ in rest.inlined, "add_inlined_source is not told what was inlined")
    need(not first.bypassed and not rest.bypassed, "a plain function is bypassed")


@pytest.mark.contract("dynamo_package")
def test_dynamo_tells_a_package_its_imports() -> None:
    kept = compiled_by_dynamo(looks_elsewhere, torch.ones(3))
    ((frame, _),) = kept.frames
    need("add_import_source" in kept.called, "Dynamo does not tell a package what it imports (add_import_source)")
    need(frame.imports, "add_import_source does not take (alias, module_name)")
    for alias, module in frame.imports.items():
        need(importlib.import_module(module) is globals()[alias], f"{alias} is not {module} among the globals")


@pytest.mark.contract("code_bytes")
def test_constants_of_dynamo_s_bytecode_have_bytes() -> None:
    code = compiled_by_dynamo(keeps_constants, torch.ones(3)).frames[0][0].dynamo_code
    assert code is not None
    for value in (torch.device("cpu"), torch.float32):
        need(value in code.co_consts, f"{value!r} is no constant of bytecode around a graph break: {code.co_consts}")
    back = code_bytes.load(code_bytes.dump(code, {}, "<contract>"))
    need(back.co_consts == code.co_consts, f"constants come back as {back.co_consts}")
    more = (torch.device("cuda", 1), torch.float8_e4m3fn, torch.strided, torch.channels_last, (torch.int64,))
    odd = function.__code__.replace(co_consts=more)
    need(
        code_bytes.load(code_bytes.dump(odd, {}, "")).co_consts == more, "torch's constants are not told by their text"
    )


def keeps_constants(x: torch.Tensor) -> torch.Tensor:
    y, device, dtype = x * 2, x.device, x.dtype
    torch._dynamo.graph_break()
    return y.to(device, dtype)


def looks_elsewhere(x: torch.Tensor) -> torch.Tensor:
    return python_module.scaled(x)


python_module: Any = types.ModuleType("aot_cache_contract_sample")
exec("FACTOR = 3\ndef scaled(x):\n    return x * FACTOR", vars(python_module))  # noqa: S102 - as it stands


@pytest.fixture(autouse=True)
def _sample_module(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, python_module.__name__, python_module)


@pytest.mark.contract("dynamo_package")
def test_a_package_has_every_method_that_dynamo_calls() -> None:
    """Also those that only odd frames ask for: read from the source."""
    asked = set()
    for module in (convert_frame, output_graph, guards, importlib.import_module("torch._dynamo.symbolic_convert")):
        asked |= set(re.findall(r"\bpackage\.([a-z]\w+)\(", inspect.getsource(module)))
    theirs = {name for name in vars(package.CompilePackage) if not name.startswith("_")}
    asked = (asked & theirs) - {"initialize", "install", "cache_entry"}  # where torch makes its own
    ours = {name for name in vars(dynamo_package.Package) if not name.startswith("_")}
    need(asked <= ours, f"Dynamo calls {sorted(asked - ours)} of a package, which ours does not have")
    bypasses = {"bypass_current_entry", "bypass_current_compile"} & theirs
    need(len(bypasses) == 1, f"a package is bypassed by {sorted(bypasses)}")
    for name in asked:
        given, wanted = (parameters(vars(owner)[name]) for owner in (dynamo_package.Package, package.CompilePackage))
        need(given == wanted, f"CompilePackage.{name} takes {wanted[1:]}, ours {given[1:]}")
    made = dynamo_package.Package(function.__code__, __name__)
    getattr(made, bypasses.pop())()
    need(made.frame.bypassed, "a bypass is not noticed")


@pytest.mark.contract("dynamo_globals")
def test_globals_that_are_numbered() -> None:
    """`install_global_by_id` and `install_global`: names that mean nothing in another process."""
    source = inspect.getsource(output_graph.OutputGraph.install_global_by_id)
    need(
        'f"{prefix}_{id(value)}_c{self.compile_id}"' in source,
        "install_global_by_id no longer makes names of an address and a compile's number",
    )
    need("self.compile_id: int" in inspect.getsource(output_graph.OutputGraph.__init__), "and that is no number")
    unique = inspect.getsource(output_graph.OutputGraph.install_global)
    need("unique_id(" in unique or "unique_id_unbound_in(" in unique, "install_global no longer numbers names")
    for name in (
        "__abc_140_c0",
        "_140_c12",
        "__gen_rand_values_3",
        "__warnings_warn_wrapper_0",
    ):
        code = compile(f"def f(): return {name}", "x", "exec").co_consts[0]
        need(dynamo_package.numbered_globals(code) == [name], f"{name} is not taken for a numbered name")
    code = compile("def f(): return __compiled_fn_1_ab, torch, __import_torch", "x", "exec").co_consts[0]
    need(dynamo_package.numbered_globals(code) == [], "names that are kept are taken for numbered ones")


@pytest.mark.contract("dynamo_globals")
def test_the_builtins_have_a_name_of_ours() -> None:
    owner = output_graph.OutputGraph
    need(parameters(owner.install_builtins_dict_in_fglobals) == ["self"], "install_builtins_dict_in_fglobals()")
    before = owner.install_builtins_dict_in_fglobals
    scope: dict[str, Any] = {"__builtins__": __builtins__}
    with dynamo_inputs.session({}, 8):
        need(owner.install_builtins_dict_in_fglobals is not before, "it cannot be replaced")
        name = owner.install_builtins_dict_in_fglobals(types.SimpleNamespace(global_scope=scope))
    need(owner.install_builtins_dict_in_fglobals is before, "the name stays ours")
    need(name == dynamo_inputs.BUILTINS and scope[name]["len"] is len, "get_builtins_dict gives no dict of builtins")
    kept = compiled_by_dynamo(counting, [torch.ones(3)] * 2)
    state = package.load_guards_state(kept.frames[0][0].guards)
    need(
        state.output_graph.name_of_builtins_dict_key_in_fglobals == dynamo_inputs.BUILTINS,
        "the guards' state does not say by which global the builtins are called",
    )


def counting(xs: list[torch.Tensor]) -> torch.Tensor:
    return xs[0] * len(xs) * max(2, len(xs))


# --- _dynamo/guards.py ------------------------------------------------------------------------------------------------


@pytest.mark.contract("dynamo_guards")
def test_which_guards_compare_by_identity() -> None:
    known = {"DICT_VERSION", "NN_MODULE", "ID_MATCH", "FUNCTION_MATCH", "CLASS_MATCH", "MODULE_MATCH"}
    known |= {"CLOSURE_MATCH", "WEAKREF_ALIVE"}
    found = set(guards.CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES)
    need(found == known, f"UNSUPPORTED_SERIALIZATION_GUARD_TYPES changed: {sorted(found ^ known)}")


@pytest.mark.contract("dynamo_guards")
def test_how_guards_are_filtered_and_written() -> None:
    found = inspect.signature(guards.CheckFunctionManager.__init__).parameters
    need("guard_filter_fn" in found, "CheckFunctionManager takes no guard_filter_fn")
    need(found["guard_filter_fn"].default is None, "guard_filter_fn is not None by default")
    entry = {field.name for field in dataclasses.fields(guards.GuardFilterEntry)}
    needed = {"guard_type", "derived_guard_types", "value", "has_value", "orig_guard"}
    need(needed <= entry, f"a filter is not told {sorted(needed - entry)}")
    need(parameters(guards.pickle_guards_state) == ["state", "builder"], "pickle_guards_state(state, builder)")
    need("pickle_guards_state(" in inspect.getsource(guards.CheckFunctionManager.serialize_guards), "by module name")
    fields = {field.name for field in dataclasses.fields(guards.GuardsState)}
    need({"output_graph", "shape_code_parts"} <= fields, "GuardsState has other fields")
    need(fields <= {"output_graph", "shape_code_parts", "local_state"}, f"GuardsState has more: {sorted(fields)}")


@pytest.mark.contract("dynamo_guards")
def test_the_fields_of_a_guard() -> None:
    fields = {field.name for field in dataclasses.fields(Guard)}
    ours = {"create_fn", "guard_types", "code_list", "obj_weakref", "guarded_class_weakref", "stack", "user_stack"}
    need(ours | {"_hash", "originating_source"} <= fields, f"a Guard has no {sorted(ours - fields)}")
    known = ours | {"_hash", "originating_source", "_unserializable", "_force_dict_keys_match"}
    need(fields <= known, f"a Guard has {sorted(fields - known)}: does it belong to the process that made it?")


@pytest.mark.contract("dynamo_guards")
def test_how_a_tensor_is_unpickled() -> None:
    wanted = ["meta_tensor", "device", "pytype", "dispatch_keys_raw", "grad"]
    unpickle = guards.GuardsStatePickler._unpickle_tensor
    need(parameters(unpickle) == wanted, f"GuardsStatePickler._unpickle_tensor takes {parameters(unpickle)}")
    need(parameters(guards.GuardsStatePickler.reducer_override) == ["self", "obj"], "reducer_override(obj)")
    made = unpickle(torch.empty(3, device="meta"), torch.device("cpu"), torch.nn.Parameter, 0, None)
    need(isinstance(made, FakeTensor) and made.pytype is torch.nn.Parameter, "a tensor is not read as a fake one")
    source = inspect.getsource(guards.GuardsStatePickler.reducer_override)
    need("_unpickle_tensor, (" in re.sub(r"\s+", " ", source), "reducer_override does not write (function, arguments)")


@pytest.mark.contract("dynamo_guards")
def test_the_state_that_is_guarded_is_json() -> None:
    from torch._C._dynamo.guards import GlobalStateGuard

    state = GlobalStateGuard()
    values = json.loads(state.__getstate__())
    need(values["num_threads"] == torch.get_num_threads(), "GlobalStateGuard's JSON has no num_threads")
    values["num_threads"] += 1
    state.__setstate__(json.dumps(values))
    need(not state.check(), "GlobalStateGuard does not guard on what __setstate__ says")
    dynamo_guards._take_host_threads(state)
    need(state.check(), "GlobalStateGuard does not take the host's threads")
    known = set(
        "allow_bf16_reduce allow_fp16_reduce allow_tf32 autocast_state cuda_matmul_precision default_dtype "
        "deterministic_algorithms deterministic_algorithms_warn_only grad_mode num_threads torch_function "
        "torch_function_all_disabled".split()
    )
    need(set(values) <= known, f"GlobalStateGuard looks at {sorted(set(values) - known)}: whose business is it?")


@pytest.mark.contract("guard_facts")
def test_every_kind_of_guard_is_known() -> None:
    """Those that `GuardBuilder` has a method for: a kind of a new release is a graph that cannot be kept."""
    builder = vars(guards.GuardBuilder)
    found = {name for name, method in builder.items() if name.isupper() and "guard" in parameters(method)}
    need(len(found) > 40, f"GuardBuilder has no method for each kind of guard, only {sorted(found)}")
    need(
        found <= guard_facts.KINDS,
        f"kinds of guards that guard_facts does not know: {sorted(found - guard_facts.KINDS)}",
    )
    source = "".join(path.read_text() for path in (Path(torch.__file__).parent / "_dynamo").rglob("*.py"))
    asked = set(re.findall(r"\bGuardBuilder\.([A-Z_]+)\b", source))
    need(asked <= guard_facts.KINDS, f"Dynamo asks for guards {sorted(asked - guard_facts.KINDS)}")


@pytest.mark.contract("guard_facts")
@pytest.mark.parametrize("kind", sorted(guard_facts.KINDS - guard_facts.LIVENESS))
def test_a_value_of_another_type_is_a_difference_and_no_error(kind: str) -> None:
    """A call may pass None where the call that was built passed a list."""
    guard = types.SimpleNamespace(create_fn_name=lambda: kind, create_fn=None)
    for value in (None, 3, "text", object(), [1], {"a": 1}, torch.ones(2)):
        found = guard_facts.of_value(guard, value, in_order=True)  # type: ignore[arg-type]
        need(found is None or isinstance(found, str), f"{kind} of {value!r} is no text")


@pytest.mark.contract("guard_facts")
def test_what_a_guard_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard HASATTR says which attribute: by a name that it is made with or, up to torch 2.11, by its expression."""
    kept = compiled_by_dynamo(asks_for_attributes, torch.ones(3))
    ((made, frame),) = kept.frames
    asked = {name: text for kind, name, text in kept.values[0] if kind == "HASATTR"}
    need(set(asked) == {"G['holder'].there", "G['holder'].missing"}, f"a guard HASATTR is about {sorted(asked)}")
    need(len(set(asked.values())) == 2, f"what is there and what is not read alike: {asked}")

    def holds() -> bool:
        recorded = kept.identities[0], kept.values[0]
        given = {"x": torch.ones(3)}
        return not dynamo_guards.build(made.guards, *recorded, asks_for_attributes.__code__, frame.f_globals, given)[1]

    need(holds(), "guards on attributes do not hold for what they were made of")
    with monkeypatch.context() as patch:
        patch.delattr(Holder, "there")
        need(not holds(), "an attribute that is gone goes unnoticed")
    monkeypatch.setattr(Holder, "missing", 1, raising=False)
    need(not holds(), "an attribute that is new goes unnoticed")


class Holder:
    there = 3


holder = Holder()


def asks_for_attributes(x: torch.Tensor) -> torch.Tensor:
    if hasattr(holder, "there") and not hasattr(holder, "missing"):
        return x * 2
    return x


@pytest.mark.contract("dynamo_guards")
def test_guards_are_read_again_for_a_living_call() -> None:
    kept = compiled_by_dynamo(guarded, torch.ones(3), {"k": 4})
    ((made, frame),) = kept.frames
    need(kept.nameless == [[]], f"guards on objects without a name: {kept.nameless}")
    names = {name for _, name, _ in kept.identities[0]}
    need("G['re_exported']" in names, f"a function is not guarded by identity: {sorted(names)}")

    def check(x: Any, options: Any, f_globals: Any = frame.f_globals) -> str:
        given = {"x": x, "options": options}
        manager, why = dynamo_guards.build(
            made.guards, kept.identities[0], kept.values[0], guarded.__code__, f_globals, given
        )
        need((manager is None) == bool(why), "a guard manager without a reason, or the other way round")
        if manager is not None:
            need(manager.check(given) is True, "a manager that was built does not hold")
            said = dynamo_guards.expressions(manager)
            need(said, "a manager has no verbose_code_parts")
            own = [text for text in said if " at 0x" in text or str(ROOT) in text]
            need(not own, f"Dynamo's words for a guard name an address or a file: {own}")
        return str(why)

    need(check(torch.ones(3), {"k": 4}) == "", "guards do not hold for the call that they were made of")
    with torch.inference_mode():
        inference = torch.ones(3)
    need(check(inference, {"k": 4}) == "", "guards do not hold for an inference tensor")
    need("k" in check(torch.ones(3), {"k": 5}), "a guard on a value holds for another")
    need("size" in check(torch.ones(4), {"k": 4}), "a guard on a size holds for another")
    need(check(torch.ones(3, dtype=torch.float64), {"k": 4}), "a guard on a dtype holds for another")
    need(check(torch.ones(3), {}), "guards hold for a dict without the key")
    need(check(torch.ones(3), None), "guards hold for None")
    replaced = {**frame.f_globals, "re_exported": function}
    need("re_exported" in check(torch.ones(3), {"k": 4}, replaced), "a function that was replaced goes unnoticed")
    torch.set_num_threads(before := torch.get_num_threads())
    try:
        torch.set_num_threads(before + 1)
        need(check(torch.ones(3), {"k": 4}) == "", "guards depend on the number of threads")
    finally:
        torch.set_num_threads(before)
    with torch.no_grad():
        need("grad_mode" in check(torch.ones(3), {"k": 4}), "guards hold in another grad mode")


@pytest.mark.contract("dynamo_guard_timing")
def test_how_fast_new_guards_are_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream clears the processor's caches for it. Neither for guards that are made inside, nor for guards that are read."""
    asked: list[int] = []
    monkeypatch.setattr(guards, "profile_guard_manager", lambda *_: asked.append(1) or 0.0)
    with dynamo_guard_timing.skipped():
        kept = compiled_by_dynamo(guarded, torch.ones(3), {"k": 4})
        ((made, frame),) = kept.frames
        given = {"x": torch.ones(3), "options": {"k": 4}}
        facts = (kept.identities[0], kept.values[0])
        manager, _ = dynamo_guards.build(made.guards, *facts, guarded.__code__, frame.f_globals, given)
    need(manager is not None and not asked, "new guards are timed")
    torch.compile(guarded, backend="eager")(torch.ones(3), {"k": 5})
    need(asked == [1], f"upstream times new guards {len(asked)} times: is it called otherwise now?")


def guarded(x: torch.Tensor, options: Any) -> torch.Tensor:
    return re_exported(x) * options["k"]


@pytest.mark.contract("dynamo_guards")
def test_guards_are_the_same_bytes_twice() -> None:
    """With nothing of the process in them: no stack, no path, no weak reference."""
    first = compiled_by_dynamo(guarded, torch.ones(3), {"k": 4}).frames[0][0].guards
    torch._dynamo.reset()
    second = compiled_by_dynamo(guarded, torch.ones(3), {"k": 4}).frames[0][0].guards
    need(first == second, "guards hold something of the process, or of the moment")
    need(str(ROOT).encode() not in first, "guards hold the path of a file")


@pytest.mark.contract("dynamo_guards", "guard_facts")
def test_keys_that_tell_tensors_apart_by_where_they_were_made() -> None:
    key = torch._C.DispatchKey
    with torch.inference_mode():
        inference = torch.ones(3)
    normal, found = (torch._C._dispatch_keys(t) for t in (torch.ones(3), inference))
    need(normal.raw_repr() != found.raw_repr(), "an inference tensor has the keys of others")
    for name in (key.ADInplaceOrView, key.AutogradFunctionality, key.Python, key.PythonTLSSnapshot):
        normal, found = normal.remove(name), found.remove(name)
    need(normal.raw_repr() == found.raw_repr(), "an inference tensor has other keys besides")
    need(isinstance(found.raw_repr(), int), "DispatchKeySet.raw_repr is no int")
    same = torch._C.DispatchKeySet.from_raw_repr(found.raw_repr())
    need(same.raw_repr() == found.raw_repr(), "DispatchKeySet.from_raw_repr does not undo raw_repr")
    keys = guard_facts.dispatch_keys
    with FakeTensorMode():
        need(keys(torch.ones(3)) == keys(inference), "a fake tensor has other keys besides")
    need(keys(torch.ones(3, device="meta")) != keys(inference), "keys do not tell devices apart")


@pytest.mark.contract("dynamo_guards")
def test_how_guards_are_loaded() -> None:
    need(parameters(package.load_guards_state) == ["guards_state"], "load_guards_state(guards_state)")
    need(
        parameters(package.load_guard_manager) == ["guards_state", "target_code", "runtime_global_scope"],
        "load_guard_manager(guards_state, target_code, runtime_global_scope)",
    )
    strict = torch._dynamo.config.strict_precompile
    need(strict in (True, False), "torch._dynamo.config.strict_precompile is gone")


# --- what Dynamo is told before it traces -----------------------------------------------------------------------------


@pytest.mark.contract("dynamo_answers", "dynamo_inputs")
def test_dimensions_are_dynamic_within_their_bounds() -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    x, frames = torch.ones(5, 3), []

    def handle(frame: Frame, go_on: Any) -> Any:
        frames.append(frame)
        dynamo_inputs.mark(frame, {"L['x']": [[0, 2, 9]]})
        return go_on(None)

    with hooked(dynamo_frames.intercept_compile(handle)):
        with dynamo_inputs.session({"L['x']": [[0, 2, 9]], "L['k']": [[-1, 2, 40]]}, 8):
            need(torch.compiler.config.dynamic_sources == "L['k']", "torch.compiler.config.dynamic_sources")
            compiled = torch.compile(sized, backend=backend, fullgraph=True)
            for size, k in ((5, 20), (2, 3), (9, 40)):
                x = torch.ones(size, 3)
                need(compiled(x, k).tolist() == (x * k).tolist(), "a dynamic graph computes something else")
    need(len(frames) == 1 and len(graphs) == 1, f"{len(frames)} frames for sizes within the bounds")
    (bounds,) = [dynamo_answers._bounds(node) for node in next(iter(reversed(graphs[0].graph.nodes))).args[0]]
    need(bounds == [(0, 2, 9)], f"an output's bounds are {bounds}, by ShapeEnv.bound_sympy")
    run = dynamo_answers.answer(graphs[0])
    need(isinstance(graphs[0], torch.fx.GraphModule), "a backend is not handed a GraphModule")
    need(callable(run), "a graph cannot be answered")


@pytest.mark.contract("dynamo_inputs")
def test_a_virtual_tensor_s_size_can_be_unbacked() -> None:
    """Left alone, some releases make a constant of it (`transfer_symbols_from_foreign_shape_env`)."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([found for found in inputs if isinstance(found, torch.SymInt)])
        return graph.forward

    compiled = torch.compile(lambda x: x * 2, backend=backend, fullgraph=True)
    with dynamo_inputs.session({}, 8):
        for size in (1, 4, 7):
            with FakeTensorMode():
                x = torch.ones(size, 3)
            torch._dynamo.decorators.mark_unbacked(x, 0)
            need(tuple(compiled(x).shape) == (size, 3), "another shape")
    need(len(graphs) == 1, f"{len(graphs)} graphs for sizes that are marked as unbacked")
    need(len(graphs[0]) == 1, "the graph takes no size")


def sized(x: torch.Tensor, k: int) -> torch.Tensor:
    return x * k


@pytest.mark.contract("dynamo_inputs")
def test_settings_of_a_session() -> None:
    before = torch._dynamo.config.recompile_limit
    with dynamo_inputs.session({}, 5):
        config = torch._dynamo.config
        need((config.recompile_limit, config.accumulated_recompile_limit) == (5, 40), "Dynamo's limits")
        need(config.fail_on_recompile_limit_hit and not config.automatic_dynamic_shapes, "Dynamo's settings")
    need(torch._dynamo.config.recompile_limit == before, "a setting stays")


@pytest.mark.contract("dynamo_inputs")
def test_mark_dynamic_takes_bounds() -> None:
    needed = ["t", "index", "min", "max"]
    found = parameters(torch._dynamo.mark_dynamic)
    need(set(needed) <= set(found) and found[:2] == needed[:2], f"mark_dynamic takes {found}")


@pytest.mark.contract("dynamo_off")
def test_the_moment_a_compiled_function_is_called() -> None:
    """dynamo_off replaces `_callback_from_stance`, which is looked up and asked at each call."""
    need(parameters(eval_frame._callback_from_stance) == ["callback"], "_callback_from_stance(callback)")
    code = """
from aot_cache.upstream.virtual import dynamo_off
noted = []
from aot_cache.upstream.hooks import dynamo_calls
dynamo_off.run_as_python()
dynamo_calls.note_calls(lambda *call: noted.append(call))
import sys
assert "torch" not in sys.modules, "it imports torch"
import torch
traced = []
def backend(graph, inputs):
    traced.append(graph)
    return graph.forward
@torch.compile(backend=backend)
def f(x): return x * 2
class M(torch.nn.Module):
    def forward(self, x): return f(x) + 1
m = torch.compile(M(), backend=backend)
assert not noted
assert f(torch.ones(2)).tolist() == [2, 2] and len(noted) == 1, noted
function, args, kwargs, _ = noted[0]
assert function.__name__ == 'f' and len(args) == 1 and kwargs == {}, noted
assert m(torch.ones(2)).tolist() == [3, 3] and len(noted) >= 2, noted
before = len(noted)
torch.compiler.disable(f)(torch.ones(2)), (lambda x: x * 2)(torch.ones(2))
assert not traced, "it was compiled"
print("fine")
"""
    done = python(code, {"PYTHONPATH": str(ROOT)})
    need(done.stdout.strip() == "fine", f"a compiled function is compiled, or not noticed: {done.stderr[-700:]}")


@pytest.mark.contract("dynamo_off")
def test_a_compiled_function_that_wants_its_whole_graph_runs_as_python() -> None:
    code = """
from aot_cache.upstream.virtual import dynamo_off
dynamo_off.run_as_python()
import torch
print(torch.compile(lambda x: x * 2, fullgraph=True)(torch.ones(2)).tolist())
"""
    done = python(code, {"PYTHONPATH": str(ROOT)})
    assert done.stdout.strip() == "[2.0, 2.0]", done.stderr[-300:]


# --- Inductor ---------------------------------------------------------------------------------------------------------


def setting(config: Any, name: str) -> Any:
    return functools.reduce(getattr, name.split("."), config)


@pytest.mark.parametrize("name", inductor_artifact.MEASURED)
@pytest.mark.contract("inductor_target")
def test_choices_that_inductor_measures(name: str) -> None:
    need(setting(inductor, name) in (True, False), f"torch._inductor.config.{name} is gone, or no switch")
    with inductor.patch({name: False}):
        need(setting(inductor, name) is False, f"torch._inductor.config.{name} cannot be switched off")


@pytest.mark.parametrize("name", inductor_artifact._SETTINGS)
@pytest.mark.contract("inductor_artifact")
def test_settings_of_the_artifact(name: str) -> None:
    need(setting(functorch, name) in (True, False), f"torch._functorch.config.{name} is gone, or no switch")
    with functorch.patch(inductor_artifact._SETTINGS):
        need(setting(functorch, name) is True, f"torch._functorch.config.{name} cannot be switched on")


@pytest.mark.contract("dynamo_globals")
def test_the_settings_that_code_depends_on() -> None:
    found = json.loads(dynamo_globals.settings())
    need(found == json.loads(dynamo_globals.settings()), "Inductor's settings differ from call to call")
    need("max_fusion_size" in found and "triton.cudagraphs" in found, "save_config_portable has other names")
    need(not any("0x" in value or "object at" in value for value in found.values()), "a setting is an address")
    with inductor.patch({"max_fusion_size": inductor.max_fusion_size + 1}):
        other = json.loads(dynamo_globals.settings())
        need({k for k in other if other[k] != found[k]} == {"max_fusion_size"}, "another setting is not seen")
    unknown = [
        name for name in dynamo_globals._HOW if not any(k.startswith(name) for k in inductor.save_config_portable())
    ]
    gone = {
        "compile_threads",
        "worker_",
        "torchinductor_worker",
        "quiesce_",
        "profile_bandwidth",
        "TYPE_CHECKING",
        "halide.",
        "xpu.",
        "tpu_",
    }
    gone |= {"cutlass.", "cuda.cutlass", "rocm.", "cpp.cxx", "log_", "aot_inductor"}
    need(set(unknown) <= gone, f"settings that do not count are not there: {sorted(set(unknown) - gone)}")


@pytest.mark.contract("inductor_artifact")
def test_the_artifact_of_a_graph() -> None:
    serializable = inductor_artifact.Serializable
    need(parameters(serializable.serialize_compile_artifacts) == ["fn"], "serialize_compile_artifacts(fn)")
    need(parameters(serializable.deserialize_compile_artifacts) == ["data"], "deserialize_compile_artifacts(data)")
    names = []

    def backend(graph: Any, inputs: Any) -> Any:
        names.append(inductor_artifact.name_of(graph))
        return graph.forward

    ((made, _),) = compiled_by_dynamo(function, torch.ones(3), backend=backend).frames
    need(made.graphs == names, "a package is told another name of a graph")
    need(
        made.dynamo_code is not None and names[0] in made.dynamo_code.co_names,
        "a graph's _backend_id is not the name by which bytecode calls it",
    )


@pytest.mark.contract("inductor_artifact")
def test_where_the_cache_folders_are_asked_for() -> None:
    """Each function that is replaced while a graph is loaded is there."""
    from torch._inductor.runtime import cache_dir_utils

    for name, functions in inductor_artifact._ASKS.items():
        module = importlib.import_module(name)
        for function in functions:
            need(
                getattr(module, function) is getattr(cache_dir_utils, function), f"{name} has no {function} of its own"
            )
    need(parameters(cache_dir_utils.cache_dir) == [], "cache_dir()")
    need(parameters(cache_dir_utils.triton_cache_dir) == ["device"], "triton_cache_dir(device)")


@pytest.mark.contract("inductor_artifact")
def test_a_graph_is_loaded_in_folders_of_this_thread_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a load writes (source, Triton's binaries) goes to its private folders; another thread sees the ordinary ones."""
    from torch._inductor import codecache, triton_bundler
    from torch._inductor.runtime import triton_heuristics

    ordinary = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    for variable, folder in ordinary.items():
        monkeypatch.setenv(variable, folder)
    kernel = triton_bundler.TritonKernelArtifact("kernel.cubin", b"a binary")
    bundle = triton_bundler.TritonBundle([triton_bundler.TritonKernelArtifacts("HASH", 0, [kernel])], [])
    asked: list[str] = []

    def elsewhere() -> None:
        asked.extend([codecache.cache_dir(), triton_heuristics.triton_cache_dir(0)])

    with inductor_artifact._private_folder(b""), inductor.patch(bundle_triton_into_fx_graph_cache=True):
        source = Path(codecache.write("x = 1", "py")[1])
        triton_bundler.TritonBundler.read_and_emit(bundle)
        private = Path(triton_heuristics.triton_cache_dir(0))
        other = threading.Thread(target=elsewhere)
        other.start()
        other.join()
        need({name: os.environ[name] for name in ordinary} == ordinary, "a variable changed")
    need((private / "HASH" / "kernel.cubin").read_bytes() == b"a binary", "Triton's binaries are written elsewhere")
    need(source.is_relative_to(private), "a graph's source is written elsewhere")
    need(asked == list(ordinary.values()), f"another thread is told {asked}")
    need(
        not any(Path(folder).is_dir() and any(Path(folder).rglob("*.*")) for folder in ordinary.values()), "files there"
    )
    need(codecache.cache_dir() == ordinary["TORCHINDUCTOR_CACHE_DIR"], "the folders stay replaced")


@pytest.mark.contract("inductor_artifact")
def test_what_is_skipped_when_a_graph_is_loaded() -> None:
    """A copy of what was unpickled, the pool of compile workers, and torch's digest in the key of a kernel."""
    from torch._functorch._aot_autograd import aot_autograd_result
    from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels

    entry = aot_autograd_result.deserialize_bundled_cache_entry
    need(parameters(entry) == ["entry"], "deserialize_bundled_cache_entry(entry)")
    text = inspect.getsource(entry)
    need(text.count("deepcopy(entry)") == 1 and "from copy import deepcopy" in text, "it copies its entry otherwise")
    reading = inspect.getsource(inductor_artifact.Serializable.deserialize_compile_artifacts)
    need("deserialize_bundled_cache_entry(" in reading, "who calls it")
    need(parameters(AsyncCompile.use_process_pool) == [], "use_process_pool()")
    need(parameters(CompiledTritonKernels.key) == ["kernel_src"], "CompiledTritonKernels.key(kernel_src)")
    text = inspect.getsource(AsyncCompile.triton)
    need("self.use_process_pool()" in text and "CompiledTritonKernels.get(" in text, "a kernel is looked up otherwise")
    need("static_triton_bundle_key=CompiledTritonKernels.key(" in text, "the key in an artifact is another one")
    for method in (CompiledTritonKernels.get, CompiledTritonKernels.save, CompiledTritonKernels.remove_future):
        need("CompiledTritonKernels.key(" in inspect.getsource(method), f"{method.__name__} has another key")
    source = "a kernel's source"
    key = inductor_artifact._key_to_find(lambda _: "upstream's", source)
    need(key == "upstream's", "a bundle of an earlier release is not understood")
    found: Any = CompiledTritonKernels._cache
    own = inductor_artifact._key_of_source(None, source)
    found[own] = None
    try:
        need(inductor_artifact._key_to_find(lambda _: "upstream's", source) == own, "the key is not found")
    finally:
        del found[own]


@pytest.mark.contract("inductor_artifact")
def test_a_loaded_graph_is_not_copied() -> None:
    """A graph that was loaded runs; who wants to write it again is told why not."""
    import copy

    class Entry:
        pass

    seen: list[Any] = []

    def original(entry: Any) -> Any:
        seen.append(copy.deepcopy(entry))
        return entry

    with (
        mock.patch.object(inductor_artifact.aot_autograd_result, "deserialize_bundled_cache_entry", original),
        inductor_artifact._without_a_copy(),
    ):
        entry = inductor_artifact.aot_autograd_result.deserialize_bundled_cache_entry(Entry())  # type: ignore[arg-type]
    need(not isinstance(seen[0], Entry) and isinstance(copy.deepcopy(entry), Entry), "it is copied, or never again")
    with pytest.raises(TypeError, match="cannot be written again"):
        pickle.dumps(seen[0])


@pytest.mark.contract("inductor_binaries")
def test_which_files_of_triton_s_are_kept_and_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A static kernel's binary, where upstream looks for it; all files of another kernel."""
    from torch._inductor import triton_bundler
    from torch._inductor.runtime import runtime_utils, triton_heuristics

    def kernel(name: str) -> Any:
        files = [triton_bundler.TritonKernelArtifact(f"k{suffix}", name.encode()) for suffix in (".cubin", ".json")]
        return triton_bundler.TritonKernelArtifacts(runtime_utils.triton_hash_to_path_key(name), 0, files)

    def result(name: str) -> Any:
        return SimpleNamespace(kernel=SimpleNamespace(hash=name))

    def named(bundle: Any) -> list[list[str]]:
        return [[file.filename for file in one.artifacts] for one in bundle.kernel_artifacts]

    one, other, foreign = "1" * 64, "2" * 64, "3" * 64
    tuner = SimpleNamespace(compile_results=[result(one), result(other)])
    entry: Any = SimpleNamespace(kernel=tuner, cache_key="c", kernel_name="k")
    whole = triton_bundler.TritonBundle([kernel(one), kernel(other), kernel(foreign)], [entry])
    text = "k = async_compile.triton('k', '''''', device_str='cuda')\n"
    lean = inductor_binaries.kept(whole, text)
    need(named(lean) == [["k.cubin"], ["k.cubin"], ["k.cubin", "k.json"]], f"kept: {named(lean)}")
    need(
        inductor_binaries.kept(whole, text * 2) is whole, "files are left out where a kernel is not launched statically"
    )
    compiled, tuner.compile_results = tuner.compile_results, [result(other)]
    monkeypatch.setattr(triton_bundler, "triton_cache_dir", lambda device: str(tmp_path))
    for bundle in (lean, whole):
        left = inductor_binaries.write(bundle, compiled)
        need(named(left) == [["k.cubin", "k.json"]], f"left for upstream: {named(left)}")
        written = [path for path in tmp_path.rglob("*") if path.is_file()]
        place = tmp_path / runtime_utils.triton_hash_to_path_key(other) / "k.cubin"
        need(written == [place] and place.read_bytes() == other.encode(), f"written: {written}")
    looking = inspect.getsource(triton_heuristics.StaticTritonCompileResult.reload_cubin_path)
    need("triton_hash_to_path_key(self.kernel.hash)" in looking, "it is looked for elsewhere")
    need(
        "triton_cache_dir(" in looking and 'f"{self.kernel.name}{binary_ext}"' in looking, "it is looked for elsewhere"
    )
    need(parameters(triton_bundler.TritonBundler.read_and_emit) == ["bundle"], "read_and_emit(bundle)")


@pytest.mark.contract("inductor_artifact")
def test_no_private_folder_becomes_triton_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autotuner that is made where the variable is not set writes the folder that it is told into it."""
    from torch._inductor.runtime import triton_heuristics

    text = inspect.getsource(triton_heuristics.CachingAutotuner.__init__)
    need('os.environ["TRITON_CACHE_DIR"] = triton_cache_dir(' in text, "autotuners do not set the variable any more")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    for fails in (False, True):
        with contextlib.suppress(ZeroDivisionError), inductor_artifact._private_folder(b""):
            os.environ["TRITON_CACHE_DIR"] = triton_heuristics.triton_cache_dir(0)
            if fails:
                raise ZeroDivisionError
        need("TRITON_CACHE_DIR" not in os.environ, "a private folder stays in the variable")
    monkeypatch.setenv("TRITON_CACHE_DIR", "the user's")
    with inductor_artifact._private_folder(b""):
        pass
    need(os.environ["TRITON_CACHE_DIR"] == "the user's", "the user's folder is lost")


@pytest.mark.contract("inductor_target")
def test_a_backend_can_be_answered_for() -> None:
    """`instead` answers for Inductor wherever it would compile; what it answers is what bytecode calls."""
    seen = []

    def handler(wrapper: Any, backend: Any, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        seen.append((type(wrapper).__name__, type(graph).__name__, callable(backend)))
        return lambda *args: [args[0] * 50]

    with inductor_artifact.instead(handler):
        made = torch.compile(function)(torch.ones(3))
    need(seen == [("_TorchCompileInductorWrapper", "GraphModule", True)], f"Inductor's wrapper is not asked: {seen}")
    need(made.tolist() == [50] * 3, "the answer is not what runs")


@pytest.mark.contract("inductor_target")
def test_where_inductor_would_measure() -> None:
    """Each is looked up where it is called, and its answer without a measurement is the one that is given here."""
    from torch._inductor import scheduler
    from torch._inductor.codegen import wrapper
    from torch._inductor.fx_passes import pad_mm

    combine = inspect.getsource(scheduler.Scheduler.speedup_by_combo_kernel)
    unmeasured = re.search(r"if not config.benchmark_combo_kernel:\s+return True", combine)
    need(unmeasured is not None, "where combined kernels are not measured, they are not combined")
    creating = inspect.getsource(scheduler.Scheduler.create_combo_kernel_nodes)
    need("self.speedup_by_combo_kernel(" in creating, "it is not asked")
    generating = inspect.getsource(wrapper.PythonWrapperCodegen._generate)
    need("self.generate_and_run_autotune_block()" in generating, "kernels are tuned elsewhere at compile time")
    for check in ("should_pad_addmm", "should_pad_mm", "should_pad_bmm"):
        need("should_pad(" in inspect.getsource(getattr(pad_mm, check)), f"pad_mm.{check} asks something else")


@pytest.mark.contract("inductor_target", "inductor_tuning")
def test_how_a_kernel_is_compiled() -> None:
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner
    from torch._inductor.triton_bundler import TritonBundler

    found = inspect.signature(CachingAutotuner.precompile).parameters
    wanted = ["self", "warm_cache_only", "reload_kernel", "static_triton_bundle_key"]
    need(list(found) == wanted, f"CachingAutotuner.precompile takes {list(found)}")
    need([found[n].default for n in wanted[1:]] == [False, None, None], "its defaults are others")
    need(parameters(CachingAutotuner._precompile_worker) == ["self"], "_precompile_worker()")
    need(parameters(CachingAutotuner.is_statically_launchable) == ["self"], "is_statically_launchable()")
    need(parameters(TritonBundler.put_static_autotuner) == ["key", "kernel"], "put_static_autotuner(key, kernel)")
    text = inspect.getsource(CachingAutotuner.precompile)
    steps = ["self._precompile_worker()", "put_static_autotuner(", "self._make_launchers()"]
    places = [text.rindex(step) for step in steps]
    need(places == sorted(places), "a kernel is not compiled, kept for the artifact, and then loaded")
    need("compile_results" in inspect.getsource(CachingAutotuner.is_statically_launchable), "what is launchable")
    need(
        "self.configs = None" in inspect.getsource(CachingAutotuner._precompile_worker), "configs stay after compiling"
    )


@pytest.mark.contract("inductor_tuning")
def test_what_is_remembered_of_kernels() -> None:
    from torch._inductor.async_compile import CompiledTritonKernels

    need(parameters(CompiledTritonKernels.cache_clear) == [], "CompiledTritonKernels.cache_clear()")
    CompiledTritonKernels._cache["x"] = None  # type: ignore[assignment]
    CompiledTritonKernels.cache_clear()
    need(not CompiledTritonKernels._cache, "CompiledTritonKernels.cache_clear does not forget")


@pytest.mark.parametrize("hook", inductor_events._HOOKS, ids=lambda hook: hook[3])
@pytest.mark.contract("inductor_events")
def test_what_inductor_is_listened_to_for(hook: tuple[str, str, str, str]) -> None:
    module, owner, method, _ = hook
    place = getattr(importlib.import_module(module), owner)
    need(method in vars(place), f"{owner} has no {method} of its own")
    need(parameters(getattr(place, method))[0] == "self", f"{owner}.{method} is no method")
    others = [c for c in place.__subclasses__() if method in vars(c)]
    known = {"StaticallyLaunchedXpuKernel", "DebugAutotuner"}
    need({c.__name__ for c in others} <= known, f"{method} is overridden in {others}: it would not be counted")


@pytest.mark.contract("inductor_events")
def test_a_kernel_is_loaded_by_one_method() -> None:
    from torch._inductor.runtime import static_triton_launcher as launcher

    need(parameters(launcher.StaticallyLaunchedTritonKernel.load_kernel) == ["self", "device"], "load_kernel(device)")
    cuda = launcher.StaticallyLaunchedCudaKernel
    need(
        issubclass(cuda, launcher.StaticallyLaunchedTritonKernel), "CUDA's kernel is no StaticallyLaunchedTritonKernel"
    )
    text = inspect.getsource(launcher.StaticallyLaunchedTritonKernel.load_kernel)
    need("self.function is not None" in text, "a kernel that is loaded is loaded again")
    need("cubin_path" in text, "a kernel is not loaded from a file")


@pytest.mark.contract("inductor_target")
def test_the_places_where_inductor_touches_a_device() -> None:
    from torch._inductor.constant_folding import ConstantFolder
    from torch._inductor.fx_passes import joint_graph, post_grad
    from torch._inductor.runtime import triton_helpers

    need(parameters(ConstantFolder.run) == ["self"], "ConstantFolder.run()")
    for module in (joint_graph, post_grad):
        need(parameters(module.lazy_init) == ["input_device"], f"{module.__name__}.lazy_init(input_device)")
        need("lazy_init(" in inspect.getsource(module).replace("def lazy_init(", ""), "nobody calls lazy_init")
    need(parameters(triton_helpers.set_driver_to_gpu) == [], "set_driver_to_gpu()")
    need(inductor.compile_threads >= 1 and inductor.worker_suppress_logging in (True, False), "Inductor's workers")
    from torch._inductor.codegen import triton as codegen

    need(callable(codegen.get_fused_kernel_name), "codegen.triton has no get_fused_kernel_name")
    need("get_fused_kernel_name(" in inspect.getsource(codegen.TritonScheduling.define_kernel), "who names a kernel")
    need(callable(inductor_target.become), "inductor_target.become")


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a torch without CUDA has none of these")
@pytest.mark.contract("inductor_target")
def test_calls_into_the_cuda_runtime() -> None:
    for name in ("_cuda_getCurrentRawStream",):
        need(callable(getattr(torch._C, name, None)), f"torch._C.{name} is gone")
    for name in ("_exchange_device", "_maybe_exchange_device", "get_rng_state", "set_rng_state"):
        need(callable(getattr(torch.cuda, name, None)), f"torch.cuda.{name} is gone")


@pytest.mark.contract("inductor_cpp")
def test_libraries_of_the_cpu() -> None:
    from torch._inductor.codecache import CppCodeCache, CppPythonBindingsCodeCache

    found = parameters(CppCodeCache.load_async)
    wanted = ["main_code", "device_type", "submit_fn", "extra_flags", "optimized_code"]
    need(found[:5] == wanted, f"CppCodeCache.load_async takes {found}")
    need(set(found[5:]) <= {"needs_vec_isa", "kernel_needs_vec_isa"}, f"and {found[5:]}: part of the source's digest?")
    need(parameters(CppCodeCache._load_library) == ["path", "key"], "CppCodeCache._load_library(path, key)")
    for name in ("load_async", "_load_library"):
        need(isinstance(vars(CppCodeCache)[name], classmethod), f"CppCodeCache.{name} is no class method")
        need(name not in vars(CppPythonBindingsCodeCache), f"Python's bindings have a {name} of their own")
    need(".key = key" in inspect.getsource(CppCodeCache._load_library), "a library does not say its key")


@pytest.mark.contract("inductor_cpp")
def test_headers_are_compiled_once_for_all_builds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Under one name, which is that of plain torch.compile's: an own one for each build costs 15 s and 75 MB each time."""
    from torch._inductor import codecache, cpu_vec_isa

    need(
        parameters(codecache._precompile_header)[:2] == ["header", "hashable_cmd_line"],
        "_precompile_header takes others",
    )
    need(hasattr(cpu_vec_isa.valid_vec_isa_list, "cache_info"), "vector instructions are looked for more than once")
    lines = []

    def precompile_header(header: str, hashable_cmd_line: str, **command: Any) -> str:
        lines.append(hashable_cmd_line)
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(codecache, "_precompile_header", precompile_header)
    for folder in ("", "one", "other"):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / (folder or "plain")))
        with inductor_cpp.keeping() if folder else contextlib.nullcontext():
            with contextlib.suppress(RuntimeError):
                codecache.CppCodeCache.load_async("int main;", "cpu", None, (), "int kernel;")()
    need(len(lines) == 3 and len(set(lines)) == 1, f"headers are compiled under {len(set(lines))} names")


# --- fake tensors -----------------------------------------------------------------------------------------------------


@pytest.mark.contract("torch_fake")
def test_operators_go_through_dispatch() -> None:
    wanted = ["self", "func", "types", "args", "kwargs"]
    need(parameters(FakeTensorMode.dispatch) == wanted, f"FakeTensorMode.dispatch takes {wanted[1:]}")
    need("allow_non_fake_inputs" in parameters(FakeTensorMode.__init__), "FakeTensorMode(allow_non_fake_inputs=)")
    seen = []

    class Mode(torch_fake._base):  # type: ignore[misc]
        def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.append(func)
            return super().dispatch(func, types, args, kwargs)

    with Mode(allow_non_fake_inputs=True):
        made = torch.ones(3) * 2
    need(isinstance(made, FakeTensor), "an operator under the mode makes no fake tensor")
    need(torch.ops.aten.mul.Tensor in seen, "FakeTensorMode does not hand operators to dispatch")


@pytest.mark.contract("torch_fake")
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (7, 1, 3)])
def test_a_fake_tensor_can_be_made_without_its_mode(device: str, inference: bool, shape: tuple[int, ...]) -> None:
    mode = torch_fake.host_mode(device)
    with mode, torch.inference_mode(inference):
        like = torch.empty(2, 2, dtype=torch.bfloat16, device=device)
        wanted = torch.empty(shape, dtype=torch.bfloat16, device=device)
        made = torch_fake.of_shape(like, shape)
        products = [(one * 2).unsqueeze(0).stride() for one in (made, wanted)]

    def facts(tensor: Any) -> list[Any]:
        keys = torch._C._dispatch_keys(tensor)
        own = [type(tensor), tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device]
        return [
            *own,
            tensor.layout,
            tensor.requires_grad,
            tensor.is_inference(),
            tensor.fake_mode,
            str(keys),
            vars(tensor).keys(),
        ]

    need(facts(made) == facts(wanted), f"FakeTensor(mode, meta, device) is not what the mode makes: {facts(made)}")
    need(products[0] == products[1], "what is computed from it differs")
    need(made.untyped_storage()._cdata != wanted.untyped_storage()._cdata, "it shares memory")


@pytest.mark.contract("torch_fake")
def test_custom_operators_run_their_own_python() -> None:
    ran = []
    library = torch.library.Library("aot_cache_fake_contract", "DEF")
    try:
        library.define("body(Tensor x) -> Tensor")

        def body(x: torch.Tensor) -> torch.Tensor:
            ran.append(type(x))
            return torch.cat([x, x])

        library.impl("body", body, "CompositeExplicitAutograd")
        with torch_fake.HostMode("cpu"), torch.no_grad():
            made = torch.ops.aot_cache_fake_contract.body(torch.ones(3))
        need(ran == [FakeTensor], f"a custom operator does not run its Python on fake tensors: {ran}")
        need(isinstance(made, FakeTensor) and made.shape == (6,), "what it returns is lost")
        op = torch.ops.aot_cache_fake_contract.body.default
        need(op.namespace == "aot_cache_fake_contract", "an operator has no namespace")
    finally:
        library._destroy()
    need(torch.ops.aten.add.Tensor.namespace in torch_fake.BUILTIN, "aten is not builtin")


@pytest.mark.parametrize("read", [lambda x: x.item(), lambda x: x.nonzero(), lambda x: bool(x > 1)])
@pytest.mark.contract("torch_fake")
def test_values_that_a_fake_tensor_does_not_have(read: Any) -> None:
    with torch_fake.HostMode("cpu"), pytest.raises(torch_fake.NEEDS_VALUES):
        read(torch.empty(()))


@pytest.mark.contract("torch_fake")
def test_dynamo_traces_fake_tensors() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch_fake.HostMode("cpu"), torch.no_grad():
        made = torch.compile(function, backend=backend, fullgraph=True)(torch.empty(3, 4))
    need(len(graphs) == 1 and made.shape == (3, 4), "Dynamo does not trace under a fake tensor mode of ours")


@pytest.mark.contract("torch_fake", "real_tensors")
def test_what_is_a_parameter() -> None:
    with torch_fake.HostMode("cpu"):
        layer = torch.nn.Linear(2, 2)
        need(real_tensors.is_parameter(layer.weight), "a Parameter under a fake tensor mode is not told from a tensor")
        need(not real_tensors.is_parameter(layer.weight.detach()), "a plain tensor is taken for a Parameter")


# --- a device guard ---------------------------------------------------------------------------------------------------


@pytest.mark.contract("torch_guard")
def test_the_guard_for_a_torch_without_cuda() -> None:
    from pathlib import Path

    header = Path(torch.__file__).parent / "include" / "c10" / "core" / "impl" / "DeviceGuardImplInterface.h"
    text = header.read_text()
    need("struct NoOpDeviceGuardImpl" in text, "c10 has no NoOpDeviceGuardImpl")
    need("define C10_REGISTER_GUARD_IMPL(" in text, "c10 has no C10_REGISTER_GUARD_IMPL")
    need(sorted((Path(torch.__file__).parent / "lib").glob("libc10.*")), "torch ships no libc10")


# --- nothing is left --------------------------------------------------------------------------------------------------


def test_hooks_are_taken_out() -> None:
    for what in (
        convert_frame._compile,
        convert_frame.CatchErrorsWrapper.__call__,
        output_graph.OutputGraph.call_user_compiler,
        output_graph.OutputGraph.install_builtins_dict_in_fglobals,
        torch._TorchCompileInductorWrapper.__call__,
        guards.CheckFunctionManager.__init__,
        guards.GuardsStatePickler.reducer_override,
        guards.pickle_guards_state,
    ):
        assert what.__module__.partition(".")[0] == "torch", what
    assert UPSTREAM


# --- _dynamo/callback.py, _inductor/codecache.py: the second count ----------------------------------------------------


@pytest.mark.contract("second_count")
def test_what_the_second_count_reads() -> None:
    """A counter that is called otherwise would be zero for ever."""
    from torch._dynamo.callback import CallbackTrigger

    sources = "".join((Path(torch.__file__).parent / "_inductor" / name).read_text() for name in _COUNTING)
    for name in second_count._INDUCTOR:
        need(f'counters["inductor"]["{name}"] += 1' in sources, f"Inductor no longer counts {name}")
    common = (Path(torch.__file__).parent / "_dynamo" / "backends" / "common.py").read_text()
    need('counters["aot_autograd"]["total"] += 1' in common, "backends/common.py no longer counts aot_autograd's total")
    names = {trigger.name for trigger in CallbackTrigger}
    need({"DYNAMO", "CUDAGRAPH_RECORDING"} <= names, f"callbacks are triggered by {sorted(names)}")


_COUNTING = ("codecache.py", "async_compile.py")
