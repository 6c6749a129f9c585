"""In an environment with a real vLLM: what becomes of a model that vLLM compiles, with our plug-in. Prints one JSON line.

    vllm_compile_cache_here.py record       # under AOT_CACHE_RECORD_TO: vLLM compiles, and its files are kept
    vllm_compile_cache_here.py serve        # with AOT_CACHE: vLLM looks for the model, and for the facts about a class
    vllm_compile_cache_here.py serve other  # the same, with another option of vLLM's

The model runs on the CPU with vLLM's own backend. vLLM's compiled extensions, and the one pass that names their operators, are
replaced by nothing. Called by `tools/check_vllm --env VERSION=PYTHON`.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import time
from importlib.metadata import version
from typing import Any

CLASS = ("vllm.model_executor.models.opt", "OPTForCausalLM")


class _Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def main(what: str, other: bool) -> None:
    os.environ.update(VLLM_HOST_IP="127.0.0.1", VLLM_USE_AOT_COMPILE="1")
    importlib.import_module("vllm_without_extensions")  # first of all
    platforms = importlib.import_module("vllm.platforms")  # before vLLM's configuration, whose defaults depend on it
    vars(platforms)["_current_platform"] = importlib.import_module("vllm.platforms.cpu").CpuPlatform()
    plugin = importlib.import_module("aot_cache.engines.vllm.plugin")
    if what == "serve":
        plugin.register()
    importlib.import_module("vllm.v1.worker.gpu_worker")
    kept = _Kept()
    logging.getLogger("vllm.aot_cache").addHandler(kept)  # not before vLLM has set up its logging
    config = _config(other)
    finish = _record() if what == "record" else lambda: None
    children = _model_info()
    started = time.perf_counter()
    lowered = _lowered()
    equal = _run(config)
    seconds = time.perf_counter() - started
    finish()
    counts = vars(importlib.import_module("vllm.compilation.counter").compilation_counter)
    names_of_counts = (
        "num_aot_compiles",
        "num_aot_artifacts_loaded",
        "num_backend_compilations",
        "num_inductor_compiles",
    )
    found = {
        "vllm": version("vllm"),
        "equal to eager": equal,
        "seconds of the first call": round(seconds, 2),
        "vLLM's own counts": {name: counts[name] for name in names_of_counts},
        "graphs that Inductor lowered": len(lowered),
        "children that look at a class": children,
        "our warnings": kept.lines,
    }
    if what == "serve":
        import aot_cache

        found["graphs found"] = aot_cache.stats()["total"]["graph"]
        found["refused"] = aot_cache.stats()["total"]["rejected_bundle"]
    print(json.dumps(found))


def _config(other: bool) -> Any:
    """vLLM's configuration for the CPU, with its own backend."""
    configs = importlib.import_module("vllm.config")
    functional = importlib.import_module("vllm.compilation.passes.utility.fix_functionalization")
    functional.FixFunctionalizationPass.__call__ = lambda self, graph: None
    compilation = configs.CompilationConfig(
        mode=configs.CompilationMode.VLLM_COMPILE,
        cudagraph_mode=configs.CUDAGraphMode.NONE,
        custom_ops=["none"],
        splitting_ops=["small_model::mix"],
        compile_sizes=[],
    )
    config = configs.VllmConfig(device_config=configs.DeviceConfig(device="cpu"), compilation_config=compilation)
    compilation = config.compilation_config  # the CPU's platform has chosen another backend, and a pass of the GPU's
    compilation.mode, compilation.backend = configs.CompilationMode.VLLM_COMPILE, "inductor"
    compilation.compile_sizes = []
    compilation.inductor_compile_config["epilogue_fusion"] = not other
    if hasattr(compilation.pass_config, "fuse_rope_kvcache_cat_mla"):
        compilation.pass_config.fuse_rope_kvcache_cat_mla = False
    return config


def _record() -> Any:
    compile_cache = importlib.import_module("aot_cache.engines.vllm.compile_cache")
    record = importlib.import_module("aot_cache.runtime.record")
    recorder = compile_cache.Recorder(record.keep_caches)
    recorder.start()
    compile_cache.record_model_info(record.keep_caches)
    return recorder.finish


def _model_info() -> int:
    """Ask vLLM what a model's class can do. Returns for how many of the two questions it started a child process."""
    registry = vars(importlib.import_module("vllm.model_executor.models.registry"))
    original, started = registry["_run_in_subprocess"], []

    def run(function: Any) -> Any:
        started.append(1)
        return original(function)

    registry["_run_in_subprocess"] = run
    facts = [registry["_LazyRegisteredModel"](*CLASS).inspect_model_cls() for _ in range(2)]
    assert all(one.is_text_generation_model for one in facts)
    return len(started)


def _lowered() -> list[int]:
    """Has one entry more for each graph that Inductor lowers from now on: a count that is neither vLLM's nor ours."""
    graph = importlib.import_module("torch._inductor.graph").GraphLowering
    original, found = graph.run, []

    def run(*args: Any, **kwargs: Any) -> Any:
        found.append(1)
        return original(*args, **kwargs)

    graph.run = run
    return found


def _run(config: Any) -> bool:
    import torch

    configs = importlib.import_module("vllm.config")
    forward = importlib.import_module("vllm.forward_context")
    with configs.set_current_vllm_config(config):
        sys.path.append(os.path.dirname(os.path.abspath(__file__)))
        small = importlib.import_module("vllm_small_model")
        model = small.SmallModel(vllm_config=config)
        close = []
        for size in (16, 5, 2000):
            x = torch.randn(size, 8)
            with forward.set_forward_context(None, config), torch.inference_mode():
                close.append(torch.allclose(model(x), small.eager(model, x), rtol=1e-4))
    return all(close)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:] == ["other"])
