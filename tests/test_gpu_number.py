"""Graphs on another GPU of the process than the one for which they were built."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from one_module import ROOT, built_for_h200
from two_gpus import MODULE

from aot_cache.artifact import manifest
from aot_cache.store import read_bundle
from aot_cache.upstream.codec import code_bytes, gpu_number

STEP = """
@torch.compile
def step(x, w, at):
    z, places, ordered = body(x, w, at)
    noise = torch.rand(x.shape, device=x.device)
    return z.cumsum(-1), places, noise, ordered, (x @ w.t()).cpu(), torch.ops.aten.index_put(x, (places % 2,), x[0])
"""

# What Inductor writes for one function and two GPUs.
WRITES = """
import json, sys
from aot_cache.artifact import target as targets
from aot_cache.builder import virtual_gpu
from aot_cache.upstream.virtual import inductor_target
target = targets.get("h200")
virtual_gpu.become(target)
virtual_gpu.libraries(target)
inductor_target.become(target)
import torch
from torch._inductor import codecache, compile_fx, config
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
import numbered

written = []
write = codecache.PyCodeCache.write
def noting(text, *more, **given):
    written.extend([text] if "def call(" in text else [])
    return write(text, *more, **given)
codecache.PyCodeCache.write = noting
numbered.scale = {(8,): lambda *args, **given: None}
function = numbered.step._torchdynamo_orig_callable
for gpu in ("cuda:0", "cuda:1"):
    with FakeTensorMode():
        args = [torch.ones(8, 64, device=gpu), torch.ones(64, 64, device=gpu), torch.zeros(8, dtype=torch.int64, device=gpu)]
    graph = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*args)
    with config.patch(force_disable_caches=True):
        compile_fx.compile_fx(graph, args)
print(json.dumps(written))
"""

# Loads an artifact for GPU 1, on devices that only note what is loaded onto them.
LOADS = """
import json, sys
import torch
from torch._dynamo import device_interface
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import static_triton_launcher
from aot_cache.store import read_bundle
from aot_cache.upstream.hooks import inductor_artifact, inductor_tuning

onto, guarded = [], []
if not hasattr(torch._C, '_cuda_getCurrentRawStream'):  # a build of torch without CUDA
    torch._C._cuda_getCurrentRawStream = None
def load_kernel(self, device):
    self.function, self.n_regs, self.n_spills = 1, 1, 0
    onto.append(device)
static_triton_launcher.StaticallyLaunchedTritonKernel.load_kernel = load_kernel
guard = device_interface.DeviceGuard
guard.__enter__, guard.__exit__ = lambda self: guarded.append(self.idx), lambda self, *error: None
with inductor_tuning.choosing({}, 1):
    graph = inductor_artifact.load_graph(read_bundle(sys.argv[1]).object(sys.argv[2]), 1)
texts = [open(module.__file__).read() for module in PyCodeCache.modules]
print(json.dumps([onto, guarded, next(text for text in texts if "def call(" in text)]))
"""


def python(folder: Path, script: str, *arguments: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *arguments],
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def without_kernels(source: str) -> list[str]:
    """The lines of a graph's module that are run, without the texts of its kernels. Streams' variables have one name."""
    text = gpu_number._COMMENT.sub("", gpu_number._KERNEL.sub("KERNEL", source))
    return [re.sub(r"stream\d\b", "stream", line) for line in text.splitlines() if line.strip()]


@pytest.mark.contract("gpu_number")
def test_a_moved_module_is_what_inductor_writes_for_that_gpu(tmp_path: Path) -> None:
    (tmp_path / "numbered.py").write_text(MODULE + STEP)
    first, second = python(tmp_path, WRITES)
    assert without_kernels(first) != without_kernels(second)
    assert without_kernels(gpu_number.in_module(first, 1)) == without_kernels(second)
    assert gpu_number.in_module(first, 0) == first
    assert gpu_number.kernels(first) > 2


@pytest.mark.contract("gpu_number", "inductor_tuning", "inductor_artifact")
def test_an_artifact_is_loaded_onto_that_gpu(tmp_path: Path) -> None:
    """Built for GPU 0. Nothing that is loaded or run names it."""
    built = built_for_h200(tmp_path, "numbered", MODULE + STEP)
    assert built.failed == []
    (graph,) = manifest.served(read_bundle(built.path)).graphs
    (digest,) = graph.graphs.values()
    assert not gpu_number.holds_devices(read_bundle(built.path).object(digest))
    onto, guarded, text = python(tmp_path, LOADS, str(built.path), digest)
    assert len(onto) > 2 and {*onto, *guarded} == {1}
    lines = [line for line in without_kernels(text) if "0)" in line or "cuda:0" in line or "index=0" in line]
    assert not [line for line in lines if any(word in line for word in ("Guard", "device", "stream", "cuda"))], lines
    assert "_DeviceGuard(1)" in text


def test_texts_of_guards() -> None:
    assert gpu_number.in_text("Tensor on cuda:0, keys 8", 3) == "Tensor on cuda:3, keys 8"
    assert gpu_number.in_text("cuda:01 cuda:0x xcuda:0", 3) == "cuda:01 cuda:0x xcuda:0"
    assert gpu_number.in_text("torch:device cuda:0", 0) == "torch:device cuda:0"


@pytest.mark.parametrize(
    "line", ["x = f(device_index=0)", "torch.cuda.other_device(0)", 'y = g("cuda:0")', "SomeGuard(0)"]
)
def test_what_is_not_known_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="names the GPU as"):
        gpu_number.in_module(f"def call(args):\n    {line}\n", 1)


def test_devices_in_pickles() -> None:
    device = torch.device("cuda", 0)
    for value in (device, [{"device": 1}, device], ("torch", "device", device, device)):
        assert gpu_number.holds_devices(pickle.dumps(value, protocol=4))
    for value in ("torch", ["torch", "device"], {"torch": "device"}, [torch.float32, "device"]):
        assert not gpu_number.holds_devices(pickle.dumps(value, protocol=4))


@pytest.mark.parametrize("size", range(65536 - 40, 65536 + 8))
def test_a_device_at_the_end_of_a_pickle_s_frame(size: int) -> None:
    """A pickle is cut into frames of 64 KiB, between any two texts."""
    assert gpu_number.holds_devices(pickle.dumps(["x" * size, torch.device("cuda", 0)], protocol=4))
    several = ["x" * 1000] + [f"{n:0{size // 66}}" for n in range(64)]
    assert gpu_number.holds_devices(pickle.dumps([*several, torch.device("cuda", 0)], protocol=4))


def test_devices_in_bytecode() -> None:
    code = compile("def f():\n    return X", "f", "exec").co_consts[0]
    code = code.replace(
        co_consts=(None, torch.device("cuda", 0), (torch.device("cuda", 0), torch.device("cpu"), "cuda:0"))
    )
    kept = code_bytes.dump(code, {}, "f")
    assert code_bytes.load(kept).co_consts == code.co_consts
    here = torch.device("cuda", 2)
    assert code_bytes.load(kept, 2).co_consts == (None, here, (here, torch.device("cpu"), "cuda:0"))


def test_code_that_names_a_gpu_itself() -> None:
    def hard(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.ones(3, device="cuda:0") for _ in range(2)]) + x

    def soft(x: torch.Tensor) -> torch.Tensor:
        return torch.ones(3, device="cuda") + torch.ones(3, device="cuda:1") + x

    assert gpu_number.named_in(hard.__code__) and not gpu_number.named_in(soft.__code__)
