"""A model that is compiled once per key: what vLLM's `support_torch_compile` does with its cache folder."""

import ast
import hashlib
import os
import sys
from types import SimpleNamespace
from typing import Any

from triton import Config

from vllm import envs
from vllm.config.utils import hash_factors

counts = {"compiled": 0, "loaded": 0, "measured": 0}


class Compiled:
    """The compiled model: its file has the source that it was compiled from."""

    def __init__(self, text: str) -> None:
        self.text = text

    def source_info(self) -> Any:
        source = SimpleNamespace(module="fake_vllm_model", content=self.text)
        return SimpleNamespace(inlined_sources=[source])


def _try_load_aot_compiled_fn(model: Any, aot_compilation_path: str) -> Any:
    try:
        with open(aot_compilation_path) as file:
            found = Compiled(file.read())
        with open(sys.modules["fake_vllm_model"].__file__ or "") as file:
            if file.read() != found.text:
                raise RuntimeError("Source code has changed since the last compilation. Recompiling the model.")
    except Exception:
        return None
    table = os.path.join(
        _cache_dir(model.compilation_config, aot_compilation_path), "rank_0_0", "backbone", "vllm_compile_cache.py"
    )
    with open(table) as file:
        (entry,) = ast.literal_eval(file.read()).values()
    with open(entry["graph_handle"][1]) as file:
        kernel = file.read()
    counts["loaded"] += 1
    if _choices_of(kernel).read_best({}, [Config({"XBLOCK": 32}), Config({"XBLOCK": 64})]) is None:
        counts["measured"] += 1
    return found


def _choices_of(kernel: str) -> Any:
    """Inductor's own cache of what its tuner chose for the kernel in the file `kernel`."""
    from torch._inductor.runtime.autotune_cache import AutotuneCache

    return AutotuneCache.create({}, kernel, "digest of the configs")


def _cache_dir(config: Any, path: str) -> str:
    """As vLLM's backend: what is set, or a folder for this key, which stays set."""
    if not config.cache_dir:
        digest = hashlib.sha256(path.encode()).hexdigest()[:10]
        config.cache_dir = os.path.join(envs.cache_root(), "torch_compile_cache", digest)
    return str(config.cache_dir)


class Model:
    def __init__(self, vllm_config: Any) -> None:
        self.vllm_config, self.compilation_config = vllm_config, vllm_config.compilation_config
        self.aot_compiled_fn: Any = None

    def forward(self) -> None: ...

    def __call__(self) -> None:
        if self.aot_compiled_fn is not None:
            return
        key = hash_factors({**envs.compile_factors(), "config": self.vllm_config.compute_hash()})
        folder = os.path.join(envs.cache_root(), "torch_compile_cache", "torch_aot_compile", key)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "inductor_cache")
        path = os.path.join(folder, "rank_0_0", "model")
        self.aot_compiled_fn = _try_load_aot_compiled_fn(self, path)
        if self.aot_compiled_fn is None:
            self.aot_compiled_fn = self._compile(path)

    def _compile(self, path: str) -> Compiled:
        counts["compiled"] += 1
        subgraphs = os.path.join(_cache_dir(self.compilation_config, path), "rank_0_0", "backbone")
        tuned = os.path.join(os.environ["TORCHINDUCTOR_CACHE_DIR"], "ab")
        for folder in (subgraphs, tuned, os.path.dirname(path)):
            os.makedirs(folder, exist_ok=True)
        name = "artifact_compile_range_1_64_subgraph_0"
        handle = {((1, 64), 0, "inductor_standalone"): {"graph_handle": (name, os.path.join(subgraphs, name))}}
        with open(sys.modules["fake_vllm_model"].__file__ or "") as file:
            text = file.read()
        kernel = os.path.join(tuned, "cab.py")
        contents = {
            os.path.join(subgraphs, name): kernel,  # the path of its source at that time, as in Inductor's
            os.path.join(subgraphs, "vllm_compile_cache.py"): repr(handle),
            kernel: "generated code, which is not kept",
            path: text,
        }
        _choices_of(kernel).save(Config({"XBLOCK": 64}), 1000)
        for file_name, content in contents.items():
            with open(file_name, "w") as out:
                out.write(content)
        return Compiled(text)
