"""vLLM on the virtual device: from the command line of `vllm serve` to what it launches and compiles, without a GPU.

The builder's workers call `run` and `compile_models`, each in a process of its own (`builder.engine_worker`). Both go vLLM's
own way. `run` goes it to the end: load, profile run, KV cache, every capture, and then requests of many sizes and kinds, whose
answers are nonsense. `compile_models` goes it up to the point where vLLM has compiled its models.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from aot_cache.artifact.engine_cache import Caches
from aot_cache.builder.engine_worker import Process, Run
from aot_cache.builder.messages import OtherRanks
from aot_cache.engines.vllm import compile_cache
from aot_cache.engines.vllm.plugin import AT_START
from aot_cache.errors import AotCacheError, DeclarationError, one_line
from aot_cache.upstream.virtual import torch_fake_host, vllm_adapters, vllm_engine, vllm_operators

__all__ = ["AT_START", "ENVIRONMENT", "PACKAGE", "TRIED", "compile_models", "model_folder", "run", "version"]
Progress = Callable[[str, int, int], None]
PACKAGE = "vllm"
TRIED = ("0.24.0", "0.33.0")
ENVIRONMENT = {"VLLM_USE_AOT_COMPILE": "0", "VLLM_DISABLE_COMPILE_CACHE": "1"}
"""For `run`: there vLLM's models run as plain Python."""
_STEPS = 4
_MOST_STEPS = 10_000
_GIVEN_UP = 8
"""How many waves in a row may fail before the rest is not tried."""


