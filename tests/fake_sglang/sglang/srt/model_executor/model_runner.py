from typing import Any

import fake_sglang_model
import torch


class ModelRunner:
    """Of a target, or of a draft."""

    def __init__(self, is_draft_worker: bool = False) -> None:
        self.is_draft_worker = is_draft_worker
        self.load_model()

    def load_model(self) -> None:
        self.step: Any = fake_sglang_model.draft_step if self.is_draft_worker else fake_sglang_model.step

    def init_cuda_graphs(self, capture_decode_cuda_graph: bool = True) -> None:
        for size in (16, 4):
            self.run(size)

    @torch.no_grad()
    def run(self, size: int) -> list[float]:
        found: list[float] = self.step(torch.arange(size, dtype=torch.float32)).tolist()
        return found
