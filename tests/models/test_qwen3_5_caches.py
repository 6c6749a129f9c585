"""The static caches take what any release of transformers hands to a cache's `update`, and do the same with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from aot_cache.models.qwen3_5 import compiled_layers

CALLS: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], Any]] = {
    "to 5.23": lambda cache, k, v: cache.update(k, v, 3),
    "5.24": lambda cache, k, v: cache.update(k, v, 3, kwargs={"anything": 1}),
    "by name": lambda cache, k, v: cache.update(k, v, layer_idx=3, cache_kwargs=None, more=()),
    "earlier": lambda cache, k, v: cache.update(k, v, 3, {"cos": None}),
}


@pytest.mark.parametrize("slot", [False, True])
@pytest.mark.parametrize("call", CALLS)
def test_what_an_update_is_handed(call: str, slot: bool) -> None:
    keys, values = torch.zeros(2, 4, 2, 8, 3)
    places = torch.tensor([[1, 2]])
    cache: Any = (
        compiled_layers._OneSlot(keys, values, places, torch.tensor([2]))
        if slot
        else compiled_layers._Slots(keys, values, places)
    )
    k, v = torch.randn(2, 1, 2, 2, 3)
    found_k, found_v = CALLS[call](cache, k, v)
    at = 2 if slot else 0
    assert keys[at, :, 1:3].equal(k[0]) and values[at, :, 1:3].equal(v[0])
    assert found_k.equal(keys[at : at + 1]) and found_v.equal(values[at : at + 1])
    assert keys.count_nonzero() == k.numel()
