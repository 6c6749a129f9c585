"""Process-wide settings of torch on which graphs are guarded, as data: read where a call is recorded, set where it is made again.

Upstream: what Dynamo's guard on the global state compares (`torch/csrc/dynamo/guards.cpp`, `GlobalStateGuard`). torch has no
public function that says which device autocast is on for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

Json = Any
_SETTINGS: dict[str, tuple[Callable[[], Json], Callable[[Any], Any], Json]] = {
    "float32_matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    "deterministic_algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
        False,
    ),
    "default_dtype": (
        lambda: str(torch.get_default_dtype()).removeprefix("torch."),
        lambda name: torch.set_default_dtype(getattr(torch, name)),
        "float32",
    ),
}
"""Name → how it is read and set, and torch's default."""


def changed() -> dict[str, Json]:
    """The settings that differ from torch's defaults."""
    now = {name: read() for name, (read, _, _) in _SETTINGS.items()}
    return {name: value for name, value in now.items() if value != _SETTINGS[name][2]}


def set_all(settings: Mapping[str, Json]) -> None:
    """Set what `changed` found in another process."""
    for name, value in settings.items():
        _SETTINGS[name][1](value)


def autocast() -> str:
    """The dtype under which autocast is on; empty if it is off."""
    for device in ("cuda", "cpu"):
        if torch.is_autocast_enabled(device):
            return str(torch.get_autocast_dtype(device)).removeprefix("torch.")
    return ""
