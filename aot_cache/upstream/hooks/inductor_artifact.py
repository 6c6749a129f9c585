"""Inductor's result for one graph, as bytes that another process can run.

Upstream: `torch/_dynamo/aot_compile_types.py` (`BundledAOTAutogradSerializableCallable`),
`torch/_inductor/async_compile.py` (`AsyncCompile`, `CompiledTritonKernels`),
`torch/_functorch/_aot_autograd/autograd_cache.py`, `torch/_functorch/_aot_autograd/aot_autograd_result.py`
(`deserialize_bundled_cache_entry`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable as Serializable
from torch._functorch._aot_autograd import aot_autograd_result
from torch._functorch._aot_autograd.aot_autograd_result import GenericAOTAutogradResult
from torch._inductor.async_compile import AsyncCompile, CompiledTritonKernels
from torch._inductor.codecache import FxGraphCache, PyCodeCache, code_hash
from torch._inductor.output_code import CompiledFxGraph
from torch._inductor.triton_bundler import TritonBundler

from aot_cache.files import scratch
from aot_cache.upstream import patch
from aot_cache.upstream.codec import gpu_number, inductor_source
from aot_cache.upstream.hooks import inductor_binaries, inductor_later

_SETTINGS: dict[str, Any] = {
    "strict_autograd_cache": True,
    "bypass_autograd_cache_key": True,
    "bundled_autograd_cache": True,
    "force_non_lazy_backward_lowering": True,
    "force_autograd_cache": True,
}


MEASURED = (
    "max_autotune",
    "max_autotune_pointwise",
    "max_autotune_gemm",
    "coordinate_descent_tuning",
    "shape_padding",
)
"""Settings with which Inductor measures on a GPU while it compiles. A build turns them off: matrix products use the library
without padding, and a kernel has the configs that Inductor tries by default (`inductor_tuning`)."""

_NOT_MEASURED: dict[str, Any] = {
    **dict.fromkeys(MEASURED, False),
    "static_launch_user_defined_triton_kernels": True,  # else their launcher is C code, compiled when they are loaded
}


def compile_graph(wrapper: Any, backend: Any, graph: Any, inputs: Any, **kwargs: Any) -> bytes:
    """Compile a Dynamo graph with Inductor, and return the result as bytes.

    Args:
        wrapper: the backend object that `torch.compile` made from backend, mode and options.
        backend: the wrapper's own `__call__`.

    Raises:
        Exception: whatever Inductor raises.
    """
    seen: Any = CompiledTritonKernels
    seen.cache_clear()  # else a kernel that an earlier graph has, too, is missing in this artifact
    asked = wrapper.config
    wrapper.config = {name: value for name, value in asked.items() if name not in MEASURED}
    try:
        with (
            _keys_of_their_own(),
            patch.inside(CompiledTritonKernels, "key", _key_of_source),
            functorch_config.patch(_SETTINGS),
            inductor_config.patch(_NOT_MEASURED),
            _without_sources(),
        ):
            compiled = backend(graph, inputs, **kwargs)
            data = Serializable.serialize_compile_artifacts(Serializable(compiled))
    finally:
        wrapper.config = asked
    return _named_alike(data)


@contextlib.contextmanager
def _keys_of_their_own() -> Iterator[None]:
    """Seed `random` from the system. If upstream has no cache key for a graph (`cond`), it uses `random.random()`. A build's
    children start with the same seed and share the cache, so one would get another's code."""
    state = random.getstate()
    random.seed()  # from the system
    try:
        yield
    finally:
        random.setstate(state)


_TEXTS = ("runnable_graph_str", "inductor_post_grad_graph_str")
_AUTOGRAD_TEXTS = ("aot_joint_graph_str", "aot_forward_graph_str", "aot_backward_graph_str")
_TIMES = ("forward_time_taken_ns", "backward_time_taken_ns")


@contextlib.contextmanager
def _without_sources() -> Iterator[None]:
    """Inside, artifacts have no texts for logs (graphs as text, lines of user code with this machine's paths), no unneeded
    imports, and no files that nobody reads."""

    def prepare_for_serialization(original: Any, self: Any) -> Any:
        for name in _TEXTS:
            setattr(self, name, "")
        self.cache_linemap = []
        result = original(self)
        self._triton_bundle = inductor_binaries.kept(self._triton_bundle, self.source_code)
        self.source_code = inductor_source.lean(self.source_code)
        return result

    def __getstate__(_original: Any, self: Any) -> Any:
        self.runtime_metadata.tangent_source_stack_traces = None
        return {**self.__dict__, **dict.fromkeys(_AUTOGRAD_TEXTS), **dict.fromkeys(_TIMES, 0)}

    with (
        patch.inside(CompiledFxGraph, "prepare_for_serialization", prepare_for_serialization),
        patch.inside(GenericAOTAutogradResult, "__getstate__", __getstate__),
    ):
        yield


