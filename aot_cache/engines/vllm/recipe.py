"""The small functions that vLLM itself puts under `torch.compile` and first calls with requests, after all warm-ups.

Asynchronous scheduling with drafts corrects its counts of computed tokens (`GPUModelRunner._prepare_inputs`, in 0.24 and 0.33).
As there, buffers are made outside of inference mode, and what a step computes inside it. Requests for logprobs rank tokens
(`Sampler.gather_logprobs`), with sizes that are marked as unbacked. Needs vLLM, and no GPU.
"""

from __future__ import annotations

import torch
from vllm.v1.sample.sampler import Sampler
from vllm.v1.spec_decode.utils import update_num_computed_tokens_for_batch_change as correct_counts

from aot_cache import Call, Range, Recipe, declare, device


def recipe(max_num_seqs: int = 256, vocab_size: int = 0) -> Recipe:
    """The recipe `vllm-steps`.

    Args:
        max_num_seqs: as for `vllm serve --max-num-seqs`.
        vocab_size: the model's; 0 leaves out what requests for logprobs need.
    """

    def buffer(dtype: torch.dtype = torch.int32) -> torch.Tensor:
        with torch.inference_mode(False):
            return torch.zeros(max_num_seqs, dtype=dtype, device=device())

    @declare(batch=Range(1, max_num_seqs), before=Range(1, max_num_seqs), mode="inference")
    def correct(batch: int, before: int) -> Call:
        """Counts of computed tokens, for `batch` requests in this step and `before` in the step before."""
        valid = torch.ones(before, dtype=torch.int32, device=device())
        computed = torch.ones(batch, dtype=torch.int32, device=device())
        positions = buffer(torch.int64)[:batch]
        return Call(correct_counts, buffer(), buffer()[:batch], positions, valid, buffer(), computed)

    @declare(tokens=Range(1, 4), mode="inference")
    def rank(tokens: int) -> Call:
        """Ranks of tokens, for requests with logprobs. More tokens need no other graph: vLLM marks their number as unbacked."""
        logprobs = torch.zeros(tokens, vocab_size, dtype=torch.float32, device=device())
        sampled = torch.zeros(tokens, dtype=torch.int64, device=device())
        return Call(Sampler.gather_logprobs, logprobs, 1, sampled)

    return Recipe("vllm-steps", [correct, rank] if vocab_size else [correct])
