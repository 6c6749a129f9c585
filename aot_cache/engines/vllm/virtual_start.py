"""vLLM on the virtual device: from the command line of `vllm serve` to what it launches and compiles, without a GPU.

The builder's workers call `run` and `compile_models`, each in a process of its own (`builder.engine_worker`). Both go vLLM's
own way. `run` goes it to the end: load, profile run, KV cache, every capture, and then requests of many sizes and kinds, whose
answers are nonsense. `compile_models` goes it up to the point where vLLM has compiled its models.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from aot_cache.artifact.engine_cache import Caches
from aot_cache.builder.engine_worker import Process, Run
from aot_cache.builder.messages import OtherRanks
from aot_cache.engines import requests
from aot_cache.engines.requests import Limits, Wave, waves
from aot_cache.engines.vllm import compile_cache
from aot_cache.engines.vllm.plugin import AT_START
from aot_cache.errors import AotCacheError, DeclarationError, at_line_of
from aot_cache.upstream.virtual import torch_fake_host, vllm_adapters, vllm_engine, vllm_operators

__all__ = ["AT_START", "ENVIRONMENT", "PACKAGE", "TRIED", "compile_models", "model_folder", "run", "version"]
Progress = Callable[[str, int, int], None]
PACKAGE = "vllm"
TRIED = ("0.24.0", "0.33.0")
ENVIRONMENT = {"VLLM_USE_AOT_COMPILE": "0", "VLLM_DISABLE_COMPILE_CACHE": "1"}
"""For `run`: there vLLM's models run as plain Python."""
_STEPS = 4
_MOST_STEPS = 10_000
_NOT_WITH_DRAFTS = ("min_p", "logit_bias")


# --- kernels ----------------------------------------------------------------------------------------------------------


def version() -> str:
    """vLLM's version. Raises ImportError if it is not installed."""
    return metadata.version(PACKAGE)


def model_folder(arguments: Sequence[str]) -> Path | None:
    """The folder with the model's configuration; None for a model that is not in a folder of this machine."""
    folder = Path(vllm_engine.options_of(arguments).model)
    return folder if folder.is_dir() else None


def run(arguments: Sequence[str], process: Process, progress: Progress) -> Run:
    """Start one rank of vLLM, and send it requests.

    Raises:
        DeclarationError: vLLM does not take the command line.
        AotCacheError: it cannot be started on the virtual device.
    """
    vllm_engine.settle(process.folder, process.rank, process.ranks)
    vllm_operators.register()
    vllm_engine.run_models_as_python()
    config = _configuration(arguments, process)
    progress("start", 0, 1)
    try:
        engine = vllm_engine.engine_of(config, process.rank)
    except Exception as error:
        raise AotCacheError(f"vLLM cannot be started on the virtual device: {at_line_of(PACKAGE, error)}") from error
    progress("start", 1, 1)
    limits = _limits(config)
    adapters, number = [None, *vllm_adapters.add(engine, limits.adapters)], itertools.count()
    random.seed(0)

    def send(wave: Wave) -> None:
        _send(engine, wave, limits.vocabulary, [adapters[n] for n in wave.adapters], number)

    def drop() -> None:
        with contextlib.suppress(Exception):
            engine.abort_request([str(n) for n in range(next(number))])

    wanted = waves(limits, refused=_NOT_WITH_DRAFTS if config.speculative_config is not None else ())
    return requests.sent(wanted, send, drop, progress, PACKAGE)


def _send(engine: Any, wave: Wave, vocabulary: int, adapters: Sequence[Any], number: Iterator[int]) -> None:
    """Send requests, and let the engine answer them.

    Raises:
        AotCacheError: they have no end.
    """

    def add(prompts: Sequence[Sequence[int]]) -> None:
        for prompt, adapter in zip(prompts, itertools.cycle(adapters)):
            wanted = vllm_engine.sampling(wave.tokens, wave.sampling)
            given = {"prompt_token_ids": list(prompt)}
            engine.add_request(str(next(number)), given, wanted, lora_request=adapter)

    def answer() -> None:
        for _ in range(_MOST_STEPS):
            if not engine.has_unfinished_requests():
                return
            engine.step()
        raise AotCacheError(f"the requests have no end within {_MOST_STEPS} steps")

    first, later = (
        [[random.randrange(5, vocabulary) for _ in range(length)] for length in lengths]
        for lengths in (wave.lengths, wave.later)
    )
    add(first)
    if later:
        for _ in range(_STEPS):
            engine.step()
        add(later)
    answer()
    if wave.again:
        add(first)
        answer()


def _limits(config: Any) -> Limits:
    scheduler = config.scheduler_config
    return Limits(
        requests=scheduler.max_num_seqs,
        batched_tokens=scheduler.max_num_batched_tokens,
        length=config.model_config.max_model_len,
        vocabulary=config.model_config.get_vocab_size(),
        adapters=config.lora_config.max_loras if config.lora_config is not None else 0,
    )


_SPLITS = ("pipeline_parallel_size", "data_parallel_size")


def _configuration(arguments: Sequence[str], process: Process) -> Any:
    """vLLM's configuration.

    Raises:
        DeclarationError: it cannot be started in one process per rank that knows nothing of the others.
        OtherRanks: it is for another world size.
    """
    options = vllm_engine.options_of(arguments)
    split = {name: getattr(options, name) for name in _SPLITS if getattr(options, name, 1) > 1}
    if split:
        found = ", ".join(f"{name} {size}" for name, size in split.items())
        raise DeclarationError(
            "no split but --tensor-parallel-size", found, "record the server on its GPUs (`aot-cache record`)"
        )
    if options.tensor_parallel_size != process.ranks:
        raise OtherRanks(options.tensor_parallel_size)
    config = vllm_engine.configuration(options)
    if config.model_config.runner_type != "generate":
        found = f"{config.model_config.runner_type} ({config.model_config.model})"
        raise DeclarationError(
            "a model that generates text", found, "record the server on its GPU (`aot-cache record`)"
        )
    return config


# --- compiled models --------------------------------------------------------------------------------------------------


def compile_models(
    arguments: Sequence[str], process: Process, keep: Callable[[Caches], None], progress: Progress
) -> list[str]:
    """Let one rank of vLLM compile its models and save them, and keep what it saved. Returns the names of their classes.

    Raises:
        DeclarationError: vLLM does not take the command line.
        AotCacheError: vLLM could not compile.
    """
    names: list[str] = []

    def note(name: str) -> None:
        names.append(name)
        progress("models", len(names), len(names) + 1)

    vllm_engine.settle(process.folder, process.rank, process.ranks)
    vllm_operators.register()
    vllm_engine.compile_without_running(torch_fake_host.compiling, note)
    vllm_engine.end_when_models_are_compiled()
    compile_cache.record_model_info(keep)
    recorder = compile_cache.Recorder(keep)
    recorder.start()
    progress("models", 0, 1)
    with torch_fake_host.running():
        config = _configuration(arguments, process)
        try:
            vllm_engine.engine_of(config, process.rank)
        except vllm_engine.EnoughSeen:
            pass
        except Exception as error:
            raise AotCacheError(
                f"vLLM cannot compile its models without a GPU: {at_line_of(PACKAGE, error)}"
            ) from error
    recorder.finish()
    progress("models", len(names), len(names))
    return names
