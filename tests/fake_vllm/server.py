"""An API server, an engine core in a process of its own, and a worker in that. Prints one JSON line.

python server.py METHOD: `spawn` or `fork`, as VLLM_WORKER_MULTIPROC_METHOD.
"""

import json
import logging
import multiprocessing
import os
import sys
from typing import Any


def engine_core(channel: Any) -> None:
    """As vLLM's: plug-ins first, then the worker."""
    logging.basicConfig(level=logging.INFO, format="LOG %(name)s %(levelname)s %(message)s")
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    from torch._dynamo.utils import counters
    from vllm.v1.worker.gpu_worker import Worker

    worker = Worker()
    worker.load_model(load_dummy_weights=True)
    worker.initialize_from_config({})
    said = worker.compile_or_warm_up_model()
    served = [worker.execute_model(size) for size in (4, 9, 16)]
    from vllm.compilation.decorators import counts

    import aot_cache

    loaded = "aot_cache.runtime.session" in sys.modules
    stats = aot_cache.stats() if loaded else {}
    channel.send(
        {
            "said": said,
            "served": served,
            "frames": counters["stats"]["unique_graphs"],
            "loaded": loaded,
            "stats": {name: stats.get(name) for name in ("total", "sealed", "after_seal")},
            "models": counts,
            "cache_dir": worker.model.compilation_config.cache_dir,
            "patched": hasattr(Worker.load_model, "_aot_cache_patch"),
        }
    )
    channel.recv()  # the metrics are read while the worker lives


def look_at_a_class() -> int:
    """As vLLM does before it makes its configuration. Returns how many child processes it would have started."""
    from vllm.model_executor.models import registry

    found = registry._LazyRegisteredModel("fake.models", "Fake").inspect_model_cls(os.environ.get("FAKE_HASH", "1"))
    assert found == registry._ModelInfo("Fake")
    return registry.children


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="LOG %(name)s %(levelname)s %(message)s")
    from vllm.entrypoints.serve.instrumentator import metrics
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    children = look_at_a_class() if "VLLM_CACHE_ROOT" in os.environ else 0
    before = sorted(name for name in sys.modules if name.startswith("aot_cache"))
    context = multiprocessing.get_context(sys.argv[1])
    mine, theirs = context.Pipe()
    child = context.Process(target=engine_core, args=(theirs,))
    child.start()
    theirs.close()  # so that a child that dies ends the wait
    found = mine.recv()
    page = metrics.page()
    mine.send("end")
    child.join()
    print(
        json.dumps(
            {
                "worker": found,
                "metrics": page,
                "api server": before,
                "children": children,
                "exit": child.exitcode,
                "torch": "torch" in sys.modules,
            }
        )
    )


if __name__ == "__main__":
    main()
