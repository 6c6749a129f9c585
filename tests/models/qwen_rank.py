"""One rank of the job in test_qwen3_5_weights.py: reads its part of the weights, serves, and prints the tokens as JSON."""

from __future__ import annotations

import json
import os
import sys

import qwen
import torch
import torch.distributed as dist

from aot_cache.models.qwen3_5.engine import make_engine


def main(folders: str, asked: str) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    requests = {int(slot): (prompt, count) for slot, (prompt, count) in json.loads(asked).items()}
    out = {}
    with torch.compiler.set_stance("force_eager"):
        for size, folder in json.loads(folders).items():
            said = []
            for drafts in (0, 2) if size == "tiny" else (2,):
                settings = qwen.tiny(drafts, size, tp=dist.get_world_size(), prefill_chunk=32)
                made = make_engine(settings, "cpu", folder, rank=rank)
                said.append(qwen.serve(made, requests))
            layer = made.model.net.layers[3]
            out[size] = {"said": said, "rows": layer.self_attn.q_proj.weight.shape[0]}
    print(json.dumps(out))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
