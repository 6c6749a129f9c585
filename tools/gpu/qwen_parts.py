"""The parts of `check_qwen.py`, each a process of its own or, with --tp, several; and how they are run.

`serve` has the bundle, captures every size and serves the requests; `budget` starts as it does and says where the time goes;
`judge` asks transformers; `eager`, `cold` and `mega` start without us; `tuned` measures steps; `weights` writes what ranks take
their parts of.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from budget import sampled
from harness import Independent, hand_over

from aot_cache.runtime.ledger import HARMFUL

Json = Any
REQUESTS, LONGEST, MOST_NEW = 200, 1300, 24
JUDGED = 10
"""The hidden states of every tenth request are kept and judged."""
STEADY = (1, 16, 256)
REPLAYS = 30


# --- what the parts share --------------------------------------------------------------------------------------------------


def requests(options: argparse.Namespace) -> list[tuple[list[int], int]]:
    """(prompt, number of tokens) of each request, the same in every part."""
    from aot_cache.models.qwen3_5.settings import SIZES

    chosen = random.Random(0)
    room = options.max_model_len - MOST_NEW - 4  # a last verification may go beyond the wanted tokens
    lengths = [n for n in (1, 2, 63, 64, 65, 512, 513, LONGEST) if n <= room]  # at and around the end of a chunk
    lengths += [chosen.randint(1, min(512, room)) for _ in range(options.requests - len(lengths))]
    vocab = SIZES[options.size]["vocab_size"]
    least, most = min(1000, vocab // 2), min(200_000, vocab)
    return [
        ([chosen.randrange(least, most) for _ in range(n)], chosen.randint(4, MOST_NEW))
        for n in lengths[: options.requests]
    ]


def make_engine(options: argparse.Namespace) -> Any:
    import torch

    from aot_cache.models.qwen3_5.engine import make_engine
    from aot_cache.models.qwen3_5.settings import settings

    torch.manual_seed(0)
    found = settings(
        size=options.size,
        spec="mtp",
        max_batch=options.max_batch,
        max_model_len=options.max_model_len,
        tp=options.tp,
    )
    rank = int(os.environ["RANK"]) if options.tp > 1 else 0
    return make_engine(found, options.device, options.weights, options.layers or None, rank)


def join(options: argparse.Namespace) -> None:
    """Join the process group, if there are several ranks."""
    if options.tp > 1:
        import torch.distributed as dist

        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")


def leave(options: argparse.Namespace) -> None:
    """End a rank after a barrier, with `os._exit`, because captured graphs hold the communicator."""
    if options.tp > 1:
        import torch.distributed as dist

        dist.barrier()
        os._exit(0)


def wait(options: argparse.Namespace) -> None:
    """Wait for the GPU, if there is one."""
    import torch

    if options.device == "cuda":
        torch.cuda.synchronize()


def serve_all(
    engine: Any, asked: list[tuple[list[int], int]], oracle: list[list[int]] | None = None
) -> tuple[list[list[int]], dict[str, int], Json]:
    """Serve all requests, as slots become free. Returns the tokens of each; number of accepted drafts → number of steps; and
    for some requests the hidden state before each token.

    With an oracle the drafts are made from the tokens that it has: depending on the step some are right, the rest wrong.
    """
    todo = list(enumerate(asked))[::-1]
    wanted = [count for _, count in asked]
    out: list[list[int]] = [[] for _ in wanted]
    running: dict[int, int] = {}
    held: dict[str, int] = {}
    hidden: Json = {number: [] for number in range(0, len(wanted), JUDGED)}
    steps = 0
    while todo or running:
        while todo and len(running) < min(64, engine.max_batch):
            number, (prompt, _) = todo.pop()
            slot = next(n for n in range(engine.max_batch) if n not in running)
            out[number].append(engine.start(slot, prompt))
            running[slot] = number
            if number in hidden:
                hidden[number].append(engine.hidden[slot, :1].clone())
        drafts = {s: guesses(oracle[r], len(out[r]), engine, steps) for s, r in running.items()} if oracle else None
        slots = sorted(running)
        for slot, new in zip(slots, engine.step(slots, drafts)):
            held[str(len(new) - 1)] = held.get(str(len(new) - 1), 0) + 1
            out[running[slot]] += new
            if running[slot] in hidden:
                hidden[running[slot]].append(engine.hidden[slot, : len(new)].clone())
            if len(out[running[slot]]) >= wanted[running[slot]]:
                engine.stop(slot)
                del running[slot]
        steps += 1
    return [tokens[:count] for tokens, count in zip(out, wanted)], held, hidden


def guesses(right: list[int], at: int, engine: Any, step: int) -> list[int]:
    """The next drafts: `step % (speculative + 1)` right ones, then wrong ones."""
    coming = (right[at:] + [0] * engine.speculative)[: engine.speculative]
    hold = step % (engine.speculative + 1)
    return [token if n < hold else (token + 1) % engine.vocab for n, token in enumerate(coming)]


def steady(engine: Any) -> dict[str, float]:
    """Batch size → milliseconds of a step (draft and verification) as replays."""
    import torch

    out = {}
    for size in (size for size in STEADY if size in engine.sizes):
        graphs = [engine.graphs[name, size][0] for name in engine.steps]
        spans = []
        for _ in range(7):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(REPLAYS):
                for graph in graphs:
                    graph.replay()
            end.record()
            torch.cuda.synchronize()
            spans.append(start.elapsed_time(end) / REPLAYS)
        out[str(size)] = round(statistics.median(spans), 4)
    return out


def started(options: argparse.Namespace, before: Any = None) -> tuple[Any, Json]:
    """The engine with all graphs captured, and the seconds that this took once the weights were ready."""
    import torch

    engine = make_engine(options)
    wait(options)
    began = time.perf_counter()
    if before is not None:
        before()
    prepared = time.perf_counter()
    with torch.no_grad():
        reports = engine.capture()
    wait(options)
    done = time.perf_counter()
    lost = [one for report in reports.values() for one in report if one["action"] != "captured"]
    took = {"start_seconds": round(done - began, 3), "ready_seconds": round(prepared - began, 3)}
    return engine, {**took, "captured": sum(map(len, reports.values())) - len(lost), "lost": lost}


# --- the parts -------------------------------------------------------------------------------------------------------------


def part_serve(options: argparse.Namespace) -> Json:
    began = time.perf_counter()
    import torch
    from safetensors.torch import save_file

    import aot_cache

    join(options)
    aot_cache.load(options.bundle, strict=True, together=options.tp > 1)
    import aot_cache.models.qwen3_5.engine

    independent = Independent()
    first = torch.zeros(1, device=options.device)
    if options.tp > 1:
        torch.distributed.all_reduce(first)  # creates the communicator, which no capture allows
    if options.device == "cuda":
        independent.watch_driver()
    imported = time.perf_counter() - began

    def ready() -> None:
        independent.counts.clear()
        aot_cache.ready(strict=True)
        loading.update(independent.counts)
        before_seal.update(aot_cache.stats()["total"])
        independent.counts.clear()
        aot_cache.seal()

    loading: Json = {}
    before_seal: Json = {}
    engine, answer = started(options, ready)
    asked = requests(options)
    own, held, hidden = serve_all(engine, asked)
    oracle, held_oracle, _ = serve_all(engine, asked, own)
    stats = aot_cache.stats()
    if options.tp == 1 or torch.distributed.get_rank() == 0:
        save_file({str(n): torch.cat(rows)[: len(own[n])].contiguous() for n, rows in hidden.items()}, options.hidden)
    return {
        **answer,
        "import_seconds": round(imported, 2),
        "while_loading": loading,
        "ledger_while_loading": {k: n for k, n in before_seal.items() if n and k in HARMFUL},
        "tokens": {"own drafts": own, "oracle": oracle},
        "held": {"own drafts": held, "oracle": held_oracle},
        "independent_after_ready": dict(independent.counts),
        "ledger_after_ready": {k: v for k, v in stats["after_seal"].items() if v},
        "events_after_ready": dict(Counter(f"{e['kind']} {e['name']}" for e in stats["events"] if e["sealed"])),
        "misses": stats["misses"][:20],
        "steady": steady(engine) if options.device == "cuda" else {},
        "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }


def part_budget(options: argparse.Namespace) -> Json:
    """Start as `serve` does: milliseconds of each part of importing, loading, `ready()` and capturing."""
    rows: dict[str, list[Json]] = {"import": [], "load": [], "import of the model": [], "ready": [], "capture": []}
    with sampled(rows["import"]):
        import torch

        import aot_cache
    with sampled(rows["load"]):
        aot_cache.load(options.bundle, strict=True)
    with sampled(rows["import of the model"]):  # after: fla asks Triton's driver, which needs a C module of the bundle
        import aot_cache.models.qwen3_5.engine
    engine = make_engine(options)
    wait(options)
    with sampled(rows["ready"]):
        aot_cache.ready(strict=True)
    with sampled(rows["capture"]), torch.no_grad():
        engine.capture()
        wait(options)
    return rows


def part_weights(options: argparse.Namespace) -> Json:
    """Write random weights of the whole model, from which each rank loads its part."""
    from safetensors.torch import save_file

    from aot_cache.models.qwen3_5 import weights

    folder, options.weights = Path(options.weights), ""
    folder.mkdir(exist_ok=True)
    named = weights.names(make_engine(options).model.net)
    save_file(dict(named), folder / "model.safetensors")
    return {"weights": len(named)}


def part_tuned(options: argparse.Namespace) -> Json:
    import aot_cache

    aot_cache.load(options.bundle, strict=True)
    engine, answer = started(options, lambda: aot_cache.ready(strict=True) and None)
    return {**answer, "steady": steady(engine)}


def part_cold(options: argparse.Namespace) -> Json:
    import torch

    independent = Independent()
    engine, answer = started(options)
    Path(options.mega).write_bytes(torch.compiler.save_cache_artifacts()[0])
    return {**answer, "events": dict(independent.counts), "steady": steady(engine)}


def part_mega(options: argparse.Namespace) -> Json:
    import torch

    independent = Independent()
    saved = Path(options.mega).read_bytes()
    engine, answer = started(options, lambda: torch.compiler.load_cache_artifacts(saved) and None)
    return {**answer, "events": dict(independent.counts), "steady": steady(engine)}


def part_eager(options: argparse.Namespace) -> Json:
    import torch

    torch.compiler.set_stance("force_eager")
    return started(options)[1]


def part_judge(options: argparse.Namespace) -> Json:
    import torch
    from qwen_judge import judge
    from safetensors.torch import load_file

    torch.compiler.set_stance("force_eager")
    served = json.loads(Path(options.tokens).read_text())
    return judge(make_engine(options), requests(options), served, load_file(options.hidden))


# --- how they are run ------------------------------------------------------------------------------------------------------


def make_parser(about: str) -> argparse.ArgumentParser:
    """The options of the check and of its parts."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen3.5")
    parser.add_argument("--spec", default="mtp", choices=["mtp"])
    parser.add_argument("--size", default="0.8b")
    parser.add_argument("--layers", type=int, default=0, help="so many decoder layers instead of all")
    parser.add_argument("--max-batch", type=int, default=256)
    parser.add_argument("--max-model-len", type=int, default=4096)
    parser.add_argument("--tp", type=int, default=1, help="split over so many GPUs: see `qwen_ranks.py`")
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--device", default="cuda", help="cpu, with --tp: to try the check itself with --size tiny")
    parser.add_argument("--only")
    parser.add_argument(
        "--folder", default="artifacts/qwen", help="bundles, caches and parts of a record are kept there"
    )
    parser.add_argument("--target", default="h200")
    parser.add_argument("--cores", default="0,1", help="that the build may use")
    parser.add_argument("--bundle", help=argparse.SUPPRESS)
    for between in ("--mega", "--hidden", "--tokens", "--weights"):
        parser.add_argument(between, default="", help=argparse.SUPPRESS)
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    return parser


def told(options: argparse.Namespace, folder: Path, bundle: str) -> list[str]:
    """The arguments of a part; `folder` has the files of earlier parts."""
    command = ["--bundle", bundle, "--mega", str(folder / "mega"), "--hidden", str(folder / "hidden.safetensors")]
    command += ["--tokens", str(folder / "tokens.json"), "--size", options.size, "--layers", str(options.layers)]
    command += ["--max-batch", str(options.max_batch), "--max-model-len", str(options.max_model_len)]
    return [*command, "--requests", str(options.requests), "--device", options.device, "--weights", options.weights]


def spec_of(options: argparse.Namespace) -> str:
    """The recipe to build."""
    spec = f"aot_cache.models.qwen3_5.recipe:recipe?size={options.size}&spec=mtp"
    return f"{spec}&max_batch={options.max_batch}&max_model_len={options.max_model_len}"


def main() -> int:
    options = make_parser(__doc__ or "").parse_args()
    hand_over(globals()[f"part_{options.part}"](options))
    leave(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
