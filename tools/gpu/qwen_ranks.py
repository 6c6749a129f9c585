"""Check that Qwen3.5 with MTP, split over several GPUs, only hits after load. Run by `check_qwen.py --tp N`.

    python tools/gpu/check_qwen.py --tp 2 [--layers 4] [--only build,weights,…] [--out RECORD.json]

`build` makes one bundle for all ranks, with the GPUs hidden. `weights` writes random weights of the whole model. `serve` is one
process for each rank, with its own GPU: it loads its part of the weights, captures every size with the all-reduces in the
graphs, and serves the same requests as on one GPU. `judge` compares the tokens with transformers' whole model on one GPU.
To try the check itself: `--device cpu --target cpu --size tiny --max-batch 4 --max-model-len 64 --requests 40`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jobs
import qwen_claims
import qwen_parts
from harness import NO_COMPILER, build, commit, empty_caches, last_words, run_part, versions

Json = Any
PARTS = ("build", "weights", "serve", "judge")
VARIABLES = {"TRITON_CACHE_AUTOTUNING": "1"}
SECONDS = 420.0
"""Time limit of the ranks, in seconds."""
ROUNDINGS = 2**0.5
"""Factor by which a split model may be farther from float32 than a whole one: the output of a layer is rounded on each rank, and
again when it is summed, which gives at most twice the variance of one rounding."""


def serve(options: argparse.Namespace, folder: Path, bundle: str) -> Json:
    """Run all ranks; returns the answer of each, and whether all have the same tokens."""
    with tempfile.TemporaryDirectory() as empty:
        places = [Path(empty, str(rank)) for rank in range(options.tp)]
        told = []
        for rank, environment in enumerate(jobs.environments(options.tp)):
            places[rank].mkdir()
            own = {**empty_caches(places[rank]), "ANSWER": str(places[rank] / "answer.json"), **jobs.own_gpu(rank)}
            # No NVLink multicast: it is a resource of the host, which a failed job may leave in a bad state.
            own |= {**VARIABLES, **NO_COMPILER, "NCCL_NVLS_ENABLE": "0"}
            told.append({**environment, **own})
        command = [sys.executable, "-W", "ignore", qwen_parts.__file__, "--part", "serve"]
        command += [*qwen_parts.told(options, folder, bundle), "--tp", str(options.tp)]
        done = jobs.run(command, told, SECONDS)
        if any(code for code, _ in done):
            return {"error": {str(rank): [code, *last_words(said)] for rank, (code, said) in enumerate(done)}}
        answers = [json.loads((place / "answer.json").read_text()) for place in places]
    alike = all(one["tokens"] == answers[0]["tokens"] for one in answers)
    tokens = [qwen_claims.compared(one) for one in answers]
    (folder / "tokens.json").write_text(json.dumps(tokens[0]))
    return {"ranks": answers, "alike": alike}


def claims(record: Json) -> Json:
    """Claim → whether the record shows it: the claims of one GPU for each rank, and that all ranks agree."""
    parts = [name for name in PARTS if name in record]
    if any("error" in record[name] for name in parts):
        return {"every part ran": False}
    made: Json = {"every part ran": True}
    if "build" in record:
        made["one bundle for all ranks, with nothing of a rank's own"] = record["ranks of the bundle"] == [None]
    if "serve" in record:
        each = [qwen_claims.claims({"serve": one}) for one in record["serve"]["ranks"]]
        made |= {f"{name}, on each rank": all(one[name] for one in each) for name in each[0]}
        made["nothing missed, on each rank"] = not any(one["misses"] for one in record["serve"]["ranks"])
        made["all ranks have the same tokens"] = record["serve"]["alike"]
    if "judge" in record:
        made |= qwen_claims.claims({"judge": record["judge"]}, more=ROUNDINGS)
    return made


def ranks_in(bundle: str) -> list[int | None]:
    """The ranks that the graphs of a bundle are for; None stands for all ranks."""
    from aot_cache.artifact.manifest import served
    from aot_cache.store import read_bundle

    return sorted({graph.rank for graph in served(read_bundle(bundle)).graphs}, key=str)


def check(options: argparse.Namespace) -> Json:
    import torch

    folder = Path(options.folder) / f"tp{options.tp}"
    folder.mkdir(parents=True, exist_ok=True)
    options.weights = str(folder / "weights")
    gpu = options.device == "cuda"
    record: Json = {
        "what": "Qwen3.5 with MTP, split over GPUs: serving only hits",
        "commit": commit(),
        "model": {"size": options.size, "layers": options.layers or "all", "max_batch": options.max_batch},
        "tp": options.tp,
        "machine": torch.cuda.get_device_name(0) if gpu else options.device,
        "versions": versions(),
    }
    if gpu:
        record["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    kept = folder / "record.json"
    if kept.exists():  # parts of an earlier run on the same machine
        record |= {k: v for k, v in json.loads(kept.read_text()).items() if k in (*PARTS, "ranks of the bundle")}
    bundle = str(folder / "bundle.safetensors")
    for name in (options.only or ",".join(PARTS)).split(","):
        if name == "build":
            spec = f"{qwen_parts.spec_of(options)}&tp={options.tp}"
            record[name] = build(spec, options.target, folder / "store", "--out", bundle, cores=options.cores)
            if "error" not in record[name]:
                record["ranks of the bundle"] = ranks_in(bundle)
        elif name == "serve":
            record[name] = serve(options, folder, bundle)
        else:
            told = qwen_parts.told(options, folder, bundle)
            record[name] = run_part(qwen_parts.__file__, name, told, 560, **VARIABLES)
        kept.write_text(json.dumps(record))
        print(f"{name}: {'failed' if 'error' in record[name] else 'done'}", file=sys.stderr, flush=True)
    record["claims"] = claims(record)
    return record
