"""The requests that an engine is sent on the virtual device, so that it reaches what a server reaches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aot_cache.builder.engine_worker import Run
from aot_cache.errors import at_line_of

_MANY = 1024
"""More requests at once are sent with one length of prompt only: the engine's own code takes milliseconds for each."""
_GIVEN_UP = 8
"""How many waves in a row may fail before the rest is not tried."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What bounds the requests that a server takes."""

    requests: int
    batched_tokens: int
    length: int
    vocabulary: int
    adapters: int = 0


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Requests that are sent at once; those in `later` a few steps after them; with `again`, the first once more at the end.

    Args:
        label: what it is for.
        lengths: tokens of each prompt.
        tokens: how many are generated.
        sampling: parameters of a request, by their names in an OpenAI-compatible API.
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
    "min-p": {**_SAMPLED, "min_p": 0.1},
    "a bias": {"temperature": 0.0, "logit_bias": {5: 1.0}},
}


def waves(limits: Limits, refused: Collection[str] = ()) -> list[Wave]:
    """Requests that reach what a server reaches, as far as it depends on sizes: each power of two and its neighbours, because
    kernels round sizes up to those, and both ends of the limits.

    Args:
        refused: parameters that the engine does not take.
    """
    tokens = min(12, limits.length - 1)
    longest = limits.length - tokens
    batches = _around_powers(limits.requests)
    alone = [n for n in _around_powers(min(longest, limits.batched_tokens + 1)) if n <= longest]
    out = [Wave(label=f"1 of {n}", lengths=[n], tokens=tokens) for n in alone]
    for length in (1, 5, 64):  # a prompt of one token is a decode step without drafts
        if length <= longest:
            some = [n for n in batches if n <= _MANY or length == 1]
            out += [Wave(label=f"{n} of {length}", lengths=[length] * n, tokens=tokens) for n in some]
    for over in (1, 2, 64):  # prompts that do not fit into one step: the last one is split
        lengths = _split(limits.batched_tokens + over, longest)
        if len(lengths) <= limits.requests:
            out.append(Wave(label=f"{over} over the tokens of a step", lengths=lengths, tokens=tokens))
    several = sorted({min(n, limits.requests) for n in (1, 3, 16)})
    short = min(64, longest)
    for name, wanted in SAMPLERS.items():
        if not wanted.keys().isdisjoint(refused):
            continue
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


def sent(
    wanted: Sequence[Wave],
    send: Callable[[Wave], None],
    drop: Callable[[], None],
    progress: Callable[[str, int, int], None],
    package: str,
) -> Run:
    """Send all waves, one after the other, whatever becomes of each.

    Args:
        send: sends one, and returns when it is answered.
        drop: called after a wave that failed: forget its requests.
        package: the engine's, whose lines are named in errors.
    """
    lost: list[str] = []
    answered, failed = 0, 0
    for done, wave in enumerate(wanted):
        progress("requests", done, len(wanted))
        try:
            send(wave)
            answered, failed = answered + 1, 0
        except Exception as error:
            lost.append(f"requests {wave.label}: {at_line_of(package, error)}")
            failed += 1
            drop()
        if failed == _GIVEN_UP:
            lost.append(f"the {len(wanted) - done - 1} kinds of requests after these were not tried")
            break
    progress("requests", len(wanted), len(wanted))
    return Run(requests=[wave.label for wave in wanted], answered=answered, unreached=lost)
