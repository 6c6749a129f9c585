"""A process that becomes one in which graphs are made, and runs each kind of host code there: `fake_host.py TARGET`.

Prints {mode: {kind: what was made, as the CPU makes it, or why it was not}}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import host_code
import torch
from torch.utils import _pytree as pytree

from aot_cache.artifact import target as targets
from aot_cache.upstream.virtual import inductor_target, torch_fake

MODES: dict[str, Any] = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


def facts(made: Any, device: str) -> list[Any]:
    tensors = [value for value in pytree.tree_leaves(made) if isinstance(value, torch.Tensor)]
    return [
        [list(t.shape), list(t.stride()), str(t.dtype), t.device.type.replace(device, "here"), t.requires_grad]
        for t in tensors
    ]


def told(code: host_code.Code, device: str, mode: Any, real: Any) -> str:
    """Empty where it makes what the CPU makes."""
    try:
        with torch_fake.host_mode(device), mode():
            found = facts(code(device), device)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "" if real is None or found == real else f"{found} and not {real}"


def main(target: str) -> None:
    device = "cpu" if target == "cpu" else "cuda"
    codes = {**host_code.MODULES, **host_code.INIT}
    real = {}
    for mode in MODES:
        with MODES[mode]():
            real[mode] = {kind: facts(code("cpu"), "cpu") for kind, code in codes.items()}
    inductor_target.become(targets.get(target))
    said = {
        mode: {kind: told(code, device, MODES[mode], real[mode][kind]) for kind, code in codes.items()}
        for mode in MODES
    }
    if device != "cpu":
        for mode in MODES:
            more = {**host_code.DEVICE, **host_code.PINNED, **host_code.NUMBERED}
            said[mode] |= {kind: told(code, device, MODES[mode], None) for kind, code in more.items()}
    print(json.dumps(said))


if __name__ == "__main__":
    main(sys.argv[1])