_CACHE_KEY = re.compile(rb"cache_key\x94\x8c\x34(c[a-z2-7]{51})")


def _named_alike(data: bytes) -> bytes:
    """`data` with the key of upstream's cache and temporary folder names, which differ each time, replaced at equal length."""
    for found in set(_CACHE_KEY.findall(data)):
        data = data.replace(found, b"c" + b"a" * (len(found) - 1))
    for name in _FOLDERS:  # this build's temporary folders; nothing reads them later
        folder = os.path.dirname(os.environ.get(name, "")).encode()
        if len(folder) > 1:  # the whole path: which part of it is new each time is for others to decide
            data = data.replace(folder, b"/" + b"0" * (len(folder) - 1))
    return data


def name_of(graph: Any) -> str:
    """The global name under which Dynamo's bytecode calls the compiled `graph`."""
    return str(graph._backend_id)


_KERNEL = re.compile(rb"^(\w+) = async_compile\.", re.MULTILINE)


def kernels_in(data: bytes) -> list[str]:
    """Names of the kernels that an artifact's code defines, in order."""
    return [name.decode() for name in dict.fromkeys(_KERNEL.findall(data))]


def load_graph(data: bytes, gpu: int = gpu_number.BUILT_FOR) -> Any:
    """The function in `data`, whose hash the caller must have checked, for the GPU with this number.

    Upstream writes source and binaries into its cache folders, and reads them back. Here these folders are private, and
    removed when the process ends.

    Raises:
        ValueError: it can run only on the GPU for which it was built.
    """
    if gpu != gpu_number.BUILT_FOR and gpu_number.holds_devices(data):
        raise ValueError("its artifact holds a device")
    with _one_at_a_time, _private_folder(data) as folder, _without_the_compiler(gpu), _without_a_copy():
        made = Serializable.deserialize_compile_artifacts(data)
        modules = [module for module in PyCodeCache.modules if str(module.__file__).startswith(folder)]
        forget = weakref.finalize(made, _forget, modules, folder, os.getpid())
        forget.atexit = False  # then the folder of the whole process goes
        return made


def _forget(modules: list[ModuleType], folder: str, pid: int) -> None:
    """Nobody runs a graph any more: drop the generated modules that upstream keeps, and their files."""
    if os.getpid() != pid:  # a forked child: the parent may still use the files
        return
    paths = {module.__file__ for module in modules}
    PyCodeCache.modules[:] = [module for module in PyCodeCache.modules if module.__file__ not in paths]
    for module in modules:
        PyCodeCache.modules_no_attr.pop(str(module.__file__), None)
        PyCodeCache.linemaps.pop(str(module.__file__), None)
        if sys.modules.get(module.__name__) is module:
            del sys.modules[module.__name__]
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _without_the_compiler(gpu: int) -> Iterator[None]:
    """Skip what upstream does for a graph that it might have to compile.

    Its cache imports all of `torch._inductor.graph` for a hook of its own tests, and asks another cache for measurements. At the
    first kernel of a module, compiled or not, it starts a pool of compile workers, as many processes as cores, and hashes all
    sources of torch, for the pool and for the key under which it looks for the kernel (`AsyncCompile.triton`).
    """
    inductor_later.call_without_debug()

    def cache_hit_post_compile(_: Any, graph: Any, cache_info: Any, constants: Any) -> Any:
        if gpu != gpu_number.BUILT_FOR:
            _move(graph, gpu)
        if graph._triton_bundle:
            TritonBundler.read_and_emit(graph._triton_bundle)
        graph.after_deserialization(constants)
        return graph, cache_info

    with (
        _post_compile.replaced(cache_hit_post_compile),
        _use_pool.replaced(lambda _original, _cls: False),
        _key.replaced(_key_to_find),
    ):
        yield


def _key_of_source(_original: Any, kernel_src: str) -> str:
    """The key of a kernel in an artifact, without the digest of the builder's torch: the binary is in the same artifact."""
    return code_hash(kernel_src)


