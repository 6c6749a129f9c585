"""Writes down what torch, Triton and vLLM compile, load and tune in a process, with hooks of its own: no code of aot-cache.

One JSON line per event in $JIT_TRACE/<pid>.jsonl: `t` (time at the end), `kind`, `name`, `seconds`, `capturing` (whether the
current stream was being captured when it began), `phase` (the step of vLLM's worker). Nothing is edited: functions are wrapped
once their module is imported.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.abc
import importlib.util
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

_phases: list[str] = []
_local = threading.local()
WEIGHTS = "JIT_TRACE_WEIGHTS"
"""Bounds of vLLM's dummy weights. Its own are so small that each sequence repeats its last token."""


def emit(kind: str, name: str = "", seconds: float = 0.0, capturing: bool = False, **more: Any) -> None:
    """Write one line. The file is opened each time: processes fork."""
    line = {"t": time.time(), "kind": kind, "name": name, "seconds": round(seconds, 5), "capturing": capturing}
    with contextlib.suppress(OSError), open(f"{os.environ['JIT_TRACE']}/{os.getpid()}.jsonl", "a") as file:
        file.write(json.dumps({**line, "phase": "/".join(_phases), **more}, default=str) + "\n")


def _capturing() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "cuda") or not torch.cuda.is_initialized():
        return False
    return bool(torch.cuda.is_current_stream_capturing())


def _timed(owner: Any, method: str, kind: str, name: Callable[..., str | None]) -> None:
    """Write down each call. `name(*arguments)` returns None for calls that do nothing."""
    original = vars(owner)[method]

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        named = name(*args, **kwargs)
        if named is None:
            return original(*args, **kwargs)
        capturing, began = _capturing(), time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            emit(kind, named, time.perf_counter() - began, capturing)

    setattr(owner, method, wrapped)


def _phase(owner: Any, *methods: str) -> None:
    """Events inside these methods are said to be in that phase."""
    for method in methods:
        if method in vars(owner):
            _wrap_phase(owner, method)


def _wrap_phase(owner: Any, method: str) -> None:
    original = vars(owner)[method]

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        _phases.append(method)
        began = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            _phases.pop()
            emit("phase", method, time.perf_counter() - began)

    setattr(owner, method, wrapped)


# --- Triton -----------------------------------------------------------------------------------------------------------


def _jit(module: Any) -> None:
    original = module.JITFunction._do_compile

    @functools.wraps(original)
    def _do_compile(self: Any, *args: Any, **kwargs: Any) -> Any:
        before, _local.jit = getattr(_local, "jit", False), True
        capturing, began = _capturing(), time.perf_counter()
        try:
            return original(self, *args, **kwargs)
        finally:
            _local.jit = before
            emit("jit", getattr(self.fn, "__name__", "?"), time.perf_counter() - began, capturing)

    module.JITFunction._do_compile = _do_compile


def _knobs(module: Any) -> None:
    """Triton's own notice of a finished compile: of a kernel that was called, or of one of Inductor's."""
    previous = module.compilation.listener

    def listener(**about: Any) -> Any:
        whose = "" if getattr(_local, "jit", False) else "inductor "
        found = "disk hit" if about.get("cache_hit") else "compile"
        emit(f"{whose}{found}", str(getattr(about.get("src"), "name", "?")), capturing=_capturing())
        return previous(**about) if previous is not None else None

    module.compilation.listener = listener


def _compiler(module: Any) -> None:
    _timed(module.CompiledKernel, "_init_handles", "load", lambda self: None if self.module is not None else self.name)


def _driver(module: Any) -> None:
    """Every load of a module by Triton's NVIDIA driver, whoever asks."""
    original = module.CudaUtils.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        load_binary = self.load_binary
        if getattr(load_binary, "_traced", False):
            return

        def traced(name: str, *args: Any, **kwargs: Any) -> Any:
            capturing, began = _capturing(), time.perf_counter()
            try:
                return load_binary(name, *args, **kwargs)
            finally:
                emit("module load", str(name), time.perf_counter() - began, capturing)

        traced._traced = True  # type: ignore[attr-defined]
        self.load_binary = traced

    module.CudaUtils.__init__ = __init__


def _autotuner(module: Any) -> None:
    _timed(module.Autotuner, "_bench", "benchmark", lambda self, *_, **__: getattr(self.base_fn, "__name__", "?"))


def _build(module: Any) -> None:
    _timed(module, "_build", "gcc", lambda name, *_, **__: str(name))


