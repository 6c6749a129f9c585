"""Serves a model: slots for requests, a CUDA graph per batch size, one step at a time. Call it from one thread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from aot_cache.models.qwen3_5 import modules, weights
from aot_cache.models.qwen3_5.model import Batch, Model
from aot_cache.models.qwen3_5.settings import Settings
from aot_cache.runtime import capture_loop, loader

_HOTTEST = 1e30
"""Limit of the temperature: all tokens are equally likely here. Above, temperature times noise would overflow float32 for many
tokens, and the first of them would win."""


@dataclass
class _Request:
    """The state of the request in a slot.

    Args:
        said: the target's tokens of the last step; the first `count` + 1 belong to the request.
        length: number of tokens that the target has processed; the last accepted token of `said` is next.
    """

    said: list[int]
    length: int
    count: int
    temperature: float
    seed: int


class Engine:
    """A model that serves.

    Args:
        model: the model to run.
        sizes: batch sizes to which steps are padded, each a captured graph on a GPU; default 1, 2, 4 … `max_batch`.
        speculate: False decodes token by token even if the settings have drafts. The caches then keep their sizes, so that one
            bundle serves both ways.

    Raises:
        ValueError: the largest size is not `max_batch`.
    """

    def __init__(self, model: Model, sizes: Sequence[int] | None = None, speculate: bool = True) -> None:
        self.model, self.settings = model, model.settings
        self.max_batch, self.max_model_len = self.settings.max_batch, self.settings.max_model_len
        self.speculative, self.vocab = self.settings.drafts * speculate, int(self.settings.text["vocab_size"])
        width, most = 1 + self.speculative, self.max_batch
        self.sizes = sorted(sizes or {*(1 << n for n in range(most.bit_length()) if 1 << n < most), most})
        if self.sizes[-1] != most:
            raise ValueError(f"sizes up to {most}, as many as there are slots, not {self.sizes}")
        self._running: dict[int, _Request] = {}
        self._batches = {size: model.batch(size, width) for size in self.sizes}
        # Drafted tokens have tensors of their own; the two batches share all other inputs.
        self._verified = {
            size: replace(batch, tokens=torch.zeros_like(batch.tokens)) for size, batch in self._batches.items()
        }
        self.hidden = model.batch(most, width).hidden if self.speculative else None
        self.graphs: dict[tuple[str, int], tuple[Any, Any]] = {}

    # --- start-up -------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> dict[str, Callable[[Batch], object]]:
        """The parts of a step, in order."""
        if self.speculative:
            return {"draft": self.model.draft, "verify": self.model.verify}
        return {"decode": self.model.decode}

    @torch.no_grad()
    def capture(self, progress: Callable[[str, int, int], None] | None = None) -> dict[str, list[dict[str, Any]]]:
        """Capture each part of a step for each size; without a GPU, run each once.

        If a bundle is loaded, all ranks run the sizes that it does not cover without a graph.

        Returns:
            Part of the step → what was captured or dropped, and why (`aot_cache.Captured.report`).
        """
        reports = {}
        loaded = bool(loader.loaded())
        for name, run in self.steps.items():
            batches = self._batches if name == "draft" else self._verified

            def covers(size: int, name: str = name) -> tuple[str, Mapping[str, int]]:
                return name, {"batch": size}

            done = capture_loop.capture(
                self.sizes, batches.__getitem__, run, covers=covers if loaded else None, mixed="drop", progress=progress
            )
            self.graphs |= {(name, size): (graph, done.outputs[size]) for size, graph in done.graphs.items()}
            reports[name] = done.report
        return reports

    # --- requests -------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def start(self, slot: int, prompt: Sequence[int], temperature: float = 0.0, seed: int = 0) -> int:
        """Process a prompt and return its first token.

        Args:
            slot: a free slot, 0 … `max_batch` - 1.
            temperature: 0 is greedy.
            seed: of the request's samples, which do not depend on other requests or on speculation.

        Raises:
            ValueError: the slot is taken, or the prompt is empty or leaves no room for a token.
        """
        if slot in self._running or not 0 <= slot < self.max_batch:
            raise ValueError(f"slot {slot} is taken, or not one of {self.max_batch}")
        if not 0 < len(prompt) < self.max_model_len:
            raise ValueError(f"a prompt of 1 to {self.max_model_len - 1} tokens, not of {len(prompt)}")
        place = self.model.device
        temperature = min(temperature, _HOTTEST)
        tokens = torch.tensor([list(prompt)], device=place)
        request = torch.tensor([slot], device=place)
        sampling = torch.tensor([temperature], device=place), torch.tensor([seed], device=place)
        chunk = self.settings.prefill_chunk
        for start in range(0, len(prompt), chunk):
            # Contiguous: a plain clone keeps the strides of the whole prompt, which gives another call than the declared one.
            part = tokens[:, start : start + chunk].clone(memory_format=torch.contiguous_format)
            rest = tokens[:, start + chunk :]
            following = rest[:, :1].clone() if rest.shape[1] else None
            first, hidden = self.model.prompt(part, torch.tensor([start], device=place), request, *sampling, following)
        if self.hidden is not None:
            self.hidden[slot, :1] = hidden[0]
        token = int(first)
        self._running[slot] = _Request([token] + [0] * self.speculative, len(prompt), 0, temperature, seed)
        return token

    @torch.no_grad()
    def step(self, slots: Sequence[int], drafts: Mapping[int, Sequence[int]] | None = None) -> list[list[int]]:
        """Run one step; returns the new tokens of each of these slots, 1 to 1 + `speculative`.

        The smallest graph that includes the highest slot runs. It also writes the caches of its other slots, which are padding,
        so every request in its range must be in `slots`.

        Args:
            slots: distinct slots.
            drafts: slot → drafts to use instead of the MTP layer's: from another proposer, or an oracle.

        Raises:
            ValueError: a slot has no request, a request has no room left or would be padding, or the number of drafts for a slot
                is not `speculative`.
        """
        self._check(slots, drafts or {})
        size = self._size(slots)
        batch, verified = self._batches[size], self._verified[size]
        self._write(batch, slots)
        if self.speculative:
            verified.tokens.copy_(self._run("draft", size, batch))
            for slot, tokens in (drafts or {}).items():
                verified.tokens[slot, 1:] = torch.tensor(list(tokens), device=self.model.device)
            said, count, hidden = self._run("verify", size, verified)
            self.hidden[:size].copy_(hidden)  # type: ignore[index]
        else:
            verified.tokens.copy_(batch.tokens)
            said, count, _ = self._run("decode", size, verified)
        rows = torch.cat([said, count[:, None]], dim=1).tolist()  # the only host sync
        return [self._moved_on(slot, rows[slot]) for slot in slots]

    def stop(self, slot: int) -> None:
        """Free a slot."""
        self._running.pop(slot, None)

    def _size(self, slots: Sequence[int]) -> int:
        return next(size for size in self.sizes if size > max(slots))

    def _check(self, slots: Sequence[int], drafts: Mapping[int, Sequence[int]]) -> None:
        if not slots or len({*slots}) < len(slots):
            raise ValueError(f"one slot or more, each once, not {list(slots)}")
        for slot in slots:
            if slot not in self._running:
                raise ValueError(f"slot {slot} holds no request")
            if self._running[slot].length + 1 >= self.max_model_len:
                raise ValueError(f"the request in slot {slot} has all of its {self.max_model_len} tokens")
        left = sorted(slot for slot in self._running if slot < self._size(slots) and slot not in slots)
        if left:
            raise ValueError(f"the requests in slots {left} have to step, too: {self._size(slots)} slots are written")
        for slot, tokens in drafts.items():
            if slot not in slots or len(tokens) != self.speculative:
                raise ValueError(
                    f"{self.speculative} drafts for each of slots {list(slots)}, not {len(tokens)} for {slot}"
                )

    def _write(self, batch: Batch, slots: Sequence[int]) -> None:
        """Write the requests of `slots` into a batch; all other rows are those of empty slots."""
        size, width = batch.tokens.shape
        rows = {slot: self._running[slot] for slot in slots}
        empty = _Request([0] * width, 1, 0, 0.0, 0)
        told = [rows.get(slot, empty) for slot in range(size)]
        batch.tokens.copy_(torch.tensor([one.said for one in told]))
        batch.lengths.copy_(torch.tensor([one.length for one in told]))
        batch.count.copy_(torch.tensor([one.count for one in told]))
        batch.temperature.copy_(torch.tensor([one.temperature for one in told]))
        batch.seed.copy_(torch.tensor([one.seed for one in told]))
        if batch.hidden is not None and self.hidden is not None:
            batch.hidden.copy_(self.hidden[:size])

    def _run(self, name: str, size: int, batch: Batch) -> Any:
        graph, out = self.graphs.get((name, size), (None, None))
        if graph is None:
            return self.steps[name](batch)
        graph.replay()
        return out

    def _moved_on(self, slot: int, row: Sequence[int]) -> list[int]:
        request = self._running[slot]
        *request.said, request.count = row
        request.length += 1 + request.count
        return request.said[: request.count + 1]


def make_engine(
    settings: Settings,
    device: str,
    folder: str = "",
    layers: int | None = None,
    rank: int = 0,
    speculate: bool = True,
) -> Engine:
    """An engine with weights from `folder`, or random ones.

    Args:
        folder: folder of a safetensors checkpoint; empty for random weights.
        layers: number of decoder layers instead of all, for trials.
        rank: which part of the weights to load, with `settings.tp` > 1.
        speculate: see `Engine`.

    Raises:
        DeclarationError: see `weights.read`.
    """
    made = modules.make(settings, device, layers)
    if folder:
        weights.read(made, settings, folder, rank)
    return Engine(Model(made, settings, device), speculate=speculate)
