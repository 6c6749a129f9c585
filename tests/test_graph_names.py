"""The names in a graph's pickles, imports and bytecode: those that this release of torch writes are allowed, gadgets are not."""

from __future__ import annotations

import builtins
import collections
import dataclasses
import enum
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts import need
from dynamo_calls import compiled_by_dynamo

from aot_cache.errors import Untrusted
from aot_cache.upstream.codec import code_bytes, graph_names
from aot_cache.upstream.hooks import inductor_artifact

Pair = collections.namedtuple("Pair", "one two")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4), requires_grad=False)
        self.factors = {"one": 2.0}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x) * self.weight * self.factors["one"]


LAYER = Layer()


def plain(x: torch.Tensor) -> torch.Tensor:
    return LAYER(x)


def with_views(x: torch.Tensor) -> Any:
    x.mul_(2)
    return Pair(x[1:], x.sum()), x.shape[0] * 2, {"view": x.transpose(0, 1)}


def with_a_break(x: torch.Tensor) -> torch.Tensor:
    y, device, dtype = x * 2, x.device, x.dtype
    torch._dynamo.graph_break()
    return y.to(device, dtype)


def random(x: torch.Tensor) -> torch.Tensor:
    return torch.rand_like(x) + torch.full(x.shape, float(x.size(0)))


CALLS = [plain, with_views, with_a_break, random]


@pytest.mark.contract("graph_names")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_what_this_release_writes_is_allowed(call: Callable[..., Any], dynamic: bool) -> None:
    """Compiled by the real Inductor, for this CPU."""
    torch._dynamo.reset()
    artifacts: list[bytes] = []

    def keep(wrapper: Any, backend: Any, graph: Any, inputs: Any, **kwargs: Any) -> Any:
        artifacts.append(inductor_artifact.compile_graph(wrapper, backend, graph, inputs, **kwargs))
        return graph.forward

    x = torch.ones(3, 4)
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    with torch.inference_mode(), inductor_artifact.instead(keep):
        kept = compiled_by_dynamo(call, x, backend="inductor")
    need(len(artifacts) > 0 and len(kept.frames) > 0, "nothing was compiled")
    for data in artifacts:
        graph_names.require_pickle(data, "an artifact")
    for made, frame in kept.frames:
        graph_names.require_pickle(made.guards, "guards")
        graph_names.require_modules(made.imports.values(), "a graph")
        assert made.dynamo_code is not None
        graph_names.require_code(made.dynamo_code, frame.code, "bytecode")
        for code, _ in made.resumes.values():
            graph_names.require_code(code, frame.code, "a resume function")


@dataclasses.dataclass
class Scale:
    """As tensor subclasses hold them."""

    power: int = 1


class Kind(enum.Enum):
    FLAT = 1


class Ours(torch.Tensor): ...


ALLOWED: list[Any] = [
    Ours,
    Scale(),
    Kind.FLAT,
    Pair(1, 2),
    torch.float32,
    torch.strided,
    torch.channels_last,
    torch.Size([2]),
]


@pytest.mark.parametrize("value", ALLOWED, ids=str)
def test_users_tensors_and_what_they_hold(value: Any) -> None:
    graph_names.require_pickle(pickle.dumps(value), "it")


