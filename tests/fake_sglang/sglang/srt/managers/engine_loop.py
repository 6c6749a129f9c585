"""What a scheduler does with requests: one token for each of them in a step."""

from types import SimpleNamespace
from typing import Any

from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver
from sglang.srt.utils import broadcast_pyobj

MOST_TOKENS = 64


class EngineLoop:
    def init_engine(self, server_args: Any, rank: int) -> None:
        import torch  # not where a server's other processes import this module

        self.server_args = server_args
        self.max_running_requests = server_args.max_running_requests
        self.chunked_prefill_size, self.max_prefill_tokens = 8, 0
        self.model_config = SimpleNamespace(context_len=32, vocab_size=100)
        self.output_streamer = SimpleNamespace(send_to_detokenizer=None)
        self.request_receiver = SchedulerRequestReceiver()
        if server_args.tp_size > 1:
            GroupCoordinator(torch.distributed.group.WORLD, use_shared_memory=True)
        (self.seed,) = broadcast_pyobj([7], rank)
        self.gracefully_exit = False
        self.init_running_status()
        assert torch.cuda.current_device() == rank

    def init_running_status(self) -> None:
        self.running: list[list[Any]] = []
        self.chunked_req = None

    def is_fully_idle(self) -> bool:
        return not self.running

    def flush_cache(self, empty_cache: bool = True) -> None:
        assert self.is_fully_idle() and not empty_cache

    def run_event_loop(self) -> None:
        while not self.gracefully_exit:
            self.running += [[one, 0] for one in self.request_receiver.recv_requests(local_reqs=[])]
            if self.running:
                self.step()

    def step(self) -> None:
        import fake_sglang_kernel
        import fake_sglang_model
        import torch

        batch = len(self.running)
        assert batch <= self.max_running_requests
        x = torch.zeros(MOST_TOKENS, device="cuda")
        fake_sglang_kernel.decode[(1,)](x, BATCH=1 << (batch - 1).bit_length())
        params = [one.sampling_params for one, _ in self.running]
        if any(one.logit_bias for one in params):
            assert all(one.logit_bias == {"5": 1.0} for one in params)
            fake_sglang_kernel.with_bias[(1,)](x)
        if any(one.presence_penalty for one in params):
            raise RuntimeError("penalties are not implemented")
        with torch.no_grad():
            fake_sglang_model.step(x[:batch])
        self.output_streamer.send_to_detokenizer.send_output([one.rid for one, _ in self.running])
        self.running = [[one, made + 1] for one, made in self.running if made + 1 < one.sampling_params.max_new_tokens]
