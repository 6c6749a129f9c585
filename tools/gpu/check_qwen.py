#!/usr/bin/env python3
"""Check on a real GPU that Qwen3.5 with MTP only hits from load on, and measure its start; print one JSON record.

    python tools/gpu/check_qwen.py [--out RECORD.json] [--only build,serve,…] [--layers N]
    python tools/gpu/check_qwen.py --tp 2 …      what `qwen_ranks.py` does, on two GPUs

`build` makes the bundle with the GPU and its driver library hidden. Each other part is a fresh process. `serve` loads it,
captures every size of target and draft and serves 200 requests, once with the model's own drafts and once with an oracle's;
`budget` starts the same way, and says where the milliseconds go;
`judge` asks transformers, in float32 and in bfloat16, about every token, and holds the hidden states against float32's.
`cold`, `mega` and `eager` are what a start takes without us: no cache; torch's mega-cache, a warm Triton folder and
TRITON_CACHE_AUTOTUNING=1; and nothing compiled at all. `tune` tunes the bundle, `tuned` measures its steps. Exit code 0 when
every claim holds.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import qwen_parts
import qwen_ranks
from harness import NO_COMPILER, build, commit, finish, run_part, tune, versions
from qwen_claims import PARTS, claims, compared

Json = Any


def run(name: str, options: argparse.Namespace, folder: Path, bundle: str) -> Json:
    """Run one part on one GPU with empty caches, except for the Triton folder that some parts share."""
    variables = {"TRITON_CACHE_AUTOTUNING": "1"} | (NO_COMPILER if name in ("serve", "budget", "tuned") else {})
    if name == "cold":  # `judge` and `eager` may have run before
        shutil.rmtree(folder / "triton", ignore_errors=True)
    if name in ("cold", "mega", "eager", "judge"):
        variables["TRITON_CACHE_DIR"] = str(folder / "triton")
    return run_part(qwen_parts.__file__, name, qwen_parts.told(options, folder, bundle), 560, **variables)


def tuned(bundle: str, out: str) -> Json:
    began = time.perf_counter()
    said = tune(bundle, out)
    facts = {k: v for k, v in said.items() if isinstance(v, (int, float, str)) or k == "error"}
    return {**facts, "seconds": round(time.perf_counter() - began, 1)}


def check(options: argparse.Namespace) -> Json:
    import torch

    folder = Path(options.folder)
    folder.mkdir(parents=True, exist_ok=True)
    record: Json = {
        "what": "Qwen3.5 with MTP: serving only hits",
        "commit": commit(),
        "model": {"size": options.size, "layers": options.layers or "all", "max_batch": options.max_batch},
        "machine": torch.cuda.get_device_name(0),
        "versions": versions(),
    }
    kept = folder / "record.json"
    if kept.exists():  # parts of an earlier run on the same machine
        record |= {k: v for k, v in json.loads(kept.read_text()).items() if k in PARTS}
    bundle, chosen = str(folder / "bundle.safetensors"), str(folder / "tuned.safetensors")
    for name in (options.only or ",".join(PARTS)).split(","):
        if name == "build":
            spec = qwen_parts.spec_of(options)
            record[name] = build(spec, options.target, folder / "store", "--out", bundle, cores=options.cores)
        elif name == "tune":
            record[name] = tuned(bundle, chosen)
        else:
            record[name] = run(name, options, folder, chosen if name == "tuned" else bundle)
        if name == "serve" and "tokens" in record[name]:
            (folder / "tokens.json").write_text(json.dumps(compared(record[name])))
        kept.write_text(json.dumps(record))
        print(f"{name}: {'failed' if 'error' in record[name] else 'done'}", file=sys.stderr, flush=True)
    record["claims"] = claims(record)
    return record


def main() -> int:
    options = qwen_parts.make_parser(__doc__ or "").parse_args()
    return finish(qwen_ranks.check(options) if options.tp > 1 else check(options), options.out)


if __name__ == "__main__":
    sys.exit(main())
