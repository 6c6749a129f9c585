"""Ten compiled functions of a language model's step, Qwen3-8B's sizes in bfloat16: what `bench_build.py` builds.

One dynamic dimension each, and from 2 on, so that each is one graph. Needs torch alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from net import GatedMLP, with_weights
from torch.nn import functional as F

from aot_cache import Call, Case, Range, Recipe, device

TOKENS = Range(2, 256)
HIDDEN, MLP, HEADS, KV_HEADS, HEAD, VOCABULARY, EXPERTS = 4096, 12288, 32, 8, 128, 151936, 64


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype) * weight


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat((-high, low), -1) * sin


def norm_add(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Any:
    total = x + residual
    return rms(total, weight), total


def gated_norm(x: torch.Tensor, gate: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms(x, weight) * F.silu(gate)


def rope(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
    cos, sin = cos[:, None], sin[:, None]
    return rotate(q, cos, sin), rotate(k, cos, sin)


def mlp(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (F.silu(x @ gate) * (x @ up)) @ down


def attention(x: torch.Tensor, norms: Any, qkv: torch.Tensor, out: torch.Tensor, cos: Any, sin: Any) -> torch.Tensor:
    """A whole attention block over its own tokens."""
    before, q_norm, k_norm = norms
    found = (rms(x, before) @ qkv).view(x.shape[0], HEADS + 2 * KV_HEADS, HEAD)
    q, k, v = found.split((HEADS, KV_HEADS, KV_HEADS), 1)
    q, k = rotate(rms(q, q_norm), cos[:, None], sin[:, None]), rotate(rms(k, k_norm), cos[:, None], sin[:, None])
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return x + y[0].transpose(0, 1).reshape(x.shape[0], -1) @ out


def probabilities(logits: torch.Tensor, temperature: torch.Tensor, penalty: torch.Tensor) -> Any:
    """What a sampler reads: the distribution and its entropy."""
    scaled = torch.where(logits > 0, logits / penalty, logits * penalty).float() / temperature[:, None]
    chances = torch.softmax(scaled, -1)
    return chances, -(chances * torch.log(chances + 1e-10)).sum(-1)


def logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    scores = logits.float()
    return scores.gather(-1, tokens[:, None])[:, 0] - torch.logsumexp(scores, -1)


def router(x: torch.Tensor, weight: torch.Tensor) -> Any:
    chances = torch.softmax((x @ weight).float(), -1)
    values, experts = torch.topk(chances, 8, -1)
    return (values / values.sum(-1, keepdim=True)).to(x.dtype), experts.int()


def quantized(x: torch.Tensor) -> Any:
    """A scale for each token, and eight bits."""
    y = x.float()
    scale = y.abs().amax(-1, keepdim=True).clamp(min=1e-6) / 127
    return torch.round(y / scale).clamp(-128, 127).to(torch.int8), scale


class Layers(torch.nn.Module):
    """Four gated MLPs, as a module with weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(GatedMLP(1024) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@cache
def layers() -> torch.nn.Module:
    with torch.device("meta"):
        made = Layers()
    return with_weights(made)


def _random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, dtype=dtype, device=device())


ARGUMENTS: dict[str, Callable[[int], tuple[Any, ...]]] = {
    "norm_add": lambda n: (_random(n, HIDDEN), _random(n, HIDDEN), _random(HIDDEN)),
    "gated_norm": lambda n: (_random(n, HEADS, HEAD), _random(n, HEADS, HEAD), _random(HEAD)),
    "rope": lambda n: (_random(n, HEADS, HEAD), _random(n, KV_HEADS, HEAD), _random(n, HEAD), _random(n, HEAD)),
    "mlp": lambda n: (_random(n, HIDDEN), _random(HIDDEN, MLP), _random(HIDDEN, MLP), _random(MLP, HIDDEN)),
    "attention": lambda n: (
        _random(n, HIDDEN),
        (_random(HIDDEN), _random(HEAD), _random(HEAD)),
        _random(HIDDEN, (HEADS + 2 * KV_HEADS) * HEAD),
        _random(HEADS * HEAD, HIDDEN),
        _random(n, HEAD),
        _random(n, HEAD),
    ),
    "probabilities": lambda n: (
        _random(n, VOCABULARY),
        _random(n, dtype=torch.float32),
        torch.ones((), dtype=torch.float32, device=device()),
    ),
    "logprobs": lambda n: (_random(n, VOCABULARY), torch.zeros(n, dtype=torch.int64, device=device())),
    "router": lambda n: (_random(n, HIDDEN), _random(HIDDEN, EXPERTS)),
    "quantized": lambda n: (_random(n, HIDDEN),),
    "layers": lambda n: (_random(n, 1024),),
}


@cache
def compiled(name: str) -> Any:
    """One of the ten as a server has it."""
    return torch.compile(layers() if name == "layers" else globals()[name])


def _case(name: str) -> Case:
    return Case(name, lambda n: Call(compiled(name), *ARGUMENTS[name](n)), {"n": TOKENS}, mode="no_grad")


recipe = Recipe("ten-graphs", [_case(name) for name in ARGUMENTS])
