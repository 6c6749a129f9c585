"""vLLM's engine in this process, from the command line of `vllm serve`, without weights, tokenizer and child processes.

Upstream, all in vLLM: `vllm/entrypoints/cli/serve.py` (`ServeSubcommand`: the options), `vllm/engine/arg_utils.py`
(`AsyncEngineArgs`), `vllm/v1/engine/llm_engine.py` (`LLMEngine`; with VLLM_ENABLE_V1_MULTIPROCESSING=0 its core runs here),
`vllm/model_executor/models/registry.py` (`_run_in_subprocess`, which looks at a model's class), `vllm/sampling_params.py`,
`vllm/v1/worker/gpu_model_runner.py` and, from 0.33, `vllm/v1/worker/gpu/model_runner.py`
(`GPUModelRunner._dummy_sampler_run`, which `profile_run` calls behind the run of all models).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from aot_cache.errors import DeclarationError, one_line
from aot_cache.upstream.virtual import torch_fake_group, vllm_adapters

REGISTRY = "vllm.model_executor.models.registry"
WRAPPER = "vllm.compilation.wrapper"
_COMMUNICATE = "vllm.distributed.device_communicators"
COMMUNICATORS = {
    "pynccl": "PyNcclCommunicator",
    "custom_all_reduce": "CustomAllreduce",
    "symm_mem": "SymmMemCommunicator",
    "flashinfer_all_reduce": "FlashInferAllReduce",
}
"""Module of vLLM → its class that shares memory with the other ranks."""
_RUNNERS = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner")
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_HOST_IP": "127.0.0.1",
}
"""Variables for a start in one process. None of them is part of vLLM's key for compiled models (`envs.compile_factors`)."""


class EnoughSeen(Exception):
    """Ends a start whose models are compiled."""


def settle(folder: Path, rank: int, ranks: int) -> None:
    """Prepare this process for a rank of an engine: nothing of it runs in children, its process groups are fake, and its caches
    are in `folder`. To be called before vLLM is imported."""
    os.environ.update(SETTINGS, VLLM_CACHE_ROOT=str(folder))
    registry: Any = importlib.import_module(REGISTRY)
    registry._run_in_subprocess = lambda look: look()
    torch_fake_group.only_fake(rank, ranks)
    if ranks > 1:
        _talk_to_nobody()


def _talk_to_nobody() -> None:
    """Let groups of ranks use torch's collective operators on their fake process groups, and have no queue of messages.

    vLLM's own communicators share memory with the other ranks, so they are disabled. What it traces does not depend on them:
    there, each collective is one operator of vLLM's.
    """
    state: Any = importlib.import_module("vllm.distributed.parallel_state")
    state.in_the_same_node_as = lambda pg, source_rank=0: [True] * pg.size()  # found out through shared memory

    def __init__(self: Any, group: Any, *_args: Any, **_kwargs: Any) -> None:
        self.group, self.rank, self.world_size = group, group.rank(), group.size()
        self.available, self.disabled = False, True

    for module, name in COMMUNICATORS.items():
        found: Any = getattr(importlib.import_module(f"{_COMMUNICATE}.{module}"), name)
        found.__init__ = __init__
    queue: Any = importlib.import_module(f"{_COMMUNICATE}.shm_broadcast").MessageQueue
    queue.create_from_process_group = staticmethod(lambda *_args, **_kwargs: None)


def options_of(arguments: Sequence[str]) -> Any:
    """vLLM's `AsyncEngineArgs` for the arguments of `vllm serve`, but without weights and tokenizer.

    Raises:
        DeclarationError: vLLM does not take them.
    """
    engine = importlib.import_module("vllm.engine.arg_utils")
    parser, said = _parser(), io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            found: argparse.Namespace = parser.parse_args(["serve", *arguments])
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        last = lines[-1].partition("error: ")[2] or lines[-1] if lines else "no reason given"
        raise DeclarationError(
            f"vllm serve does not take these arguments: {last}", hint="see `vllm serve --help=all`"
        ) from None
    except (ValueError, TypeError, OSError) as error:
        raise DeclarationError(f"vllm serve does not take these arguments: {one_line(error)}") from error
    if getattr(found, "model_tag", None) is not None:
        found.model = found.model_tag
    try:
        options = engine.AsyncEngineArgs.from_cli_args(found)
    except Exception as error:  # of pydantic, of transformers, of the hub's client
        raise _cannot_serve(found.model, error) from error
    options.load_format, options.skip_tokenizer_init, options.disable_log_stats = "dummy", True, True
    return options