# --- torch ------------------------------------------------------------------------------------------------------------


def _dynamo(module: Any) -> None:
    _timed(module, "_compile", "frame", lambda code, *_, **__: code.co_name)


def _compile_fx(module: Any) -> None:
    _timed(module._InProcessFxCompile, "codegen_and_compile", "graph compile", lambda *_, **__: "")


def _heuristics(module: Any) -> None:
    _timed(
        module.CachingAutotuner, "benchmark_all_configs", "inductor benchmark", lambda self, *_, **__: self.fn.__name__
    )


def _static(module: Any) -> None:
    kernel = module.StaticallyLaunchedTritonKernel
    _timed(kernel, "load_kernel", "inductor load", lambda self, *_, **__: None if self.function else self.name)


def _graphs(module: Any) -> None:
    enter, leave = module.graph.__enter__, module.graph.__exit__

    def __enter__(self: Any) -> Any:
        self._traced_since = time.perf_counter()
        return enter(self)

    def __exit__(self: Any, *args: Any) -> Any:
        try:
            return leave(self, *args)
        finally:
            emit("capture", "", time.perf_counter() - self._traced_since)

    module.graph.__enter__, module.graph.__exit__ = __enter__, __exit__


# --- vLLM -------------------------------------------------------------------------------------------------------------


def _worker(module: Any) -> None:
    steps = (
        "init_device",
        "load_model",
        "determine_available_memory",
        "initialize_from_config",
        "compile_or_warm_up_model",
    )
    _timed(module.Worker, "init_device", "worker", lambda self: f"rank {self.rank}")
    _phase(module.Worker, *steps)


def _runner(module: Any) -> None:
    _phase(module.GPUModelRunner, "profile_run", "profile_cudagraph_memory", "capture_model", "_dummy_sampler_run")


def _core(module: Any) -> None:
    _wrap_phase(module.EngineCore, "__init__")


def _decorators(module: Any) -> None:
    original = module._try_load_aot_compiled_fn

    def _try_load_aot_compiled_fn(model: Any, path: str) -> Any:
        began = time.perf_counter()
        found = original(model, path)
        emit("model load" if found is not None else "model missing", type(model).__name__, time.perf_counter() - began)
        return found

    module._try_load_aot_compiled_fn = _try_load_aot_compiled_fn


def _weights(module: Any) -> None:
    bound = os.environ.get(WEIGHTS)
    if bound:
        original = module.initialize_dummy_weights

        def initialize_dummy_weights(model: Any, model_config: Any, *args: Any, **kwargs: Any) -> Any:
            del args
            return original(model, model_config, **{**kwargs, "low": -float(bound), "high": float(bound)})

        module.initialize_dummy_weights = initialize_dummy_weights


def _session(module: Any) -> None:
    """Not counted: how long the steps of aot-cache take in a worker."""
    steps = ("load", "_prime_kernels", "_prime_graphs", "_compile_at_start", "_prime_libraries")
    _phase(module.Session, *steps)


HOOKS: dict[str, Callable[[Any], None]] = {
    "triton.runtime.jit": _jit,
    "triton.knobs": _knobs,
    "triton.compiler.compiler": _compiler,
    "triton.runtime.autotuner": _autotuner,
    "triton.runtime.build": _build,
    "triton.backends.nvidia.driver": _driver,
    "torch._dynamo.convert_frame": _dynamo,
    "torch._inductor.compile_fx": _compile_fx,
    "torch._inductor.runtime.triton_heuristics": _heuristics,
    "torch._inductor.runtime.static_triton_launcher": _static,
    "torch.cuda.graphs": _graphs,
    "aot_cache.runtime.session": _session,
    "vllm.v1.worker.gpu_worker": _worker,
    "vllm.v1.worker.gpu_model_runner": _runner,
    "vllm.v1.engine.core": _core,
    "vllm.compilation.decorators": _decorators,
    "vllm.model_executor.model_loader.weight_utils": _weights,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Hooks a module right after its import."""

    def __init__(self) -> None:
        self._asking: set[str] = set()

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname not in HOOKS or fullname in self._asking:
            return None
        self._asking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._asking.discard(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            run(module)
            try:
                HOOKS[fullname](module)
                emit("hooked", fullname)
            except Exception as error:
                emit("not hooked", fullname, error=repr(error))

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Called once at the start of a process; forked children inherit it."""
    emit("process", " ".join(sys.orig_argv)[:200])
    sys.meta_path.insert(0, _Finder())
