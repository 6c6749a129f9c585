from dataclasses import dataclass
from typing import Any


@dataclass
class SamplingParams:
    max_new_tokens: int
    ignore_eos: bool
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    sampling_seed: int | None = None
    logit_bias: dict[str, float] | None = None

    def normalize(self, tokenizer: Any) -> None:
        assert tokenizer is None and self.ignore_eos
