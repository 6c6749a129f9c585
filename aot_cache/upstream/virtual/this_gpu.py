"""Which GPU of the virtual machine this process has: each rank of an engine has its own, with its own number, as on a server.

Graphs that an engine compiles and saves itself have that number in their code.

Upstream: `torch/cuda/__init__.py` (`current_device`, `device_count`), which the modules beside this one answer from here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_device = torch.device("cuda", 0)
_count = 1


def become(number: int, count: int) -> None:
    """Have GPU `number` of `count`. To be called before anything else of this room. Not undone."""
    global _device, _count
    _device, _count = torch.device("cuda", number), count


def device() -> torch.device:
    """The GPU, with its number."""
    return _device


def number() -> int:
    """Its number."""
    return int(_device.index)


def always(number: int) -> Callable[..., int]:
    """A function that answers with the number, whatever it is given. The number is a constant in its code: Dynamo inlines it, and
    would guard a variable."""
    made: Callable[..., int] = eval(f"lambda *_: {number:d}", {})  # noqa: S307  # of a number
    return made


def count() -> int:
    """How many GPUs the machine has."""
    return _count
