"""What models' host code does beside launching: it asks about the device, makes pinned tensors, builds modules, draws weights.

Each takes the device, and returns what it made, of which shapes and types are looked at. Nothing of aot-cache is in here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Code = Callable[[str], Any]

# --- streams, events, generators and what libraries ask at import -------------------------------------------------------


def _waits(device: str) -> None:
    done, copies = torch.cuda.Event(enable_timing=True, blocking=True), torch.cuda.Stream(priority=-1)
    with torch.cuda.stream(copies):
        assert torch.cuda.current_stream() == copies
        done.record()
    with torch.cuda.stream(None):
        torch.cuda.current_stream().wait_event(done)
    copies.wait_stream(torch.cuda.default_stream())
    copies.record_event(done).synchronize()
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != copies
    assert done.query() and copies.query() and isinstance(copies, torch.Stream) and isinstance(done, torch.Event)


def _plain_streams(device: str) -> None:
    done, copies = torch.Event(device, enable_timing=True), torch.Stream(device=device)
    with copies:
        done.record(copies)
        assert torch.accelerator.current_stream() == copies
    torch.accelerator.current_stream().wait_event(done)


def _keeps_for_a_stream(device: str) -> None:
    torch.empty(3, device=device).record_stream(torch.cuda.Stream())


def _asks_the_accelerator(device: str) -> None:
    found = torch.accelerator.current_accelerator()
    assert found is not None and found.type == device and torch.accelerator.is_available()
    assert torch.accelerator.device_count() == 1 and torch.accelerator.current_device_index() == 0
    torch.accelerator.set_device_index(0)
    torch.accelerator.synchronize()


def _asks_for_memory(device: str) -> None:
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() == torch.cuda.memory_reserved() == 0


def _asks_for_the_raw_stream(device: str) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        assert torch._C._cuda_getCurrentRawStream(0)
    assert torch._C._cuda_getCurrentRawStream(0) == 0


def _seeds(device: str) -> Any:
    torch.manual_seed(3)
    torch.cuda.manual_seed_all(3)
    torch.cuda.set_rng_state(torch.cuda.get_rng_state())
    with torch.random.fork_rng():
        generator = torch.Generator(device=device).manual_seed(3)
        assert generator.device.type == device
        return torch.randn(3, device=device, generator=generator)


DEVICE: dict[str, Code] = {
    "events and streams": _waits,
    "events by position": lambda device: torch.cuda.Event(True).record(),
    "a stream of another library": lambda device: torch.cuda.ExternalStream(77).cuda_stream,
    "priorities": lambda device: torch.cuda.Stream.priority_range(),
    "torch.Event and torch.Stream": _plain_streams,
    "record_stream": _keeps_for_a_stream,
    "torch.accelerator": _asks_the_accelerator,
    "memory": _asks_for_memory,
    "the raw stream": _asks_for_the_raw_stream,
    "seeds and generators": _seeds,
}
"""Asks the device; on a CPU there is nothing to ask."""


# --- memory that is pinned ----------------------------------------------------------------------------------------------

PINNED: dict[str, Code] = {
    "empty": lambda device: torch.empty(3, pin_memory=True),
    "zeros": lambda device: torch.zeros(3, dtype=torch.int32, pin_memory=True, device="cpu"),
    "ones": lambda device: torch.ones(2, 3, pin_memory=True),
    "full": lambda device: torch.full((3,), 2, pin_memory=True),
    "arange": lambda device: torch.arange(3, pin_memory=True),
    "eye": lambda device: torch.eye(3, pin_memory=True),
    "linspace": lambda device: torch.linspace(0, 1, 3, pin_memory=True),
    "rand": lambda device: torch.rand(3, pin_memory=True),
    "randn": lambda device: torch.randn(3, pin_memory=True),
    "randint": lambda device: torch.randint(3, (3,), pin_memory=True),
    "randperm": lambda device: torch.randperm(3, pin_memory=True),
    "empty_strided": lambda device: torch.empty_strided((3, 2), (1, 3), pin_memory=True),
    "empty_like": lambda device: torch.empty_like(torch.ones(3), pin_memory=True),
    "empty_like of a CUDA tensor": lambda device: torch.empty_like(
        torch.ones(3, device=device), device="cpu", pin_memory=True
    ),
    "new_empty": lambda device: torch.ones(3).new_empty(2, pin_memory=True),
    "new_zeros of a CUDA tensor": lambda device: torch.ones(3, device=device).new_zeros(
        2, device="cpu", pin_memory=True
    ),
    "pin_memory()": lambda device: torch.ones(3).pin_memory(),
}
FROM_DATA: dict[str, Code] = {
    "tensor": lambda device: torch.tensor([1, 2], dtype=torch.int32, pin_memory=True),
}
"""Its C++ looks at no mode: only where no graph is traced."""


# --- modules ------------------------------------------------------------------------------------------------------------


def _moves(module: nn.Module, device: str) -> Any:
    """What is done to modules: moved, cast, copied, loaded; what held a parameter holds the one that moved."""
    tied = next(module.parameters(), None)
    module = module.to(device).to(torch.bfloat16).to(device, torch.float32)
    assert tied is None or tied is next(module.parameters())
    again = copy.deepcopy(module)
    again.load_state_dict(module.state_dict())
    again.load_state_dict(module.state_dict(), assign=True)
    return {**module.state_dict(), **{f"again.{name}": value for name, value in again.state_dict().items()}}


def _made(name: str, *sizes: Any) -> dict[str, Code]:
    make = getattr(nn, name)
    return {
        f"{name}, moved": lambda device: _moves(make(*sizes), device),
        f"{name} on the device": lambda device: _moves(make(*sizes, device=device), device),
        f"{name} on meta": lambda device: make(*sizes, device="meta").to_empty(device=device).state_dict(),
    }


def _tied(device: str) -> Any:
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["embed"].weight
    model.to(device)
    assert model["head"].weight is model["embed"].weight
    return model["head"](model["embed"](torch.zeros(3, dtype=torch.int64, device=device)))


def _sets_data(device: str) -> Any:
    weight = nn.Parameter(torch.ones(3, 2))
    weight.loader = print  # type: ignore[attr-defined]  # engines put such on their weights
    weight.data = weight.data.to(device, torch.bfloat16)
    assert isinstance(weight, nn.Parameter) and weight.loader is print and weight.requires_grad  # type: ignore[attr-defined]
    weight.data = torch.empty(5, device=device)
    return weight


def _by_default(device: str) -> Any:
    with torch.device(device):
        return nn.Linear(3, 3).state_dict(), nn.Embedding(3, 3).weight, torch.tensor([3]), torch.ones(3)


MODULES: dict[str, Code] = {
    **_made("Linear", 4, 4),
    **_made("Bilinear", 4, 4, 4),
    **_made("Conv1d", 4, 4, 3),
    **_made("Conv2d", 4, 4, 3),
    **_made("Conv3d", 4, 4, 3),
    **_made("ConvTranspose2d", 4, 4, 3),
    **_made("Embedding", 4, 4),
    **_made("EmbeddingBag", 4, 4),
    **_made("LayerNorm", 4),
    **_made("RMSNorm", 4),
    **_made("GroupNorm", 2, 4),
    **_made("BatchNorm1d", 4),
    **_made("BatchNorm2d", 4),
    **_made("LSTM", 4, 4),
    **_made("GRU", 4, 4),
    **_made("LSTMCell", 4, 4),
    **_made("MultiheadAttention", 4, 2),
    **_made("TransformerEncoderLayer", 4, 2),
    **_made("TransformerDecoderLayer", 4, 2),
    **_made("PReLU"),
    **_made("AdaptiveLogSoftmaxWithLoss", 4, 8, [2]),
    "tied weights": _tied,
    "data of a parameter": _sets_data,
    "the default device": _by_default,
    "weight_norm": lambda device: nn.utils.parametrizations.weight_norm(nn.Linear(4, 4).to(device)).weight,
    "a forward": lambda device: nn.Linear(4, 2).to(device).requires_grad_(False)(torch.ones(3, 4, device=device)),
    "a forward of attention": lambda device: (
        nn.MultiheadAttention(4, 2).to(device).requires_grad_(False)(*[torch.ones(3, 4, device=device)] * 3)
    ),
    "constants on the device": lambda device: torch.ones(4, 2, device=device).index_select(
        0, torch.tensor([3, 1], device=device)
    ),
    "experts": lambda device: nn.functional.grouped_mm(
        torch.ones(8, 16, device=device, dtype=torch.bfloat16),
        torch.ones(2, 32, 16, device=device, dtype=torch.bfloat16).transpose(1, 2),
        offs=torch.tensor([4, 8], device=device, dtype=torch.int32),
    ),
}
NUMBERED: dict[str, Code] = {
    "to(0)": lambda device: nn.Linear(4, 4).to(0).weight,
    "cuda(0)": lambda device: nn.Linear(4, 4).cuda(0).weight,
    "cuda()": lambda device: nn.Linear(4, 4).cuda().weight,
}
"""A device by its number, which no CPU has."""


# --- weights ------------------------------------------------------------------------------------------------------------


def _drawn(name: str, *more: Any) -> dict[str, Code]:
    shape = (8, 8, 3) if name == "dirac_" else (8, 8)
    # bfloat16 has no QR decomposition anywhere.
    dtypes = (torch.float32,) if name == "orthogonal_" else (torch.float32, torch.bfloat16)

    def draw(device: str) -> Any:
        init, made = getattr(nn.init, name), []
        for dtype in dtypes:
            made.append(init(torch.empty(shape, device=device, dtype=dtype), *more))
            made.append(init(nn.Parameter(torch.empty(shape, device=device, dtype=dtype)), *more))
        return made

    return {f"{name}{more or ''}": draw}


INIT: dict[str, Code] = {
    **_drawn("uniform_"),
    **_drawn("normal_", 0.0, 0.02),
    **_drawn("trunc_normal_", 0.0, 0.02),
    **_drawn("trunc_normal_", 2.5, 1.0, -2.0, 2.0),
    **_drawn("constant_", 1.0),
    **_drawn("ones_"),
    **_drawn("zeros_"),
    **_drawn("eye_"),
    **_drawn("dirac_"),
    **_drawn("xavier_uniform_"),
    **_drawn("xavier_normal_"),
    **_drawn("kaiming_uniform_"),
    **_drawn("kaiming_normal_"),
    **_drawn("orthogonal_"),
    **_drawn("sparse_", 0.5),
}
