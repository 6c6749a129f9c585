"""TensorRT-LLM: all ranks capture a shape, or none does. `import aot_cache.auto` calls `register`.

TensorRT-LLM has no place for plug-ins, so its warm-up is hooked when it is imported. Before each shape the ranks say whether they
have room for it: through the store of their job if torch.distributed connects all of them, else through the engine's own
communicator. If they differ, `RankDisagreement` is raised on every rank, with ranks and reasons; with AOT_CACHE_MIXED=drop they
all leave the shape out, and it is served without a graph. Without this, ranks that have room wait for ever in the first
collective for those that have none.

What a bundle has is loaded before the warm-up. The ledger is not sealed: a draft model is warmed up after the target, and the
first executor, which only measures memory, before both. Call `aot_cache.seal()` when the server is ready.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from aot_cache.runtime.engine_start import Start, asked_for
from aot_cache.upstream.after_import import after_import

if TYPE_CHECKING:  # nothing else is imported before the package is: `auto` may be imported by every Python of an image
    from aot_cache.upstream.hooks import tensorrt_llm_warmup as engine

TIMEOUT = 600.0
"""Seconds that a rank waits for the others: as torch.distributed's default, because one may compile for minutes meanwhile."""
_LOG = logging.getLogger("TRT-LLM.aot_cache")  # below the engine's logger, so that its log settings apply
_start = Start(_LOG)
_registered = False
_hooked: set[str] = set()


def register() -> None:
    """Hook TensorRT-LLM's warm-up once it is imported. May be called more than once."""
    global _registered
    if _registered:
        return
    _registered = True
    after_import("tensorrt_llm", lambda: _start.or_warn(_wait))


def _wait() -> None:
    from aot_cache.upstream.hooks import tensorrt_llm_warmup

    for layout in reversed(tensorrt_llm_warmup.LAYOUTS):  # the newest first, whose module the oldest's imports
        after_import(layout.module, lambda layout=layout: _start.or_warn(lambda: _hook(layout)))  # type: ignore[misc]


def _hook(layout: engine.Layout) -> None:
    from aot_cache.upstream.hooks import tensorrt_llm_warmup

    if tensorrt_llm_warmup.hook(layout, _batch, _warmup):
        _hooked.add(layout.module)
    elif layout is tensorrt_llm_warmup.LAYOUTS[0] and not _hooked:
        raise AttributeError("this TensorRT-LLM has its warm-up elsewhere: its ranks do not agree on what they capture")


def _warmup(run: Callable[[], None]) -> None:
    if not asked_for():
        run()
        return
    from aot_cache.runtime import loader

    loader.SESSION.primes_libraries = False  # each shape runs before it is captured
    _start.timed(loader.ready)
    run()
    _start.or_warn(_start.say)


def _batch(wanted: engine.Wanted) -> Any:
    """This rank's batch for a shape; None if all ranks leave it out.

    Raises:
        RankDisagreement: some ranks have no room, and they are not to leave it out; or making a batch raised on another rank.
        Exception: what making the batch raised on this rank.
    """
    from aot_cache.errors import one_line

    if wanted.peers is None:
        return wanted.make()
    batch, failure = None, None
    try:
        batch = wanted.make()
    except Exception as error:  # the others are told, and then it goes on
        failure = error
    mine = {"batch": batch is not None, "hits": True, "why": "" if batch is not None else _why(wanted)}
    mine |= {"failed": one_line(failure) if failure is not None else "", "mixed": _mixed()}
    kept = False
    try:
        said = _gather(wanted, wanted.peers, mine)
        if failure is not None:
            raise failure
        kept = _all_have_it(wanted, said)
    finally:
        if batch is not None and not kept:
            wanted.release(batch)
    return batch if kept else None


def _all_have_it(wanted: engine.Wanted, said: Mapping[int, Any]) -> bool:
    from aot_cache.errors import RankDisagreement
    from aot_cache.runtime import capture_loop, rank_agreement

    failed = {rank: one["failed"] for rank, one in said.items() if one["failed"]}
    if failed:
        raise RankDisagreement(f"every rank to make a batch for {wanted.shape}", rank_agreement.say(failed))
    if len({one["mixed"] for one in said.values()}) > 1:
        values = rank_agreement.say({rank: one["mixed"] for rank, one in said.items()})
        raise RankDisagreement("the same AOT_CACHE_MIXED on every rank", values)
    decision = capture_loop.decide(wanted.shape, said, mixed=_mixed())
    if not decision and decision.action == "drop":
        _LOG.warning("aot-cache: all ranks leave out the graph of %s: %s", wanted.shape, decision.why)
    return bool(decision)


def _gather(wanted: engine.Wanted, peers: engine.Peers, mine: Mapping[str, Any]) -> dict[int, Any]:
    """Rank → what it says of the shape."""
    from aot_cache.errors import RankDisagreement
    from aot_cache.runtime import rank_agreement
    from aot_cache.upstream.codec import torch_ranks

    if torch_ranks.up() and len(torch_ranks.ranks_of(None)) == peers.size:
        return rank_agreement.of().gather(dict(mine), f"capture of {wanted.shape}", TIMEOUT)
    texts = peers.allgather({"what": wanted.shape, **mine})
    elsewhere = {rank: one["what"] for rank, one in enumerate(texts) if one["what"] != wanted.shape}
    if elsewhere:
        raise RankDisagreement(f"every rank to capture {wanted.shape}", rank_agreement.say(elsewhere))
    return dict(enumerate(texts))


def _why(wanted: engine.Wanted) -> str:
    blocks = wanted.free_blocks()
    return "" if blocks is None else f"{blocks} free blocks in its KV cache"


def _mixed() -> str:
    """What to do if ranks differ. A value that is none raises, on every rank, before a forward."""
    return os.environ.get("AOT_CACHE_MIXED") or "error"
