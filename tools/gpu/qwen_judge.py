"""Compare served tokens with transformers: the part `judge` of `check_qwen.py`, for one GPU and for several."""

from __future__ import annotations

import copy
import inspect
import statistics
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from harness import distance

from aot_cache.models.qwen3_5.modules import CLASSES, config_of
from aot_cache.models.qwen3_5.settings import MOE

Json = Any


def judge(
    engine: Any,
    asked: Sequence[tuple[list[int], int]],
    served: Sequence[list[int]],
    kept: Mapping[str, torch.Tensor],
) -> Json:
    """Run transformers' own model on the served tokens, in float32 and in bfloat16, with the same weights.

    `gaps`: how far, at each position, float32's logit of the token is below its best logit, for our token and for bfloat16's
    choice. `hidden`: relative norm of the difference from float32's hidden states, for ours and for bfloat16's, by request.

    Args:
        engine: has the weights.
        asked: (prompt, number of tokens) of each request; served: its tokens.
        kept: number of a request → our hidden state before each of its tokens.
    """
    device = engine.model.device
    gaps: Json = {"ours": [], "bfloat16": []}
    hidden: Json = {"ours": [], "bfloat16": []}
    with torch.no_grad():
        half, full = theirs(engine, torch.bfloat16), theirs(engine, torch.float32)
        for number, ((prompt, _), tokens) in enumerate(zip(asked, served)):
            ids = torch.tensor([prompt + tokens[:-1]], device=device)
            mine = [model.model(ids).last_hidden_state[0, -len(tokens) :] for model in (half, full)]
            logits = [model.lm_head(x).float() for model, x in zip((half, full), mine)]
            best = logits[1].max(-1).values
            for name, said in (("ours", torch.tensor(tokens, device=device)), ("bfloat16", logits[0].argmax(-1))):
                gaps[name] += (best - logits[1].gather(1, said[:, None])[:, 0]).tolist()
            if str(number) in kept:
                hidden["ours"].append(distance(kept[str(number)].to(device), mine[1]))
                hidden["bfloat16"].append(distance(mine[0], mine[1]))
        generated = by_generate(half, asked, served)
    told = {name: {"different": sum(g > 0 for g in found), "largest": max(found)} for name, found in gaps.items()}
    norms = {name: statistics.median(found) for name, found in hidden.items()}
    return {"tokens": len(gaps["ours"]), "gaps": told, "hidden": norms, "generate": generated}


def theirs(engine: Any, dtype: Any) -> Any:
    """transformers' own model, with its attention, experts and layers, and with our weights."""
    net, made = engine.model.net, CLASSES[engine.settings.kind][1]
    if engine.model.device == "cpu":  # else it uses fla-core if that is installed, which needs a GPU
        modeling = sys.modules[made.__module__]
        for name in ("chunk_gated_delta_rule", "recurrent_gated_delta_rule"):
            setattr(modeling, f"torch_{name}", inspect.unwrap(getattr(modeling, f"torch_{name}")))
        for name in ("causal_conv1d_fn", "causal_conv1d_update"):
            setattr(modeling, name, inspect.unwrap(getattr(modeling, name)))
    config = config_of(engine.settings, len(net.layers))
    # What `from_pretrained(attn_implementation=…, experts_implementation=…)` sets.
    config._attn_implementation = "sdpa"  # noqa: SLF001
    if engine.settings.kind == MOE:
        config._experts_implementation = "eager" if engine.model.device == "cpu" else "grouped_mm"  # noqa: SLF001
    with torch.device("meta"):
        model: Any = made(config).eval()
    model.model.layers = torch.nn.ModuleList(copy.deepcopy(layer).to(dtype) for layer in net.layers)
    model.model.norm, model.lm_head = (copy.deepcopy(part).to(dtype) for part in (net.norm, net.head))
    model.model.embed_tokens, model.model.rotary_emb = copy.deepcopy(net.embed).to(dtype), net.rotary
    for part in model.model.layers.modules():
        if hasattr(part, "config"):  # attention and experts choose their implementation by it
            part.config = config
    return model


def by_generate(model: Any, asked: Sequence[tuple[list[int], int]], served: Sequence[list[int]]) -> Json:
    """For a few requests: [number of tokens that agree with `generate` before the first difference, number of tokens]."""
    out = []
    for number in range(0, len(served), max(1, len(served) // 8)):
        prompt = torch.tensor([asked[number][0]], device=model.device)
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=len(served[number]), do_sample=False
        )
        pairs = enumerate(zip(made[0, prompt.shape[1] :].tolist(), served[number]))
        out.append([next((n for n, (a, b) in pairs if a != b), len(served[number])), len(served[number])])
    return out
