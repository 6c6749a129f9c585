"""SGLang on the virtual device: from the command line of `sglang serve` to what it launches and calls, without a GPU.

The builder's worker calls `run`, which goes SGLang's own way to the end: load, memory pools, every capture of target and draft,
and then requests of many sizes and kinds, whose answers are nonsense. SGLang puts `torch.compile` on functions, and keeps no
cache of compiled models of its own, so there is nothing for `compile_models` to do.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from aot_cache.artifact.engine_cache import Caches
from aot_cache.builder.engine_worker import Process, Run
from aot_cache.builder.messages import OtherRanks
from aot_cache.engines import requests
from aot_cache.engines.requests import Limits, Wave, waves
from aot_cache.errors import AotCacheError, DeclarationError, at_line_of
from aot_cache.upstream.virtual import sglang_compiled, sglang_engine, sglang_values

Progress = Callable[[str, int, int], None]
PACKAGE = "sglang"
TRIED = ("0.5.16", "0.5.23")
ENVIRONMENT: dict[str, str] = {}
AT_START = ("num_cache_lines",)
"""The slots of the Mamba cache, which fill the memory that is left. Two starts with other memory differ in nothing else."""
_SPLITS = ("pp_size", "dp_size", "ep_size", "attn_cp_size")
_REFUSED = ("min_tokens",)
"""Not without a tokenizer."""


def version() -> str:
    """SGLang's version. Raises ImportError if it is not installed."""
    return metadata.version(PACKAGE)


def model_folder(arguments: Sequence[str]) -> Path | None:
    """The folder with the model's configuration; None for a model that is not in a folder of this machine."""
    model = sglang_engine.model_of(arguments)
    return Path(model) if model and Path(model).is_dir() else None


def run(arguments: Sequence[str], process: Process, progress: Progress) -> Run:
    """Start the scheduler of one rank, and send it requests.

    Raises:
        DeclarationError: SGLang does not take the command line.
        OtherRanks: it is for another world size.
        AotCacheError: it cannot be started on the virtual device.
    """
    sglang_engine.settle(process.rank, process.ranks)
    sglang_compiled.run_nothing()
    sglang_values.follow()
    options = _options(arguments, process)
    progress("start", 0, 1)
    try:
        scheduler = sglang_engine.scheduler_of(options, process.rank)
    except Exception as error:
        raise AotCacheError(f"SGLang cannot be started on the virtual device: {at_line_of(PACKAGE, error)}") from error
    progress("start", 1, 1)
    limits, number = _limits(scheduler), itertools.count()
    random.seed(0)

    def made(lengths: Sequence[int], wave: Wave) -> list[Any]:
        prompts = [[random.randrange(5, limits.vocabulary) for _ in range(length)] for length in lengths]
        return [sglang_engine.request(str(next(number)), prompt, wave.tokens, wave.sampling) for prompt in prompts]

    def send(wave: Wave) -> None:
        first = made(wave.lengths, wave)
        sglang_engine.serve(scheduler, first, made(wave.later, wave))
        if wave.again:
            prompts = [one.input_ids for one in first]
            again = [sglang_engine.request(str(next(number)), one, wave.tokens, wave.sampling) for one in prompts]
            sglang_engine.serve(scheduler, again)

    def drop() -> None:
        with contextlib.suppress(Exception):
            sglang_engine.forget(scheduler)

    return requests.sent(waves(limits, _REFUSED), send, drop, progress, PACKAGE)


def compile_models(
    arguments: Sequence[str], process: Process, keep: Callable[[Caches], None], progress: Progress
) -> list[str]:
    """Nothing: SGLang's compiled functions are calls in the plan."""
    return []


def _options(arguments: Sequence[str], process: Process) -> Any:
    options = sglang_engine.options_of(arguments)
    split = {name: getattr(options, name) for name in _SPLITS if getattr(options, name, 1) > 1}
    if split:
        found = ", ".join(f"{name} {size}" for name, size in split.items())
        raise DeclarationError("no split but --tp", found, "record the server on its GPUs (`aot-cache record`)")
    if options.tp_size != process.ranks:
        raise OtherRanks(options.tp_size)
    return options


def _limits(scheduler: Any) -> Limits:
    model = scheduler.model_config
    return Limits(
        requests=scheduler.max_running_requests,
        batched_tokens=scheduler.chunked_prefill_size or scheduler.max_prefill_tokens,
        length=model.context_len,
        vocabulary=model.vocab_size,
    )
