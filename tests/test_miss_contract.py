"""What the guard and the ranks take for granted of torch's and Triton's miss paths, a sentence each."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import torch.distributed as dist
from contracts import need, parameters
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed import distributed_c10d
from triton.compiler import CompiledKernel
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from aot_cache.upstream.codec import unwrapping


def text(function: Any) -> str:
    return " ".join(inspect.getsource(function).split())


@pytest.mark.contract("triton_miss")
def test_a_launch_that_misses_is_packed_and_then_compiled() -> None:
    source = text(JITFunction.run)
    packed = source.find("self._pack_args(backend, kwargs, bound_args, specialization, options)")
    compiled = source.find("self._do_compile(key, signature, device, constexprs, options, attrs, warmup)")
    need(0 < packed < compiled, "JITFunction.run packs a launch's arguments elsewhere than just before it compiles")
    need("kernel = kernel_cache.get(key, None)" in source[:packed], "JITFunction.run packs what it has a kernel for")
    wanted = ["self", "key", "signature", "device", "constexprs", "options", "attrs", "warmup"]
    need(parameters(JITFunction._do_compile) == wanted, "what JITFunction._do_compile takes")


@pytest.mark.contract("triton_miss")
def test_how_a_kernel_is_launched() -> None:
    """A stand-in is called as a kernel is: grid, six things of the launch, the arguments by their place."""
    source = text(JITFunction.run)
    call = source[source.index("kernel.run(") :]
    given = [argument.strip() for argument in call[len("kernel.run(") : call.index("*bound_args")].split(",")]
    need(len(given) == 10 and given[:4] == ["grid_0", "grid_1", "grid_2", "stream"], f"a launcher is given {given}")
    need("kernel.launch_metadata(grid, stream, *bound_args.values())" in source, "a kernel is asked for its metadata")


@pytest.mark.contract("triton_miss")
def test_a_kernel_is_loaded_once() -> None:
    source = text(CompiledKernel._init_handles)
    need("if self.module is not None: return" in source, "CompiledKernel._init_handles loads what is loaded")
    need("self._init_handles()" in text(CompiledKernel.run.fget), "a launch does not load by _init_handles")


@pytest.mark.contract("triton_tuner_miss")
def test_how_an_autotuner_chooses() -> None:
    source = text(Autotuner.run)
    steps = ["if key not in self.cache:", "self.prune_configs(kwargs)", "self._bench(*args, config=config, **kwargs)"]
    steps += ["self.pre_hook(full_nargs, reset_only=True)", "config = self.cache[key]"]
    places = [source.find(step) for step in steps]
    need(-1 not in places and places == sorted(places), f"Autotuner.run goes otherwise than {' → '.join(steps)}")
    need(
        parameters(Autotuner.check_disk_cache)[1:] == ["tuning_key", "configs", "bench_fn"],
        "what its disk cache is given",
    )


@pytest.mark.contract("torch_capture")
def test_where_captures_begin_and_end() -> None:
    graph: Any = torch.cuda.CUDAGraph
    need(parameters(graph.capture_begin)[1:3] == ["pool", "capture_error_mode"], "what capture_begin takes")
    need(
        inspect.signature(graph.capture_begin).parameters["capture_error_mode"].default == "global",
        "captures are not in mode global by default",
    )
    need("self.cuda_graph.capture_begin(" in text(torch.cuda.graph.__enter__), "torch.cuda.graph begins otherwise")
    need("self.cuda_graph.capture_end(" in text(torch.cuda.graph.__exit__), "torch.cuda.graph ends otherwise")
    if hasattr(graph, "capture_end_pre"):
        need("self.capture_end_pre()" in text(graph.capture_end), "capture_end does not go through capture_end_pre")
    need(callable(torch.Generator.graphsafe_set_state), "a generator cannot be given another's state")
    need(isinstance(torch.cuda.default_generators, tuple), "torch.cuda.default_generators")


@pytest.mark.contract("unwrapping")
def test_the_function_under_a_compiled_module() -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    compiled: Any = torch.compile(Layer())
    need(isinstance(compiled, OptimizedModule), "torch.compile of a module is no OptimizedModule")
    need(unwrapping.code_of(compiled) is Layer.forward.__code__, "OptimizedModule._orig_mod is not the module")


@pytest.mark.contract("torch_ranks")
def test_the_store_of_a_job() -> None:
    need(callable(distributed_c10d._get_default_store), "distributed_c10d._get_default_store is gone")
    store: Any = dist.HashStore()
    store.set("a", "1")
    need(store.check(["a"]) and not store.check(["a", "b"]), "Store.check does not say whether all keys are there")
    need(store.multi_get(["a"]) == [b"1"], "Store.multi_get does not give the texts")
    need(store.delete_key("a") and not store.check(["a"]), "Store.delete_key does not take a text away")
