"""In an environment with a real vLLM: what the plug-in does to a process that imports vLLM's GPU worker. Prints one JSON line.

vLLM's compiled extensions are replaced by empty modules where they cannot be loaded: no GPU is needed, nothing is served.
Called by `tools/check_vllm --env VERSION=PYTHON` with AOT_CACHE set.
"""

from __future__ import annotations

import importlib
import inspect
import json
import sys
import time
from importlib.metadata import version

SEQS, VOCABULARY = 16, 512
STEPS = ("load_model", "initialize_from_config", "compile_or_warm_up_model")


def main() -> None:
    importlib.import_module("vllm_without_extensions")  # first of all
    plugins = importlib.import_module("vllm.plugins")
    started = time.perf_counter()
    plugin = importlib.import_module("aot_cache.engines.vllm.plugin")
    plugin.register()
    registered = time.perf_counter() - started
    plugins.load_general_plugins()  # finds the entry point; calling it again changes nothing
    idle = sorted(name for name in sys.modules if name.startswith("aot_cache.runtime."))
    worker = importlib.import_module("vllm.v1.worker.gpu_worker").Worker
    import aot_cache

    aot_cache.ready()
    served, ranked = _correct_counts(), _rank_tokens()
    stats = aot_cache.stats()
    prometheus = importlib.import_module("vllm.v1.metrics.prometheus")
    families = {family.name for family in prometheus.get_prometheus_registry().collect()}
    found = {
        "vllm": version("vllm"),
        "torch": version("torch"),
        "entry point": any(ours.name == "aot_cache" for ours in _entry_points()),
        "seconds of the plug-in in a process that does not serve": round(registered, 3),
        "seconds of load": round(plugin.seconds(), 3),
        "bundles": len(stats["bundles"]),
        "refused": stats["total"]["rejected_bundle"],
        "calls of update_num_computed_tokens_for_batch_change": served,
        "calls of batched_count_greater_than": ranked,
        "graphs found": stats["total"]["graph"],
        "steps hooked": [step for step in STEPS if hasattr(getattr(worker, step), "_aot_cache_patch")],
        "imported before the worker": idle,
        "on the page of metrics": sorted(name for name in families if name.startswith("aot_cache")),
    }
    print(json.dumps(found))


def _correct_counts() -> dict[str, object]:
    """Call vLLM's function as its model runner does (`_prepare_inputs`), and compare with the uncompiled one."""
    import torch
    from torch._dynamo.utils import counters

    name = "update_num_computed_tokens_for_batch_change"
    compiled = getattr(importlib.import_module("vllm.v1.spec_decode.utils"), name)
    calls = equal = 0
    for before, batch in ((1, 1), (3, 2), (2, 5), (SEQS, SEQS), (7, SEQS)):
        ours = [torch.randint(0, 9, (SEQS,), dtype=torch.int32) for _ in range(3)]
        theirs = [buffer.clone() for buffer in ours]
        positions = torch.randint(-1, before, (SEQS,))
        with torch.inference_mode():
            valid, computed = (torch.randint(0, 9, (size,)).to(torch.int32) for size in (before, batch))
            for function, (counts, accepted, drafts) in (
                (compiled, ours),
                (inspect.unwrap(compiled), theirs),
            ):
                function(counts, accepted[:batch], positions[:batch], valid, drafts, computed)
        calls += 1
        equal += all(map(torch.equal, ours, theirs))
    return {"calls": calls, "equal to eager": equal, "frames that Dynamo traced": counters["stats"]["unique_graphs"]}


def _rank_tokens() -> dict[str, object]:
    """Have vLLM's sampler rank tokens, more of them than any that was built, too."""
    import torch
    from torch._dynamo.utils import counters

    gather = importlib.import_module("vllm.v1.sample.sampler").Sampler.gather_logprobs
    calls = equal = 0
    before = counters["stats"]["unique_graphs"]
    for tokens in (1, 2, 3, 17, 300):
        with torch.inference_mode():
            logprobs = torch.randn(tokens, VOCABULARY).log_softmax(-1)
            sampled = torch.randint(0, VOCABULARY, (tokens,))
            ranks = gather(logprobs, 3, sampled)[2]
            wanted = (logprobs >= logprobs.gather(-1, sampled.unsqueeze(-1))).sum(-1)
        calls += 1
        equal += torch.equal(ranks, wanted)
    frames = counters["stats"]["unique_graphs"] - before
    return {"calls": calls, "equal to eager": equal, "frames that Dynamo traced": frames}


def _entry_points() -> list[object]:
    from importlib.metadata import entry_points

    return list(entry_points(group="vllm.general_plugins"))


if __name__ == "__main__":
    main()
