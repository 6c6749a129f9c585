"""Values that SGLang copies between its buffers by a kernel of its own, which host code reads afterwards.

Upstream, in SGLang: `sglang/kernels/ops/memory/small_copy.py` (`try_small_copy`: one launch instead of a `copy_` for each pair;
not in 0.5.16).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import Any

from aot_cache.upstream.virtual.torch_tensor import VirtualTensor

COPIES = "sglang.kernels.ops.memory.small_copy"


def follow() -> None:
    """Keep the values of small tensors that SGLang copies. To be called once its kernels can be imported."""
    with contextlib.suppress(ImportError):
        module: Any = importlib.import_module(COPIES)
        module.try_small_copy = _following(module.try_small_copy)


def _following(original: Any) -> Any:
    def try_small_copy(dsts: Sequence[Any], srcs: Sequence[Any]) -> Any:
        before = [to.shared_.lost if isinstance(to, VirtualTensor) else False for to in dsts]
        launched = original(dsts, srcs)
        if launched:
            for to, source, lost in zip(dsts, srcs, before):
                if isinstance(to, VirtualTensor):
                    to.shared_.lost = lost  # what the kernel writes is known, after all
                to.copy_(source)
        return launched

    return try_small_copy
