"""SGLang's scheduler in this process, from the command line of `sglang serve`, without weights, tokenizer and child processes.

Upstream, all in SGLang: `sglang/cli/serve.py` (a model in front is `--model-path`), `sglang/srt/server_args.py`
(`prepare_server_args`, `PortArgs`), `sglang/srt/managers/scheduler.py` (`run_scheduler_process` makes a `Scheduler` and calls
`run_event_loop`, which ends once `gracefully_exit` is set; `flush_cache`), `sglang/srt/runtime_context.py` (`publish`, in newer
releases), `sglang/srt/managers/scheduler_components/request_receiver.py` (`SchedulerRequestReceiver.recv_requests`, asked before
each step), `sglang/srt/managers/io_struct.py` (`TokenizedGenerateReqInput`), `sglang/srt/sampling/sampling_params.py`,
`sglang/srt/distributed/parallel_state.py` (`GroupCoordinator`; its parameters `use_…` name communicators).
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import io
import itertools
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from aot_cache.errors import AotCacheError, DeclarationError, one_line
from aot_cache.upstream.virtual import sglang_compiled, torch_fake_group

SCHEDULER = "sglang.srt.managers.scheduler"
RECEIVER = "sglang.srt.managers.scheduler_components.request_receiver"
REQUESTS = "sglang.srt.managers.io_struct"
SAMPLING = "sglang.srt.sampling.sampling_params"
_SERVER = "sglang.srt.server_args"
_DISTRIBUTED = "sglang.srt.distributed"
_UTILITIES = "sglang.srt.utils.common"
_MODEL = ("--model-path", "--model")
_OURS = ("--load-format", "dummy", "--skip-tokenizer-init")
_OWN, _FIRST = ("gpu_id", "tp_rank"), ("pp_rank", "moe_ep_rank", "moe_dp_rank", "attn_cp_rank")
PLACE = frozenset({"server_args", "port_args", *_OWN, *_FIRST, "dp_rank"})
"""What a `Scheduler` may want to be made. Of these, 0.5.23 wants the first two only."""
_LATER = 4
"""At which step the requests that come later are there."""
_MOST_STEPS = 10_000


def settle(rank: int, ranks: int) -> None:
    """Prepare this process for a rank: its process groups are fake. To be called before SGLang is imported."""
    torch_fake_group.only_fake(rank, ranks)
    if ranks > 1:
        _talk_to_nobody()


def _talk_to_nobody() -> None:
    """Let groups of ranks use torch's collective operators on their fake process groups: SGLang's own communicators share memory
    with the other ranks, and so does its queue of messages."""
    group: Any = importlib.import_module(f"{_DISTRIBUTED}.parallel_state").GroupCoordinator
    original, named = group.__init__, inspect.signature(group.__init__)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        given = named.bind(self, *args, **kwargs)
        given.apply_defaults()
        given.arguments.update({name: False for name in given.arguments if name.startswith("use_")})
        original(*given.args, **given.kwargs)

    group.__init__ = __init__
    said: Any = importlib.import_module(_UTILITIES).broadcast_pyobj  # all ranks know what the first would tell them
    sglang_compiled.everywhere(said, lambda data, *_args, **_kwargs: data)


def with_model(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the model by its option."""
    front = arguments and not arguments[0].startswith("-")
    return ["--model-path", *arguments] if front else list(arguments)


def model_of(arguments: Sequence[str]) -> str:
    """The model that the arguments name; empty without one."""
    given = with_model(arguments)
    for option, value in itertools.pairwise(given):
        if option in _MODEL:
            return value
    return next((one.partition("=")[2] for one in given if one.partition("=")[0] in _MODEL), "")


def options_of(arguments: Sequence[str]) -> Any:
    """SGLang's `ServerArgs` for the arguments of `sglang serve`, but without weights and tokenizer.

    Raises:
        DeclarationError: SGLang does not take them.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return importlib.import_module(_SERVER).prepare_server_args([*with_model(arguments), *_OURS])
    except SystemExit:
        lines = [line for line in said.getvalue().splitlines() if line.strip()]
        reason = lines[-1].partition("error: ")[2] or lines[-1] if lines else "no reason given"
    except Exception as error:  # of its own checks, of transformers, of the hub's client
        reason = one_line(error)
    hint = "see `sglang serve MODEL --help`"
    raise DeclarationError(f"sglang serve does not take these arguments: {reason}", hint=hint)


def scheduler_of(options: Any, rank: int) -> Any:
    """The scheduler of one rank: its models are loaded, and their graphs captured."""
    module: Any = importlib.import_module(SCHEDULER)
    if hasattr(module, "publish"):
        world = module.spawn_world_rank(options, tp_rank=rank, pp_rank=0)
        module.publish(options, role="scheduler", ranks=module.SpawnRanks(world_rank=world, dp_rank=None, gpu_id=rank))
    given = {
        "server_args": options,
        "port_args": importlib.import_module(_SERVER).PortArgs.init_new(options),
        **dict.fromkeys(_OWN, rank),
        **dict.fromkeys(_FIRST, 0),
        "dp_rank": None,
    }
    wanted = list(inspect.signature(module.Scheduler.__init__).parameters)[1:]
    made = module.Scheduler(**{name: given[name] for name in wanted})
    made.output_streamer.send_to_detokenizer = _Nobody()
    return made


class _Nobody:
    """Stands for the process that would get the tokens."""

    def send_output(self, *_: Any, **__: Any) -> None: ...


def request(name: str, prompt: Sequence[int], tokens: int, wanted: Mapping[str, Any]) -> Any:
    """A request for `tokens` tokens, whatever is sampled.

    Args:
        wanted: parameters, by their names in an OpenAI-compatible API.
    """
    given = dict(wanted)
    of_prompt = given.pop("prompt_logprobs", None)
    logprobs = given.pop("logprobs", of_prompt)
    if "seed" in given:
        given["sampling_seed"] = given.pop("seed")
    if "logit_bias" in given:
        given["logit_bias"] = {str(token): bias for token, bias in given["logit_bias"].items()}
    params = importlib.import_module(SAMPLING).SamplingParams(max_new_tokens=tokens, ignore_eos=True, **given)
    params.normalize(None)
    return importlib.import_module(REQUESTS).TokenizedGenerateReqInput(
        rid=name,
        input_text=None,
        input_ids=array("q", prompt),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=params,
        return_logprob=logprobs is not None,
        logprob_start_len=0 if of_prompt is not None else -1,
        top_logprobs_num=logprobs or 0,
        token_ids_logprob=None,
        stream=False,
    )


def serve(scheduler: Any, first: Sequence[Any], later: Sequence[Any] = ()) -> None:
    """Let the scheduler's own loop answer requests: `first` at once, and `later` a few steps after them.

    Raises:
        AotCacheError: they have no end.
    """
    steps = 0

    def recv_requests(_: Any, local_reqs: Any = None) -> list[Any]:
        nonlocal steps
        steps += 1
        if steps == 1:
            return list(first)
        if steps == _LATER and later:
            return list(later)
        if steps > _MOST_STEPS:
            raise AotCacheError(f"the requests have no end within {_MOST_STEPS} steps")
        if steps > _LATER and scheduler.is_fully_idle():
            scheduler.gracefully_exit = True
        return []

    importlib.import_module(RECEIVER).SchedulerRequestReceiver.recv_requests = recv_requests
    scheduler.gracefully_exit = False
    scheduler.run_event_loop()


def forget(scheduler: Any) -> None:
    """Drop all requests, after a step that failed."""
    scheduler.init_running_status()
    scheduler.chunked_req = None
    scheduler.flush_cache(empty_cache=False)
