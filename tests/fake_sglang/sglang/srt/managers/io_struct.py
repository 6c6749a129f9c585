from array import array
from dataclasses import dataclass
from typing import Any


@dataclass
class TokenizedGenerateReqInput:
    rid: str
    input_text: str | None
    input_ids: "array[int]"
    input_embeds: Any
    mm_inputs: Any
    token_type_ids: Any
    sampling_params: Any
    return_logprob: bool
    logprob_start_len: int
    top_logprobs_num: int
    token_ids_logprob: Any
    stream: bool