# --- requests ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds the requests that a server takes."""

    requests: int
    batched_tokens: int
    length: int
    vocabulary: int
    drafts: int
    adapters: int = 0


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Requests that are sent at once; those in `later` a few steps after them; with `again`, the first once more at the end.

    Args:
        label: what it is for.
        lengths: tokens of each prompt.
        tokens: how many are generated.
        sampling: fields of vLLM's `SamplingParams`.
        again: the same prompts, which a prefix cache has by then.
        adapters: LoRA adapters that the requests have, in turn; 0 is none.
    """

    label: str
    lengths: Sequence[int]
    tokens: int = 12
    sampling: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0.0})
    later: Sequence[int] = ()
    again: bool = False
    adapters: Sequence[int] = (0,)


_SAMPLED = {"temperature": 0.8}
SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "temperature": _SAMPLED,
    "top-k": {**_SAMPLED, "top_k": 20},
    "top-p": {**_SAMPLED, "top_p": 0.9},
    "top-k and top-p": {**_SAMPLED, "top_k": 20, "top_p": 0.9},
    "a seed": {**_SAMPLED, "seed": 7},
    "penalties": {"temperature": 0.0, "presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "logprobs": {"temperature": 0.0, "logprobs": 3},
    "logprobs of the prompt": {"temperature": 0.0, "prompt_logprobs": 1},
    "no end before some tokens": {"temperature": 0.0, "min_tokens": 4},
}
ALONE: Mapping[str, Mapping[str, Any]] = {
    "min-p": {**_SAMPLED, "min_p": 0.1},
    "a bias": {"temperature": 0.0, "logit_bias": {5: 1.0}},
}
"""Samplers that vLLM does not take together with drafts."""


def waves(limits: Limits) -> list[Wave]:
    """Requests that reach what a server reaches, as far as it depends on sizes: each power of two and its neighbours, because
    kernels round sizes up to those, and both ends of the limits."""
    tokens = min(12, limits.length - 1)
    longest = limits.length - tokens
    batches = _around_powers(limits.requests)
    alone = [n for n in _around_powers(min(longest, limits.batched_tokens + 1)) if n <= longest]
    out = [Wave(label=f"1 of {n}", lengths=[n], tokens=tokens) for n in alone]
    for length in (1, 5, 64):  # a prompt of one token is a decode step without drafts
        if length <= longest:
            out += [Wave(label=f"{n} of {length}", lengths=[length] * n, tokens=tokens) for n in batches]
    for over in (1, 2, 64):  # prompts that do not fit into one step: the last one is split
        lengths = _split(limits.batched_tokens + over, longest)
        if len(lengths) <= limits.requests:
            out.append(Wave(label=f"{over} over the tokens of a step", lengths=lengths, tokens=tokens))
    several = sorted({min(n, limits.requests) for n in (1, 3, 16)})
    short = min(64, longest)
    samplers = {**SAMPLERS, **({} if limits.drafts else ALONE)}
    for name, wanted in samplers.items():
        wanted = {**wanted, "min_tokens": min(wanted["min_tokens"], tokens)} if "min_tokens" in wanted else wanted
        out += [Wave(label=f"{n} with {name}", lengths=[short] * n, tokens=tokens, sampling=wanted) for n in several]
    for late in sorted({1, min(5, longest), min(300, longest)}):  # prompts beside steps that generate
        for n, more in ((1, 1), (3, 2), (16, 8)):
            if n + more <= limits.requests:
                label = f"{n}, then {more} of {late}"
                out.append(Wave(label=label, lengths=[short] * n, tokens=tokens, later=[late] * more))
    for n, more in ((1, 1), (3, 2), (16, 8)):  # in one step, some that generate without drafts and some that do not
        if n + more <= limits.requests:
            lengths = [1] * n + [min(300, longest)] * more
            out.append(Wave(label=f"{n} of 1 beside {more} longer", lengths=lengths, tokens=tokens))
    for n in several:  # prompts of several blocks
        length = min(2048, longest)
        out.append(Wave(label=f"{n} of {length}, twice", lengths=[length] * n, tokens=tokens, again=True))
    if limits.adapters:  # their kernels see how many tokens there are
        out += _with_adapters(limits.adapters, alone, batches, tokens)
    return list({wave.label: wave for wave in out}.values())


def _with_adapters(adapters: int, alone: Sequence[int], batches: Sequence[int], tokens: int) -> list[Wave]:
    all_and_none = [1, 0, *range(2, adapters + 1)]
    out = [Wave(label=f"1 of {n} with an adapter", lengths=[n], tokens=tokens, adapters=[1]) for n in alone]
    for label, given in (("with an adapter", [1]), ("with all adapters and none", all_and_none)):
        out += [Wave(label=f"{n} of 1 {label}", lengths=[1] * n, tokens=tokens, adapters=given) for n in batches]
    return out


def _split(total: int, most: int) -> list[int]:
    """Lengths of at most `most` that add up to `total`."""
    whole, rest = divmod(total, most)
    return [most] * whole + ([rest] if rest else [])


def _around_powers(most: int) -> list[int]:
    """1 and `most`, and in between each power of two, one less and one more."""
    powers = (1 << n for n in range(1, most.bit_length() + 1))
    return sorted({n for power in powers for n in (power - 1, power, power + 1) if 1 <= n <= most} | {1, most})


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
        raise AotCacheError(f"vLLM cannot be started on the virtual device: {_with_place(error)}") from error
    progress("start", 1, 1)
    limits, lost = _limits(config), []
    wanted, adapters = waves(limits), [None, *vllm_adapters.add(engine, limits.adapters)]
    number, answered, failed = itertools.count(), 0, 0
    random.seed(0)
    for done, wave in enumerate(wanted):
        progress("requests", done, len(wanted))
        try:
            _send(engine, wave, limits.vocabulary, [adapters[n] for n in wave.adapters], number)
            answered, failed = answered + 1, 0
        except Exception as error:
            lost.append(f"requests {wave.label}: {_with_place(error)}")
            failed += 1
            with contextlib.suppress(Exception):
                engine.abort_request([str(n) for n in range(next(number))])
        if failed == _GIVEN_UP:
            lost.append(f"the {len(wanted) - done - 1} kinds of requests after these were not tried")
            break
    progress("requests", len(wanted), len(wanted))
    return Run(requests=[wave.label for wave in wanted], answered=answered, unreached=lost)


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


def _with_place(error: Exception) -> str:
    """The error, and the line outside of this package and torch that it came from."""
    place, trace = "", error.__traceback__
    while trace is not None:
        file = trace.tb_frame.f_code.co_filename
        if "/vllm/" in file:
            place = f" ({file.rpartition('/vllm/')[2]}:{trace.tb_lineno})"
        trace = trace.tb_next
    return f"{one_line(error)}{place}"


def _limits(config: Any) -> Limits:
    scheduler, drafts = config.scheduler_config, config.speculative_config
    return Limits(
        requests=scheduler.max_num_seqs,
        batched_tokens=scheduler.max_num_batched_tokens,
        length=config.model_config.max_model_len,
        vocabulary=config.model_config.get_vocab_size(),
        drafts=drafts.num_speculative_tokens if drafts is not None else 0,
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
            raise AotCacheError(f"vLLM cannot compile its models without a GPU: {_with_place(error)}") from error
    recorder.finish()
    progress("models", len(names), len(names))
    return names
