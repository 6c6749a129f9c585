"""Shape rules for operators in C++ that have none, because their engine never traces them.

Upstream: `torch/library.py` (`register_fake`), `torch/_ops.py` (an operator is an attribute of its namespace, if it is there).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch


def add(rules: Mapping[str, Callable[..., Any]]) -> None:
    """Register the rules of those operators that are here and have none.

    Args:
        rules: `namespace::name` → a function with the operator's arguments, which makes a tensor for each of its results.
    """
    for name, rule in rules.items():
        if operator(name) is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Meta"):
            torch.library.register_fake(name, rule)


def operator(name: str) -> Any:
    """The operator `namespace::name`; None if no library here has it."""
    space, _, own = name.partition("::")
    with contextlib.suppress(AttributeError, RuntimeError):
        return getattr(getattr(torch.ops, space), own).default
    return None


def same(tensor: Any) -> torch.Tensor:
    """The rule of an operator whose result is as its argument."""
    seen: torch.Tensor = tensor.new_empty_strided(tensor.shape, tensor.stride())
    return seen