def _parser() -> Any:
    """The parser of `vllm serve`.

    Raises:
        DeclarationError: this build of vLLM has no code for the target.
    """
    serve = importlib.import_module("vllm.entrypoints.cli.serve")
    utils = importlib.import_module("vllm.utils.argparse_utils")
    parser: Any = utils.FlexibleArgumentParser(prog="vllm")
    try:
        serve.ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    except RuntimeError as error:  # its defaults depend on the device
        hint = "build with the wheel of vLLM for the target"
        raise DeclarationError(f"this vLLM cannot serve on the target: {one_line(error)}", hint=hint) from error
    return parser


def configuration(options: Any) -> Any:
    """vLLM's configuration, as its API server makes it.

    Raises:
        DeclarationError: vLLM refuses the options, or cannot read the model's config.json.
    """
    context = importlib.import_module("vllm.usage.usage_lib").UsageContext.OPENAI_API_SERVER
    try:
        return options.create_engine_config(context)
    except Exception as error:  # of pydantic, of transformers, of the hub's client
        raise _cannot_serve(options.model, error) from error


def _cannot_serve(model: str, error: Exception) -> DeclarationError:
    return DeclarationError(f"vLLM cannot serve {model} so: {_reason(error)}")


def _reason(error: Exception) -> str:
    """The reason in an error of pydantic, which writes it between its own lines."""
    errors = getattr(error, "errors", None)
    with contextlib.suppress(Exception):
        if callable(errors):
            return "; ".join(str(one["msg"]) for one in errors())
    return one_line(error)


def engine_of(config: Any, rank: int) -> Any:
    """The engine, started as one rank: loaded, profiled, captured."""
    engines = importlib.import_module("vllm.v1.engine.llm_engine")
    executors = importlib.import_module("vllm.v1.executor.uniproc_executor")
    plain: Any = executors.UniProcExecutor

    class OneRank(plain):  # type: ignore[misc]  # a variable
        def _distributed_args(self) -> tuple[str, int, int]:
            return super()._distributed_args()[0], rank, rank

    if config.lora_config is not None:
        vllm_adapters.know_which_tokens_have_one()
    return engines.LLMEngine(vllm_config=config, executor_class=OneRank, log_stats=False, multiprocess_mode=False)


def sampling(max_tokens: int, wanted: Mapping[str, Any]) -> Any:
    """Sampling parameters for `max_tokens` tokens, whatever is sampled."""
    params = importlib.import_module("vllm.sampling_params").SamplingParams
    return params(max_tokens=max_tokens, ignore_eos=True, detokenize=False, **wanted)


def end_when_models_are_compiled() -> None:
    """Let the start raise `EnoughSeen` where the profile run has run all models once, and so has compiled them."""

    def _dummy_sampler_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        raise EnoughSeen

    for name in _RUNNERS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name).GPUModelRunner._dummy_sampler_run = _dummy_sampler_run


def run_models_as_python() -> None:
    """Run the models that vLLM compiles as plain Python, without `torch.compile`: they are compiled in another process."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    importlib.import_module(WRAPPER).TorchCompileWithNoGuardsWrapper.__call__ = __call__


class Compiled:
    """A compiled model that was saved, and runs as plain Python here."""

    def __init__(self, made: Any, around: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self._made, self._around = made, around

    def __call__(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        context = importlib.import_module("vllm.forward_context").get_forward_context()
        before, context.skip_compiled = context.skip_compiled, True
        try:
            return model.forward(*args, **kwargs)
        finally:
            context.skip_compiled = before

    def save_compiled_function(self, path: str) -> None:
        with self._around():
            self._made.save_compiled_function(path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._made, name)


def compile_without_running(
    around: Callable[[], contextlib.AbstractContextManager[None]], note: Callable[[str], None]
) -> None:
    """Let vLLM compile and save its models as it does, `around` each of these steps, and run them as plain Python.

    Args:
        note: called with the name of each class that was compiled.
    """

    wrapper: Any = importlib.import_module(WRAPPER).TorchCompileWithNoGuardsWrapper
    original = wrapper.aot_compile

    def aot_compile(self: Any, *args: Any, **kwargs: Any) -> Compiled:
        with around():
            made = original(self, *args, **kwargs)
        note(f"{type(self).__module__}:{type(self).__qualname__}")
        return Compiled(made, around)

    wrapper.aot_compile = aot_compile
