"""Capture CUDA graphs for all shapes, with every rank of a job doing the same.

Before a shape runs, each rank reports whether it has a batch and whether everything is installed. Then all ranks capture, all
skip, or, if they differ, all raise or all drop the shape. If one rank missed during a capture, all discard that graph.
`capture` is this loop. Engines with their own loop call `before_capture` and `after_capture`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from aot_cache.errors import DeclarationError, RankDisagreement
from aot_cache.runtime import loader, rank_agreement
from aot_cache.runtime.coverage import will_hit
from aot_cache.store import Json
from aot_cache.upstream.hooks import torch_capture

MIXED = ("error", "drop")


@dataclass(frozen=True)
class Decision:
    """What all ranks do with a shape. True if they capture it.

    Args:
        action: `capture`, `skip` (no rank has a batch), or `drop` (some rank cannot capture it: it is served without a graph).
        why: for `skip` and `drop`, the reason; for `drop`, that of each rank.
    """

    action: str
    why: str = ""

    def __bool__(self) -> bool:
        return self.action == "capture"


def before_capture(
    key: str,
    batch_ok: bool,
    *,
    hits: bool = True,
    why: str = "",
    mixed: str = "error",
    group: object = None,
    timeout: float = rank_agreement.TIMEOUT,
) -> Decision:
    """Decide together with the other ranks what to do with a shape. Call it before the warm-up and the capture.

    Args:
        key: a name for the shape. All ranks use the same keys, in the same order.
        batch_ok: whether this rank has a batch for the shape.
        hits: whether everything the shape needs is installed on this rank (`will_hit`).
        why: the reason shown for this rank if `batch_ok` or `hits` is false.
        mixed: what to do if ranks differ: `error` raises on all ranks, `drop` drops the shape on all ranks.
        group: the process group whose ranks decide; None is the whole job.
        timeout: seconds to wait for the other ranks.

    Raises:
        RankDisagreement: the ranks differ and `mixed` is `error`, or a rank does not answer within `timeout` seconds.
        DeclarationError: `mixed` has another value.
    """
    _require_known(mixed)  # before the others wait for this rank
    mine = {"batch": bool(batch_ok), "hits": bool(hits), "why": why}
    said = rank_agreement.of(group).gather(mine, f"capture of {key}", timeout)
    _remember(key)
    return decide(key, said, mixed=mixed)


def decide(key: str, said: Mapping[int, Mapping[str, Json]], *, mixed: str = "error") -> Decision:
    """What ranks do with a shape when each of them has said whether it can.

    Args:
        key, mixed: as for `before_capture`.
        said: rank → whether it has a batch (`batch`), whether all is installed (`hits`), and the reason if not (`why`).

    Raises:
        RankDisagreement: the ranks differ and `mixed` is `error`.
        DeclarationError: `mixed` has another value.
    """
    _require_known(mixed)
    if not any(one["batch"] for one in said.values()):
        return Decision("skip", "no rank has a batch")
    no = {rank: _reason(one) for rank, one in said.items() if not (one["batch"] and one["hits"])}
    if not no:
        return Decision("capture")
    text = rank_agreement.say(no)
    alike = len(no) == len(said) and len({(one["batch"], one["hits"]) for one in said.values()}) == 1
    if mixed == "error" and not alike:
        others = "see why on these ranks: the others could capture it" if len(no) < len(said) else ""
        raise RankDisagreement(f"every rank to capture {key}, or none", text, others)
    return Decision("drop", text)


def _require_known(mixed: str) -> None:
    if mixed not in MIXED:
        raise DeclarationError(f"mixed to be one of {', '.join(MIXED)}", repr(mixed))


def after_capture(key: str, *, group: object = None, timeout: float = rank_agreement.TIMEOUT) -> Decision:
    """Decide together with the other ranks whether to keep the graph just captured. Call it after the capture has ended.

    Returns:
        `capture` if no rank missed during the capture, else `drop`: every rank must discard its graph.

    Raises:
        RankDisagreement: a rank does not answer within `timeout` seconds.
        DeclarationError: `before_capture` was not called for this key.
    """
    if key not in _before:
        raise DeclarationError(
            f"after_capture({key!r}) was called without before_capture({key!r})", hint="call before_capture first"
        )
    mine = _misses_since(key)
    said = rank_agreement.of(group).gather(mine, f"captured {key}", timeout)
    missed = {rank: "; ".join(one) for rank, one in said.items() if one}
    return Decision("drop", rank_agreement.say(missed)) if missed else Decision("capture")


_before: dict[str, int] = {}


def _remember(key: str) -> None:
    _before[key] = loader.MISSES.count_in_capture()


def _misses_since(key: str) -> list[str]:
    """The misses inside captures since `before_capture` was called for this key."""
    new = loader.MISSES.count_in_capture() - _before.pop(key)
    found = [m for m in loader.MISSES.to_json() if m["in_capture"]][-new:] if new > 0 else []
    return [f"{miss['name']} ({miss['action']})" for miss in found] or ["misses"] * (new > 0)


def _reason(one: Mapping[str, Json]) -> str:
    what = "batch is None" if not one["batch"] else "not everything that it needs is installed"
    return f"{what} ({one['why']})" if one["why"] else what


# --- the loop -------------------------------------------------------------------------------------------------------------


@dataclass
class Captured:
    """What `capture` made.

    Args:
        graphs: shape → its graph, or None on a machine without CUDA.
        outputs: shape → what `run` returned during the capture. Replays write into it.
        batches: shape → the batch. Replays read its tensors.
        report: one entry for each shape: `shape`, `action` (captured, skipped or dropped) and `why`.
    """

    graphs: dict[Any, Any] = field(default_factory=dict)
    outputs: dict[object, object] = field(default_factory=dict)
    batches: dict[object, object] = field(default_factory=dict)
    report: list[dict[str, Json]] = field(default_factory=list)

    def note(self, shape: object, action: str, why: str) -> None:
        """Add an entry to the report."""
        self.report.append({"shape": shape, "action": action, "why": why})


def capture(
    shapes: Iterable[object],
    make_batch: Callable[[Any], Any],
    run: Callable[[Any], Any],
    *,
    group: object = None,
    pool: object = None,
    stream: object = None,
    mixed: str = "error",
    covers: Callable[[Any], tuple[str, Mapping[str, int]]] | None = None,
    timeout: float = rank_agreement.TIMEOUT,
    progress: Callable[[str, int, int], None] | None = None,
) -> Captured:
    """Capture a CUDA graph for each shape, on all ranks or on none. All shapes are warmed up first, then captured.

    Args:
        shapes: integers, or tuples of them. The largest is captured first, so that the others reuse its memory in the pool.
        make_batch: takes a shape; returns the argument for `run`, or None if this rank has no room for that shape.
        run: the model's step.
        group: the process group whose ranks capture together; None is the whole job.
        pool: memory pool, as for `torch.cuda.graph`. By default all shapes share a new one.
        stream: as for `torch.cuda.graph`. By default all shapes share a new one. Warm-ups run on it, too, so that libraries
            create their per-stream state before the capture.
        mixed: what to do if ranks differ, see `before_capture`.
        covers: takes a shape; returns the (case, point) that must be installed for it (see `will_hit`).
        timeout: seconds that a rank waits for the others.
        progress: called on the first rank with (what was done, how many are done, how many there are). By default it prints
            a line if stderr is a terminal.

    Raises:
        RankDisagreement: see `before_capture`.
        Exception: whatever `make_batch` or `run` raises; the other ranks then raise, too.
    """
    members, found = rank_agreement.of(group), Captured()
    todo = sorted(shapes, key=lambda shape: shape if isinstance(shape, tuple) else (shape,), reverse=True)
    say = (progress or _on_terminal) if members.leads else _silent
    agreeing: dict[str, Any] = {"group": group, "timeout": timeout}
    maker = _Maker(pool, stream)
    with members.together():
        for done, shape in enumerate(todo, 1):
            batch = make_batch(shape)
            hit = will_hit(*covers(shape)) if covers is not None and batch is not None else None
            why = "; ".join(hit.why[:3]) if hit is not None else ""
            hits = hit is None or hit.hit
            decision = before_capture(str(shape), batch is not None, hits=hits, why=why, mixed=mixed, **agreeing)
            if decision:
                maker.warm_up(run, batch)
                found.batches[shape] = batch
            else:
                found.note(shape, "skipped" if decision.action == "skip" else "dropped", decision.why)
            say("warmed up", done, len(todo))
        loader.GUARD.capture_is_over()
        for done, shape in enumerate(list(found.batches), 1):
            _remember(str(shape))
            graph, out = maker.make(run, found.batches[shape])
            kept = after_capture(str(shape), **agreeing)
            if kept:
                found.graphs[shape], found.outputs[shape] = graph, out
            else:
                del found.batches[shape]
            found.note(shape, "captured" if kept else "dropped", kept.why)
            say("captured", done, len(todo))
    return found


def _on_terminal(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what} {done}/{total} shapes", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _silent(*_: object) -> None: ...


class _Maker:
    """Captures graphs into one pool, on one stream. Without CUDA it only runs the batches."""

    def __init__(self, pool: Any, stream: Any) -> None:
        self._pool, self._stream = pool, stream
        if torch_capture.cuda_is_up():
            import torch

            self._pool = torch.cuda.graph_pool_handle() if pool is None else pool
            cuda: Any = torch.cuda
            self._stream = cuda.Stream() if stream is None else stream

    def warm_up(self, run: Callable[[object], object], batch: object) -> None:
        """Run once, on the stream that will be captured."""
        if self._stream is None:
            run(batch)
            return
        import torch

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run(batch)
        torch.cuda.current_stream().wait_stream(self._stream)

    def make(self, run: Callable[[object], object], batch: object) -> tuple[object, object]:
        """Capture; returns (graph, what `run` returned). The graph is None without CUDA."""
        if self._stream is None:
            return None, run(batch)
        import torch

        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = run(batch)
        return graph, out
