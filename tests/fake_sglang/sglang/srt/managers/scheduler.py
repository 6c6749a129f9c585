"""A scheduler's process imports this at its start; the API server does, too, for the function's name."""

from typing import Any

from sglang.srt.managers.engine_loop import EngineLoop


class Scheduler(EngineLoop):
    def __init__(self, server_args: Any, port_args: Any, gpu_id: int = 0, tp_rank: int = 0) -> None:
        if server_args != "server_args":  # the plug-in's tests serve nothing
            assert server_args.load_format == "dummy" and server_args.skip_tokenizer_init and gpu_id == tp_rank
            self.init_engine(server_args, tp_rank)
            return
        self.init_model_worker()

    def init_model_worker(self) -> None:
        from sglang.srt.model_executor.model_runner import ModelRunner

        self.target = ModelRunner()
        self.draft = ModelRunner(is_draft_worker=True)
        self.target.init_cuda_graphs()
        self.draft.init_cuda_graphs(capture_decode_cuda_graph=False)


def run_scheduler_process(pipe_writer: Any) -> None:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    scheduler = Scheduler("server_args", "port_args")
    pipe_writer.send({"ready": True})
    served = [[runner.run(size) for size in (4, 9, 16)] for runner in (scheduler.target, scheduler.draft)]
    import sys

    from torch._dynamo.utils import counters

    import aot_cache

    loaded = "aot_cache.runtime.session" in sys.modules
    stats = aot_cache.stats() if loaded else {}
    pipe_writer.send(
        {
            "served": served,
            "frames": counters["stats"]["unique_graphs"],
            "stats": {name: stats.get(name) for name in ("total", "sealed", "after_seal")},
        }
    )
    pipe_writer.recv()  # the metrics are read while this process lives
