"""One start of an unmodified vLLM with a small random Qwen3.5 + MTP, and requests. Called by `check_vllm_serving.py`.

    python vllm_start.py OPTIONS.json    # writes `answer` of the options: seconds and tokens

Options: see `check_vllm_serving.START`. Vocabulary and sizes of the model are in `check_vllm_serving.write_model`.
"""

from __future__ import annotations

import json
import random
import sys
import time
from pathlib import Path
from typing import Any

BATCHES, LENGTHS = (1, 3, 7, 32), (1, 5, 63, 64, 700, 2000)
"""A prompt of one token has kernels of its own: it is a decoding step without drafts."""
MIXED = {
    "20 of 5 to 2000": [5, 63, 64, 700, 2000] * 4,
    "64 odd lengths": [(i * 97) % 1500 + 1 for i in range(64)],
    "9 around 16 to 130": [16, 17, 31, 33, 65, 127, 128, 129, 130],
}
SAMPLED: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 0.8},
    "top-k, top-p": {"temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "min-p": {"temperature": 0.8, "min_p": 0.05},
    "seed": {"temperature": 0.8, "seed": 7},
    "penalties": {"presence_penalty": 0.5, "repetition_penalty": 1.1},
    "logprobs": {"logprobs": 3},
}
WITHOUT_DRAFTS = ("min-p",)
"""vLLM refuses these beside speculative decoding."""
VOCABULARY = 31000
ALONE = 200
"""Requests one at a time. In a batch tokens depend on how vLLM happens to put requests together, alone they do not."""


def main(options: dict[str, Any]) -> None:
    began = options["began"]
    from vllm import LLM, SamplingParams

    imported = time.time() - began
    settings = dict(options["settings"])
    if options["drafts"]:
        settings["speculative_config"] = {"method": "mtp", "num_speculative_tokens": options["drafts"]}
    llm = LLM(model=options["model"], **settings)
    ready_at = time.time()
    found: dict[str, Any] = {"imported": imported, "ready": ready_at - began, "ready_at": ready_at, "steps": []}
    generator = random.Random(1)

    def ask(label: str, lengths: list[int], tokens: int = 12, **sampling: Any) -> None:
        parameters = SamplingParams(
            detokenize=False, ignore_eos=True, max_tokens=tokens, **{"temperature": 0.0, **sampling}
        )
        prompts = [{"prompt_token_ids": [generator.randrange(5, VOCABULARY) for _ in range(n)]} for n in lengths]
        started = time.time()
        step: dict[str, Any] = {"label": label}
        try:
            outputs = llm.generate(prompts, parameters, use_tqdm=False)
            step["tokens"] = [list(one.token_ids) for output in outputs for one in output.outputs]
        except Exception as error:
            step["error"] = f"{type(error).__name__}: {error}"[:600]
        step["seconds"] = time.time() - started
        found["steps"].append(step)
        if "first_token" not in found:
            found["first_token"] = time.time() - began

    ask("first token", [5], tokens=1)
    for again in range(1 if options["short"] else 2):
        for batch in BATCHES:
            for length in LENGTHS:
                ask(f"pass {again}: {batch} of {length}", [length] * batch)
        if not options["short"]:
            for label, lengths in MIXED.items():
                ask(f"mixed {again}: {label}", lengths)
            for label, sampling in SAMPLED.items():
                if label in WITHOUT_DRAFTS and options["drafts"]:
                    continue
                ask(f"sampled {again}: {label}", [64] * 3, **sampling)
    if not options["short"]:
        for number in range(ALONE):
            ask(f"alone {number}", [generator.randrange(1, 1500)])
    for window in range(options["windows"]):
        for batch in (1, 32):
            ask(f"steady {window}: {batch}", [64] * batch, tokens=256)
    found["done"] = time.time() - began
    Path(options["answer"]).write_text(json.dumps(found))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
