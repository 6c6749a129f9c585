"""What the smaller modules of aot_cache/upstream/ take for granted, a sentence each; see `test_upstream_contract.py`."""

from __future__ import annotations

import ast
import contextlib
import ctypes
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from contracts import ROOT, UPSTREAM, need, python
from limits import HANGS
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from aot_cache.upstream.codec import real_tensors
from aot_cache.upstream.hooks import capture_mode, cuda_libraries
from aot_cache.upstream.virtual import operator_rules, torch_factories


def said(code: str) -> Any:
    """The last line that `code` prints in a process of its own, as JSON."""
    done = python(code, {"CUDA_VISIBLE_DEVICES": ""})
    need(done.returncode == 0, done.stderr[-900:])
    return json.loads(done.stdout.splitlines()[-1])


IMPORTED = """
import json, sys
from aot_cache.upstream.after_import import after_import
whole = []
for name, last in (("torch._dynamo", "optimize"), ("triton", "__version__")):
    after_import(name, lambda name=name, last=last: whole.append(hasattr(sys.modules[name], last)))
before = list(whole)
import torch._dynamo, triton
print(json.dumps([before, whole]))
"""


@pytest.mark.contract("after_import")
def test_the_moment_of_an_import() -> None:
    before, whole = said(IMPORTED)
    need(before == [] and whole == [True, True], "Dynamo or Triton is not whole when its import has ended")


@pytest.mark.contract("capture_mode")
def test_the_mode_of_captures_is_exchanged_and_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = [0]

    def exchange(mode: Any) -> int:
        modes.append(ctypes.cast(mode, ctypes.POINTER(ctypes.c_int)).contents.value)
        ctypes.cast(mode, ctypes.POINTER(ctypes.c_int)).contents.value = modes[-2]
        return 0

    monkeypatch.setattr(capture_mode, "_exchange", lambda rocm: exchange)
    with capture_mode.relaxed():
        assert modes == [0, 2]
    assert modes == [0, 2, 0]
    need(torch.version.hip is None or isinstance(torch.version.hip, str), "torch.version.hip says nothing of ROCm")


@pytest.mark.contract("cuda_libraries")
def test_which_library_calls_are_made_before_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, with the device's questions answered: the operators are those that own cuBLAS, cuBLASLt and cuDNN."""
    called: list[str] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    _on_the_cpu(monkeypatch, 99, called)
    with Noted():
        cuda_libraries.prime()
        cuda_libraries.prime()
    wanted = ["aten.mm.default", "aten.addmm.default", "cudnn's handle"]
    found = [name for name in called if name in wanted]
    need(found == wanted, f"a product, a product with a bias and cuDNN's handle are {called}")
    schema = str(torch.ops.aten._cudnn_init_dropout_state.default._schema).partition(" *,")[0]
    need(schema.endswith("(float dropout, bool train, int dropout_seed,"), f"the state of a dropout: {schema}")
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 97)
    with Noted():
        cuda_libraries.prime()
    need("aten.convolution.default" in called, "MIOpen gets no convolution")


def _on_the_cpu(monkeypatch: pytest.MonkeyPatch, device: int, called: list[str]) -> None:
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, device, dtype: ones(*size))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=7))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: device)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cudnn_init_dropout_state", lambda *_, **__: called.append("cudnn's handle"))


@pytest.mark.contract("cuda_libraries")
def test_libraries_are_loaded_while_something_else_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a thread that has ended when the block has; what fails there is left to `prime`. Nothing where all is done."""
    _on_the_cpu(monkeypatch, 98, [])
    used: list[int] = []
    product, inside = torch.mm, threading.Event()

    def mm(one: Any, other: Any) -> Any:
        used.append(threading.get_ident())
        assert inside.wait(HANGS)  # the block runs at the same time
        if len(used) == 2:
            raise RuntimeError("out of memory")
        return product(one, other)

    monkeypatch.setattr(torch, "mm", mm)
    for _ in range(2):
        with cuda_libraries.meanwhile():
            inside.set()
        assert not any(thread.name == "aot-cache libraries" for thread in threading.enumerate())
    assert len(used) == 2 and threading.get_ident() not in used
    cuda_libraries.prime()
    assert used[2:] == [threading.get_ident()]
    with cuda_libraries.meanwhile():
        pass
    assert len(used) == 3
    monkeypatch.setattr(torch.cuda, "current_device", mock.Mock(side_effect=RuntimeError("no driver")))
    with cuda_libraries.meanwhile():
        pass
    assert len(used) == 3


STANCE = """
import json
import os
import subprocess
import sys
import torch
from torch._dynamo import convert_frame
from aot_cache.upstream.hooks import dynamo_stance