class Runs:
    """Pickled as a call of `function`."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


def _helper() -> None: ...


REFUSED: dict[str, Any] = {
    "os.system": Runs(os.system, "true"),
    "eval": Runs(eval, "1"),
    "exec": Runs(exec, ""),
    "import": Runs(builtins.__import__, "os"),
    "open": Runs(open, os.devnull),
    "a process": Runs(__import__("subprocess").Popen, ["true"]),
    "a function of torch": Runs(torch.load, "x"),
    "a function of a user": Runs(_helper),
    "compiled C++": Runs(__import__("torch.utils.cpp_extension", fromlist=["load"]).load, "x", []),
    "an attribute of what may be named": Runs(getattr, Runs(getattr, torch.Size, "count"), "__globals__"),
    "an attribute by itself": Runs(getattr, Scale(), "power"),
    "deep inside": [{"one": (Runs(os.system, "true"),)}],
    "in a state": collections.OrderedDict(a=collections.deque([Runs(os.system, "true")])),
    "a method": torch.Tensor.numpy,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_no_graph_names(what: str) -> None:
    with pytest.raises(Untrusted, match=r"names .*, which no graph contains"):
        graph_names.require_pickle(pickle.dumps(REFUSED[what]), "it")


@pytest.mark.parametrize("protocol", range(6))
def test_no_protocol_hides_a_name(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "ran"
    data = pickle.dumps(Runs(os.system, f"touch {mark}"), protocol)
    with pytest.raises(Untrusted, match="system"):
        graph_names.require_pickle(data, "it")
    assert not mark.exists()


OPCODES = {
    "INST": b"(S'true'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'true'\no.",
    "a dotted name": b"\x80\x04\x8c\x14torch._dynamo.guards\x8c\tos.system\x93.",
    "a method of a guard's class": b"\x80\x04\x8c\x14torch._dynamo.guards\x8c\x22GuardBuilder.__init__.__globals__.g\x93.",
    "a type of code": b"\x80\x04\x8c\x05types\x8c\x08CodeType\x93.",
    "a module": b"\x80\x04\x8c\x05types\x8c\x0aModuleType\x93.",
    "torch's own functions": b"\x80\x04\x8c\x0ctorch._utils\x8c\x0atorch.load\x93.",
    "a class in a function of a data module": b"\x80\x04\x8c\x0dtorch._guards\x8c\x10detect_fake_mode\x93.",
}


@pytest.mark.parametrize("what", OPCODES)
def test_no_opcode_hides_a_name(what: str) -> None:
    with pytest.raises(Untrusted):
        graph_names.require_pickle(OPCODES[what], "it")


@pytest.mark.parametrize(
    "data", [b"", b"x", b"\x80\x04", b"\x80\x04N", b"\x80\x04\x8c\xffx.", b"\x80\x04\x97.", b"\x80\x04h\x00."]
)
def test_what_is_no_pickle(data: bytes) -> None:
    with pytest.raises(Untrusted, match="cannot be unpickled"):
        graph_names.require_pickle(data, "it")


def test_modules() -> None:
    graph_names.require_modules(["torch.nn.modules.linear", "torch.not_there_yet", "json"], "a graph")
    for strange in ("antigravity", "xmlrpc.server", "not_installed"):
        with pytest.raises(Untrusted, match=f"imports {strange}, which this process has not imported"):
            graph_names.require_modules(["torch", strange], "a graph")


def test_a_function_that_opens_files_may_do_so() -> None:
    def opens(path: str) -> Any:
        return open(path)

    graph_names.require_code(opens.__code__, opens.__code__, "bytecode")
    with pytest.raises(Untrusted, match="has open"):
        graph_names.require_code(opens.__code__, plain.__code__, "bytecode")


def test_an_import_in_nested_code() -> None:
    def outer() -> Any:
        def inner() -> None:
            import os  # noqa: F401

        return inner

    with pytest.raises(Untrusted, match="has an import"):
        graph_names.require_code(outer.__code__, outer.__code__, "bytecode")


def test_a_constant_that_is_no_enum() -> None:
    code = plain.__code__.replace(co_consts=(("aot-cache: stands for", "enum", "os", "environ", "HOME"),))
    with pytest.raises(ValueError, match="no enum"):
        code_bytes.load(code_bytes.marshal.dumps(code, 2))
    code = plain.__code__.replace(co_consts=(("aot-cache: stands for", "enum", "antigravity", "x", "y"),))
    with pytest.raises(Untrusted, match="imports antigravity"):
        code_bytes.load(code_bytes.marshal.dumps(code, 2))
