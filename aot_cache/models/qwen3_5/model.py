"""A model with its caches, and the host code that serving runs: prompt, verification or decoding step, drafts.

A build traces this host code, and a server runs and captures it: the same functions with the same kinds of arguments, so that
there is no second code path that a warm-up could miss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from aot_cache.models.qwen3_5 import compiled_layers
from aot_cache.models.qwen3_5.modules import Net
from aot_cache.models.qwen3_5.settings import Settings

Pair = tuple[Tensor, Tensor]


@dataclass
class Batch:
    """The inputs of a step for the first `b` slots, in static tensors, from which a captured graph reads.

    Args:
        tokens: [b, t] int64: for a draft the target's last tokens, for a verification the pending token and its drafts.
        lengths: [b] int64, number of tokens that the target has processed.
        count: [b] int64, number of drafts that were accepted in the last step.
        hidden: [b, t, hidden], the target's hidden states of the last step; None without speculation.
        temperature: [b] float32; seed: [b] int64.
    """

    tokens: Tensor
    lengths: Tensor
    count: Tensor
    hidden: Tensor | None
    temperature: Tensor
    seed: Tensor


class Model:
    """A network and its caches.

    Args:
        net: the modules, on one device.
        device: the device of the caches.
    """

    def __init__(self, net: Net, settings: Settings, device: str) -> None:
        self.net, self.settings, self.device = net, settings, device
        self.dtype = getattr(torch, settings.dtype)
        self.caches = [
            self._delta_cache() if layer.block_type == "linear_attention" else self._attention_cache()
            for layer in net.layers
        ]
        self.draft_cache = self._attention_cache() if net.mtp is not None else None

    def _attention_cache(self) -> Pair:
        text, s = self.settings.text, self.settings
        shape = (s.max_batch, text["num_key_value_heads"] // s.tp, s.cache_len, text["head_dim"])
        return self._zeros(*shape), self._zeros(*shape)

    def _delta_cache(self) -> Pair:
        text, s = self.settings.text, self.settings
        conv = self._zeros(s.max_batch, s.conv_channels, text["linear_conv_kernel_dim"])
        widths = (text["linear_key_head_dim"], text["linear_value_head_dim"])
        heads = text["linear_num_value_heads"] // s.tp
        return conv, torch.zeros(s.max_batch, heads, *widths, dtype=torch.float32, device=self.device)

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)

    def batch(self, size: int, width: int) -> Batch:
        """Inputs of a step for `size` empty slots with `width` tokens each: token 0 at position 1."""
        hidden = None
        if self.net.mtp is not None:
            hidden = self._zeros(size, width, self.settings.text["hidden_size"])
        ints = [torch.zeros(size, width, dtype=torch.int64, device=self.device)]
        ints += [torch.zeros(size, dtype=torch.int64, device=self.device) for _ in range(3)]
        ints[1] += 1
        temperature = torch.zeros(size, dtype=torch.float32, device=self.device)
        return Batch(ints[0], ints[1], ints[2], hidden, temperature, ints[3])

    def prompt(
        self, tokens: Tensor, starts: Tensor, slot: Tensor, temperature: Tensor, seed: Tensor, following: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Process a part of a prompt.

        Args:
            tokens: [1, p], the first at position `starts` [1]; the parts before it have been processed.
            slot: [1], whose caches are written; temperature, seed: [1].
            following: [1, 1], the prompt's next token; None if this part is the last.

        Returns:
            The first token [1, 1] of the answer, which is valid if this part is the last, and the hidden state [1, 1, hidden]
            from which it was sampled.
        """
        net = self.net
        x, cos, sin = compiled_layers.begin(net.embed, net.rotary, tokens, starts)
        for layer, (one, other) in zip(net.layers, self.caches, strict=True):
            if layer.block_type == "linear_attention":
                x = compiled_layers.prompt_delta(layer, x, starts, slot, one, other, net.split)
            else:
                x = compiled_layers.prompt_attention(layer, x, cos, sin, starts, slot, one, other, net.split)
        first, hidden = compiled_layers.finish_prompt(net.norm, net.head, x, starts, temperature, seed)
        if self.draft_cache is not None:
            shifted = torch.cat([tokens[:, 1:], first if following is None else following], dim=1)
            parts = (net.mtp, net.embed, net.rotary)
            compiled_layers.prompt_draft(*parts, shifted, hidden, starts, slot, *self.draft_cache, net.split)
        return first, hidden[:, -1:]

    def verify(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Run the pending token of each request and its drafts, and advance all caches by the accepted tokens.

        Returns:
            The results of `compiled_layers.accept`: the target's tokens [b, t], of which the first count + 1 are new tokens of
            the request; count [b]; hidden states [b, t, hidden].
        """
        net, kept = self.net, []
        x, cos, sin = compiled_layers.begin(net.embed, net.rotary, batch.tokens, batch.lengths)
        for layer, (one, other) in zip(net.layers, self.caches, strict=True):
            if layer.block_type == "linear_attention":
                x, inputs = compiled_layers.verify_delta(layer, x, one, other, net.split)
                kept.append((one, other, inputs))
            else:
                x = compiled_layers.cached_attention(layer, x, cos, sin, batch.lengths, one, other, net.split)
        said, count, hidden = self._accept(x, batch)
        for conv, state, inputs in kept:
            compiled_layers.commit(conv, state, *inputs, count)
        return said, count, hidden

    def decode(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Run one token of each request: `verify` without drafts, which writes the state in the same pass."""
        net = self.net
        x, cos, sin = compiled_layers.begin(net.embed, net.rotary, batch.tokens, batch.lengths)
        for layer, (one, other) in zip(net.layers, self.caches, strict=True):
            if layer.block_type == "linear_attention":
                x = compiled_layers.decode_delta(layer, x, one, other, net.split)
            else:
                x = compiled_layers.cached_attention(layer, x, cos, sin, batch.lengths, one, other, net.split)
        return self._accept(x, batch)

    def _accept(self, x: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        args = (batch.tokens, batch.lengths, batch.temperature, batch.seed)
        found: tuple[Tensor, Tensor, Tensor] = compiled_layers.accept(self.net.norm, self.net.head, x, *args)
        return found

    def draft(self, batch: Batch) -> Tensor:
        """The pending token of each request and its drafts, [b, 1 + drafts], from the last step's tokens and hidden states.

        The pass for the first draft also adds the accepted tokens to the draft's cache.
        """
        net, cache = self.net, self.draft_cache
        if cache is None or batch.hidden is None:
            raise ValueError("this model was made without a draft")
        parts = (net.mtp, net.embed, net.rotary, net.head)
        starts = batch.lengths - 1 - batch.count
        found = [batch.tokens.gather(1, batch.count[:, None])]
        token, hidden = compiled_layers.draft(
            *parts, batch.tokens, batch.hidden, starts, batch.count, *cache, net.split
        )
        none = torch.zeros_like(batch.count)
        for ahead in range(self.settings.drafts - 1):
            found.append(token)
            token, hidden = compiled_layers.draft(*parts, token, hidden, batch.lengths + ahead, none, *cache, net.split)
        return torch.cat([*found, token], dim=1)