@torch.compile(backend="eager", dynamic=False)
def f(x):
    return x + 1

asked = []
undo = dynamo_stance.ask_where_recompiling_fails(convert_frame.CatchErrorsWrapper, lambda _, frame: asked.append(1))
f(torch.ones(3))
with torch.compiler.set_stance("fail_on_recompile"):
    f(torch.ones(3))
    here = len(asked)
    try:
        f(torch.ones(4))
        raised = ""
    except RuntimeError as error:
        raised = str(error)
undo()
print(json.dumps([here, len(asked), raised]))
"""


@pytest.mark.contract("dynamo_stance")
def test_where_recompiling_fails() -> None:
    hit, missed, raised = said(STANCE)
    need(hit == 0, "a call that hits is asked about under fail_on_recompile")
    need(missed == 1, f"a call that misses is asked about {missed} times under fail_on_recompile")
    need("recompil" in raised, f"under fail_on_recompile it raises {raised!r}")


ATTENTION = """
import json, sys
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from aot_cache.artifact import target
from aot_cache.upstream.virtual import inductor_attention

inductor_attention.choose_for(target.get("h200"))
found = []
for width in (64, 60):
    with FakeTensorMode(), torch.inference_mode():
        q, k, v = (torch.empty(1, 2, 8, width, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        graph = make_fx(torch.nn.functional.scaled_dot_product_attention, pre_dispatch=False)(q, k, v)
    found.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
print(json.dumps(found))
"""


@pytest.mark.contract("inductor_attention")
def test_which_attention_is_traced() -> None:
    fits, does_not = said(ATTENTION)
    flash = "aten._scaled_dot_product_flash_attention.default"
    need(flash in fits, f"attention that the device would fuse is traced as {fits}")
    need(flash not in does_not and does_not, f"attention that it would not fuse is traced as {does_not}")


RANKS = """
import json
import os
import subprocess
import sys
import torch
import torch.distributed as dist
from aot_cache.upstream.virtual import torch_fake_group
torch_fake_group.join(1, 3)
x = torch.ones(2)
dist.all_reduce(x)
print(json.dumps([dist.get_rank(), dist.get_world_size(), x.tolist()]))
"""


@pytest.mark.contract("torch_fake_group")
def test_a_job_that_is_not_there() -> None:
    need(said(RANKS) == [1, 3, [1.0, 1.0]], "a fake group is no job of 3 whose collectives return at once")


FAKE_GROUPS = """
import datetime
import json
import torch
import torch.distributed as dist
from aot_cache.upstream.virtual import torch_fake_group
torch_fake_group.only_fake(1, 3)
groups = [dist.new_group([0, 1, 2], backend="nccl", timeout=datetime.timedelta(seconds=1)), dist.new_group([1], backend="gloo")]
x = torch.ones(2)
for group in groups:
    dist.all_reduce(x, group=group)
gathered, sent = [None] * 3, [None]
dist.all_gather_object(gathered, {"a": 1}, group=groups[0])
dist.broadcast_object_list(sent, src=0, group=groups[0])
dist.monitored_barrier(group=groups[0], timeout=datetime.timedelta(seconds=1))
objects = [gathered, sent]
print(json.dumps([dist.get_backend(group) for group in groups] + [dist.get_world_size(groups[0]), x.tolist(), objects]))
"""


@pytest.mark.contract("torch_fake_group")
def test_groups_of_any_backend_are_fake() -> None:
    found, objects = said(FAKE_GROUPS), [[{"a": 1}] * 3, [None]]
    need(found == ["fake", "fake", 3, [1.0, 1.0], objects], f"a group with a backend of its own is not fake: {found}")


RANDOM = """
import json
import torch
from aot_cache.artifact import target
from aot_cache.builder import virtual_gpu
virtual_gpu.become(target.get("h200"))
generator, found = torch.cuda.default_generators[0], []
def note():
    state = generator.get_state()
    found.append([str(state.device), str(state.dtype), state.view(torch.int64).tolist(), generator.get_offset()])
with virtual_gpu.tensors():
    generator.manual_seed(5)
    note()
    before = torch.cuda.get_rng_state()
    generator.set_state(torch.tensor([7, 32], dtype=torch.int64).view(torch.uint8))
    note()
    with torch.random.fork_rng(devices=[0]):
        torch.rand(3, device="cuda")
        generator.set_offset(64)
        note()
    note()
    torch.cuda.set_rng_state(before)
    note()
print(json.dumps(found))
"""


@pytest.mark.contract("torch_random")
def test_the_state_of_a_generator_is_a_seed_and_an_offset() -> None:
    """FlashInfer reads both from the state of a CUDA generator, moves the offset, and sets it again."""
    found = said(RANDOM)
    wanted = [["cpu", "torch.uint8", state, state[1]] for state in ([5, 0], [7, 32], [7, 64], [7, 32], [5, 0])]
    need(found == wanted, f"a CUDA generator's state is not 16 bytes in host memory: {found}")


EQUAL = """
import json
import torch
from aot_cache.artifact import target
from aot_cache.builder import virtual_gpu
from aot_cache.errors import DataDependent
virtual_gpu.become(target.get("h200"))
places = []
with virtual_gpu.tensors():
    x, unknown = torch.tensor([1, 2], device="cuda"), torch.rand(2, device="cuda").long()
    found = [torch.equal(x, torch.tensor([1, two], device="cuda")) for two in (2, 3)]
    found.append(torch.equal(unknown, torch.empty(3, device="cuda", dtype=torch.int64)))
    try:
        torch.equal(x, unknown)
    except DataDependent as error:
        found.append(str(error).partition(" reads")[0])
    with virtual_gpu.assuming(lambda what, place: places.append(what)):
        found += [torch.equal(unknown, unknown), torch.equal(x, unknown)]
print(json.dumps([found, len(places)]))
"""


@pytest.mark.contract("torch_tensor")
def test_tensors_are_compared() -> None:
    found, places = said(EQUAL)
    need(found == [True, False, False, "equal()", True, False], f"torch.equal is no longer one operator: {found}")
    need(places == 3, "each unknown tensor is assumed, and said")


@pytest.mark.contract("operator_rules")
def test_operators_get_rules() -> None:
    library = torch.library.Library("aot_cache_rules", "DEF")
    try:
        library.define("without(Tensor x) -> Tensor")
        library.define("with_one(Tensor x) -> Tensor")
        library.impl("without", lambda x: x * 2, "CUDA")
        library.impl("with_one", lambda x: x.new_empty(2), "Meta")
        rule = dict.fromkeys(("without", "with_one", "is_not_there"), operator_rules.same)
        operator_rules.add({f"aot_cache_rules::{name}": one for name, one in rule.items()})
        x = torch.empty(3, 5, device="meta").t()
        made = torch.ops.aot_cache_rules.without(x)
        need((made.shape, made.stride()) == (x.shape, x.stride()), "a rule that was registered is not used")
        need(torch.ops.aot_cache_rules.with_one(x).shape == (2,), "an operator's own rule was replaced")
        need(
            operator_rules.operator("aot_cache_rules::without") is torch.ops.aot_cache_rules.without.default, "by name"
        )
        for name in ("aot_cache_rules::is_not_there", "no_library_of_this_name::op"):
            need(operator_rules.operator(name) is None, "an operator that is not there is found")
    finally:
        library._destroy()


CAPTURE = """
import json
import torch
from aot_cache.artifact import target
from aot_cache.builder import virtual_gpu
virtual_gpu.become(target.get("h200"))
pools = [torch.cuda.graph_pool_handle() for _ in range(2)]
graph, seen = torch.cuda.CUDAGraph(), []
with virtual_gpu.tensors():
    x = torch.ones(4, device="cuda")
    with torch.cuda.graph(graph, pool=pools[0]):
        seen.append(torch.cuda.is_current_stream_capturing())
        y = x * 2
    seen.append(torch.cuda.is_current_stream_capturing())
    graph.replay()
    graph.reset()
print(json.dumps([seen, list(y.shape), graph.pool() == pools[0], pools[0] != pools[1]]))
"""


@pytest.mark.contract("torch_graphs")
def test_a_capture_that_runs_nothing() -> None:
    """`torch.cuda.graph` takes the class from its own module, and all that it calls around it is there without a GPU."""
    need(said(CAPTURE) == [[True, False], [4], True, True], "a capture on the virtual device does not run as host code")


FAKE_HOST = """
import json
import torch
from aot_cache.artifact import target
from aot_cache.upstream.virtual import inductor_target, torch_fake_host
inductor_target.become(target.get("h200"))
from torch._subclasses.fake_tensor import FakeTensor
traced = []
def backend(graph, inputs):
    traced.append([type(one).__name__ for one in inputs])
    return graph.forward
with torch_fake_host.running():
    host = torch.zeros(4, pin_memory=True)
    host.numpy()[1] = 5
    made = [torch.tensor([1, 2], device="cuda"), host.to("cuda"), host.pin_memory().cuda()]
    made += [made[1].new_tensor([3.0]), torch.empty(2, device="cuda", pin_memory=False), torch.randn(2).to("cuda:0")]
    with torch.inference_mode():  # `aten.to.device` is not taken apart
        made += [host.to("cuda"), host.to(device="cuda:0", dtype=torch.long, non_blocking=True)]
    host.copy_(torch.arange(4.0))
    with torch_fake_host.compiling():
        torch.compile(lambda x: x * 2, backend=backend, fullgraph=True)(made[1])
    kinds = [isinstance(one, FakeTensor) and one.device.type == "cuda" for one in made]
    print(json.dumps([kinds, type(host).__name__, host.tolist(), len(traced)]))
"""


@pytest.mark.contract("torch_fake", "torch_fake_host")
def test_host_code_with_fake_tensors_on_the_device_only() -> None:
    found = said(FAKE_HOST)
    need(
        found == [[True] * 8, "Tensor", [0.0, 1.0, 2.0, 3.0], 1],
        f"host code of an engine with fake CUDA tensors: {found}",
    )


UNIFORM = """
import json
import torch
from aot_cache.artifact import target
from aot_cache.upstream.virtual import inductor_target, torch_fake
inductor_target.become(target.get("h200"))
from torch._inductor import standalone_compile
made = []
def backend(graph, inputs):
    made.append(standalone_compile(graph, inputs, dynamic_shapes="from_example_inputs"))
    return graph.forward
with torch_fake.HostMode("cuda"):
    x = torch.empty(8, dtype=torch.int64, device="cuda")
    torch.compile(lambda x: (x >= 3) * 0 + x * 0 + torch.full((8,), 2, device="cuda"), backend=backend, fullgraph=True)(x)
print(json.dumps(len(made)))
"""


@pytest.mark.contract("inductor_target")
def test_constants_of_a_graph_need_no_gpu() -> None:
    """A product with 0 is a constant whatever the other operand is (the first rank's part of a vocabulary begins at 0)."""
    need(said(UNIFORM) == 1, "a graph with constants cannot be compiled without a GPU")


SECOND_GPU = """
import json
import torch
from aot_cache.artifact import target
from aot_cache.builder import virtual_gpu
from aot_cache.upstream.virtual import this_gpu
this_gpu.become(2, 4)
virtual_gpu.become(target.get("h200"))
from triton.runtime import driver
with virtual_gpu.tensors():
    tensors = [torch.empty(2, device="cuda"), torch.zeros(2, device="cuda:2"), torch.ones(2).cuda(), torch.arange(2).to("cuda")]
    tensors += [torch.tensor([1], device="cuda"), torch.ones(2).to("cuda") + 1, torch.nn.Linear(2, 2).cuda().weight]
    places = sorted({str(one.device) for one in tensors} | {str(torch.Generator("cuda").device)})
    numbers = [torch.cuda.current_device(), torch.accelerator.current_device_index(), driver.active.get_current_device()]
    numbers += [torch.cuda.current_stream().device_index, torch.device("cuda", torch.cuda.current_device()).index]
    counts = [torch.cuda.device_count(), torch.accelerator.device_count(), torch.cuda._device_count_nvml()]
print(json.dumps([places, numbers, counts, len(torch.cuda.default_generators)]))
"""


@pytest.mark.contract("this_gpu")
def test_a_gpu_with_another_number() -> None:
    found = said(SECOND_GPU)
    need(found == [["cuda:2"], [2] * 5, [4] * 3, 4], f"GPU 2 of 4 says {found}")


# --- memory that nobody has set ---------------------------------------------------------------------------------------

UNSET = {
    "empty": lambda: torch.empty(9),
    "empty_like": lambda: torch.empty_like(torch.ones(9)),
    "empty_strided": lambda: torch.empty_strided((3, 3), (1, 3)),
    "empty_permuted": lambda: torch.empty_permuted((3, 3), (1, 0)),
    "new_empty": lambda: torch.ones(1).new_empty(9),
    "new_empty_strided": lambda: torch.ones(1).new_empty_strided((9,), (1,)),
    "Tensor": lambda: torch.Tensor(9),
    "of 8 bits": lambda: torch.empty(9, dtype=torch.float8_e4m3fn),
}


@pytest.mark.parametrize("what", UNSET)
@pytest.mark.contract("real_tensors")
def test_ways_to_memory_that_nobody_has_set(what: str) -> None:
    """Each goes through dispatch as an operator that is known to leave memory unset."""
    made = []
    for seed in (1, 1, 2):
        with real_tensors.Filling(seed):
            made.append(UNSET[what]().float())
    first, same, other = made
    need(torch.equal(first, same) and not torch.equal(first, other), f"{what} is not filled by its seed: {made}")


@pytest.mark.contract("real_tensors")
def test_which_operators_leave_memory_unset() -> None:
    names = {name.removeprefix("aten::").partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    found = {name for name in names if name.startswith(("empty", "new_empty"))}
    need(found == real_tensors._UNSET, f"other operators leave memory unset: {sorted(found ^ real_tensors._UNSET)}")


# --- what stands for a device that is not there -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "room",
    [
        pytest.param(room, marks=pytest.mark.contract(room))
        for room in ("torch_factories", "torch_modules", "torch_random", "torch_streams")
    ],
)
def test_what_is_replaced_is_there(room: str) -> None:
    """A name that torch no longer has would be replaced without any effect."""
    found = replaced(room)
    missing = [f"{owner.__name__}.{name}" for name, owner in found if not hasattr(owner, name)]
    need(found and not missing, f"torch no longer has {missing}, which virtual/{room}.py replaces")


@pytest.mark.contract("torch_factories")
def test_what_makes_tensors() -> None:
    for names, owner in (
        ((*torch_factories._FACTORIES, *torch_factories._FROM_DATA), torch),
        (torch_factories._METHODS, torch.Tensor),
    ):
        missing = [name for name in names if not hasattr(owner, name)]
        need(not missing, f"torch no longer has {missing}, which make tensors")


def replaced(room: str) -> list[tuple[str, Any]]:
    """(name, whose it is) of what `pretend` and its like assign to."""
    tree = ast.parse(UPSTREAM[room].read_text())
    owners = {"module": torch, "cuda": torch.cuda, "tensor": torch.Tensor, "init": torch.nn.init, "utils": torch.utils}
    if room == "torch_modules":
        owners |= {"module": torch.nn.Module, "fake": FakeTensor}
    return [
        (target.attr, owners[target.value.id])
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        for target in (target.elts if isinstance(target, ast.Tuple) else [target])
        if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name) and target.value.id in owners
    ]


@pytest.mark.contract("torch_release")
def test_which_torch_is_installed_is_told_without_importing_it() -> None:
    code = (
        "import json, sys; from aot_cache.upstream.codec import torch_release as t; found = [t.release(), t.git()]; "
        "assert 'torch' not in sys.modules; import torch; "
        "print(json.dumps([found, [torch.__version__.split('+')[0], torch.version.git_version], t.git(), t.cpu_isa()]))"
    )
    told, known, again, isa = said(code)
    need(
        told == known and again == known[1], f"torch/version.py does not say what torch says of itself: {told}, {known}"
    )
    need(isa.split()[-1] == torch.backends.cpu.get_cpu_capability(), "torch.backends.cpu.get_cpu_capability")


@pytest.mark.contract("triton_sources")
def test_what_triton_raises_of_a_kernel_without_its_source(tmp_path: Path) -> None:
    """It says that kernels belong into a Python file, where `inspect` found none; the error names the function."""
    import triton

    from aot_cache.upstream.codec import triton_sources

    (code,) = [
        c for c in compile("def scale(x): pass", str(tmp_path / "scale.pyc"), "exec").co_consts if hasattr(c, "co_name")
    ]
    scale = FunctionType(code, {"__name__": "without_source"})
    with pytest.raises(ValueError) as caught:
        triton.jit(scale)
    need(isinstance(caught.value.__cause__, OSError), "it does not say that inspect found no source")
    found = triton_sources.unreadable(caught.value)
    need(found is not None, "the function that it is about cannot be found in the error")
    assert f"without_source:{scale.__qualname__}" in str(found) and "scale.pyc" in str(found)
    assert triton_sources.unreadable(ValueError("another")) is None


@pytest.mark.contract("live_objects")
def test_objects_are_found_after_a_freeze() -> None:
    """`gc.get_objects` alone does not have them; and what was frozen is frozen again."""
    code = (
        "import gc\n"
        "from aot_cache.upstream.codec.live_objects import all_objects\n"
        "class Kernel: pass\n"
        "kernel = Kernel()\n"
        "def among(found): return any(one is kernel for one in found)\n"
        "assert among(gc.get_objects()) and among(all_objects()) and not gc.get_freeze_count()\n"
        "gc.freeze()\n"
        "later = Kernel()\n"
        "print(among(gc.get_objects()), among(all_objects()))\n"
        "print(any(x is later for x in all_objects()), gc.get_freeze_count() > 0)\n"
    )
    done = python(code, {})
    need(done.stdout.split() == ["False", "True", "True", "True"], done.stdout + done.stderr)


@pytest.mark.contract("process_end")
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_how_children_of_multiprocessing_end(method: str, tmp_path: Path) -> None:
    """By `os._exit`, looked up in `os` at that moment; `atexit` functions of the parent are not run."""
    (tmp_path / "program.py").write_text(
        "import atexit, multiprocessing, os\n"
        "from aot_cache.upstream.hooks import process_end\n"
        "def work():\n"
        "    process_end.before_exit(lambda: os.write(1, b'before '))\n"
        "    atexit.register(lambda: os.write(1, b'atexit '))\n"
        "if __name__ == '__main__':\n"
        f"    child = multiprocessing.get_context({method!r}).Process(target=work)\n"
        "    child.start(); child.join()\n"
        "    process_end.before_exit(lambda: 1 / 0)()\n"
        "    print(child.exitcode, hasattr(os._exit, '_aot_cache_patch'), flush=True)\n"
    )
    given = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "program.py")]
    done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=HANGS, check=False)
    need(done.stdout == "before 0 False\n", f"children of {method} end otherwise: {done.stdout}{done.stderr}")
