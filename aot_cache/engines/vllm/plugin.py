"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes before they do anything else.

Without AOT_CACHE and AOT_CACHE_POLICY nothing happens, but that `aot-cache record` also keeps what vLLM compiles. Else the bundle
is loaded in the processes that import vLLM's GPU worker, right after that import. The API server and the children that look at a
model's class import no worker, and pay only for this module. Some models start Triton's driver when they are imported: these
processes get the driver's C module from the bundle, too. Nothing here raises: vLLM serves without us, and its log has one
warning.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING

from aot_cache.runtime.engine_start import Start, asked_for
from aot_cache.upstream.after_import import after_import, when_triton_comes

if TYPE_CHECKING:
    from aot_cache.engines.vllm.compile_cache import Served

AT_START = ("num_cache_lines",)
"""Constants of vLLM's kernels that are the number of blocks of the KV cache: in 0.24, of both causal-conv kernels."""
_LOG = logging.getLogger("vllm.aot_cache")
_start = Start(_LOG)
_done = False
_models: Served | None = None
_front: list[Callable[[], None]] = []
"""Takes out what a process needs only until it loads the bundle."""


def register() -> None:
    """Load the bundle, and call `ready` and `seal`, at the right steps of vLLM's worker. May be called more than once."""
    global _done
    serving = asked_for()
    recording = bool(os.environ.get("AOT_CACHE_RECORD_TO"))
    if _done or not (serving or recording):
        return
    _done = True
    if serving:
        _start.or_warn(_wait)
    if recording:
        _start.or_warn(_record)


def _wait() -> None:
    from aot_cache.engines import exporter
    from aot_cache.upstream.hooks import vllm_compile_cache, vllm_metrics, vllm_worker

    after_import(vllm_worker.MODULE, lambda: _start.or_warn(_begin))
    after_import(vllm_compile_cache.REGISTRY, lambda: _start.or_warn(_give_model_info))
    when_triton_comes(lambda: _start.or_warn(_give_c_modules))
    exporter.publish(vllm_metrics.add_collector)


def _begin() -> None:
    """vLLM's worker is imported; no kernel was launched yet."""
    while _front:
        _front.pop()()
    from aot_cache.engines import loading
    from aot_cache.upstream.hooks import vllm_worker

    _start.timed(loading.load)
    vllm_worker.after_steps({"load_model": _ready, "initialize_from_config": _ready, "compile_or_warm_up_model": _seal})
    _start.or_warn(_serve_models)


def _serve_models() -> None:
    from aot_cache.engines.vllm import compile_cache
    from aot_cache.runtime import loader

    def count(name: str) -> None:
        loader.LEDGER.note("graph", name, in_capture=False)

    global _models
    _models = compile_cache.serve(lambda: [kernels.bundle for kernels in loader.loaded()], count)


def _give_model_info() -> None:
    from aot_cache.engines.vllm import compile_cache

    compile_cache.serve_model_info()


def _give_c_modules() -> None:
    """Triton is imported. What is looked for is read from the bundle when Triton would run a C compiler."""
    from aot_cache.upstream.hooks import triton_launcher

    def find(source: str) -> bytes | None:
        try:
            from aot_cache.runtime import c_modules

            return c_modules.of_environment(source)
        except Exception as error:  # Triton builds it
            _LOG.warning("aot-cache: no C module from the bundle: %s", error)
            return None

    _front.append(triton_launcher.serve(find))


def _record() -> None:
    from aot_cache.upstream.hooks import vllm_compile_cache, vllm_worker

    after_import(vllm_worker.MODULE, lambda: _start.or_warn(_record_models))
    after_import(vllm_compile_cache.REGISTRY, lambda: _start.or_warn(_record_model_info))


def _record_models() -> None:
    from aot_cache.engines.vllm import compile_cache
    from aot_cache.runtime import record
    from aot_cache.upstream.hooks import vllm_worker

    recorder = compile_cache.Recorder(record.keep_caches)
    recorder.start()
    vllm_worker.after_steps({"compile_or_warm_up_model": lambda _: _start.or_warn(recorder.finish)})


def _record_model_info() -> None:
    from aot_cache.engines.vllm import compile_cache
    from aot_cache.runtime import record

    compile_cache.record_model_info(record.keep_caches)


def _ready(worker: object) -> None:
    """The model is loaded, or the KV cache made, whose size some kernels are compiled for (`AT_START`)."""

    def install() -> None:
        import aot_cache
        from aot_cache.upstream.hooks import vllm_worker

        blocks = vllm_worker.cache_blocks(worker)
        aot_cache.ready(at_start={} if blocks is None else dict.fromkeys(AT_START, blocks))

    _start.timed(install)


def _seal(_worker: object) -> None:
    """The last step before requests: all graphs are captured."""

    def say() -> None:
        import aot_cache

        aot_cache.seal()
        _start.say(_models_found(_models))

    _start.or_warn(say)


def seconds() -> float:
    """How long loading and installing took in this process so far."""
    return _start.seconds


def _models_found(models: Served | None) -> str:
    """What `Start.say` says of them."""
    if models is None or not models.asked:
        return ""
    return f"{models.found} of {models.asked} models that vLLM compiles were in the bundle; "