def _key_to_find(original: Any, kernel_src: str) -> str:
    own = code_hash(kernel_src)
    # A bundle of an earlier release has upstream's keys.
    return own if own in CompiledTritonKernels._cache else str(original(kernel_src))


@contextlib.contextmanager
def _without_a_copy() -> Iterator[None]:
    """Skip the copy of all that was unpickled, which upstream keeps to write the loaded graph again.

    It takes most of the time of unpickling, and its memory.
    """

    def deserialize_bundled_cache_entry(original: Any, entry: Any) -> Any:
        entry.__deepcopy__ = lambda _memo: _NotWritten()
        made = original(entry)
        del entry.__deepcopy__
        return made

    with _deserialize_entry.replaced(deserialize_bundled_cache_entry):
        yield


_deserialize_entry = patch.OnThisThread(aot_autograd_result, "deserialize_bundled_cache_entry")


class _NotWritten:
    """Stands for a copy that was not made."""

    def __reduce__(self) -> str:
        raise TypeError("a graph that aot-cache loaded from a bundle cannot be written again: copy the bundle")


def _move(graph: Any, gpu: int) -> None:
    """The code of a graph that is just unpickled, for the GPU with this number. `inductor_tuning.choosing` moves its kernels."""
    binaries = len(graph._triton_bundle.static_autotuners or ()) if graph._triton_bundle else 0
    if gpu_number.kernels(graph.source_code) > binaries:
        raise ValueError("it has a kernel that is compiled when it is loaded")
    graph.source_code = gpu_number.in_module(graph.source_code, gpu)
    graph.device_idxs = type(graph.device_idxs)([gpu])


_post_compile = patch.OnThisThread(FxGraphCache, "cache_hit_post_compile")
_key = patch.OnThisThread(CompiledTritonKernels, "key")
_use_pool = patch.OnThisThread(AsyncCompile, "use_process_pool")


_ASKS = {
    "torch._inductor.codecache": ("cache_dir",),
    "torch._inductor.triton_bundler": ("triton_cache_dir",),
    "torch._inductor.runtime.autotune_cache": ("cache_dir",),
    "torch._inductor.runtime.triton_heuristics": ("cache_dir", "triton_cache_dir"),
}
"""Module → functions through which upstream, while loading a graph, gets its cache folders. They are imported by name."""

_folder_answer = functools.cache(patch.OnThisThread)
"""One object for each module and function, because it counts its users."""


@contextlib.contextmanager
def _private_folder(data: bytes) -> Iterator[str]:
    """While `data` is loaded, give upstream a new private folder as cache folder, on this thread only.

    The variables for these folders (`TORCHINDUCTOR_CACHE_DIR`, `TRITON_CACHE_DIR`) are not changed, because all threads use
    them. Each load gets a new folder, because upstream assumes that files of one name hold the same kernels.
    """
    folder = tempfile.mkdtemp(dir=_folder_of(os.getpid()))

    def answer(_original: Any, *_device: int) -> str:
        return folder

    with contextlib.ExitStack() as replaced:
        for name, functions in _ASKS.items():
            if name.encode() in data:  # loading imports it: import it now, so that its names can be replaced
                importlib.import_module(name)
            module = sys.modules.get(name)
            for function in functions if module else ():
                replaced.enter_context(_folder_answer(module, function).replaced(answer))
        try:
            yield folder
        finally:
            # `CachingAutotuner.__init__` writes the answer to the variable if that is not set: for a kernel of the graph that
            # its artifact has not as an autotuner. It must not become everybody's folder, which is removed at the end.
            if os.environ.get("TRITON_CACHE_DIR") == folder:
                del os.environ["TRITON_CACHE_DIR"]


@functools.cache
def _folder_of(pid: int) -> Path:
    folder, _ = scratch.make()  # stays locked as long as this process, or a forked child, lives

    def remove() -> None:
        if os.getpid() == pid:  # a forked child would run this, too
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


_one_at_a_time = threading.RLock()  # upstream fills its tables without a lock
_FOLDERS = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@contextlib.contextmanager
def instead(handler: Callable[..., Any]) -> Iterator[None]:
    """Call `handler(wrapper, backend, graph, inputs, **kwargs)` in place of Inductor, which is `backend`."""

    def __call__(original: Any, self: Any, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        return handler(self, partial(original, self), graph, inputs, **kwargs)

    with patch.inside(torch._TorchCompileInductorWrapper, "__call__", __call__):
        yield
