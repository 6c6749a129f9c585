"""Compiled functions called as users call them: one case each, named after what is odd about it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from aot_cache import Call, Range, Recipe, declare, device

CASES: list[Any] = []


def rows(n: int, width: int = 8) -> torch.Tensor:
    return torch.randn(n, width, device=device())


def case(make: Callable[[int], Call]) -> Callable[[int], Call]:
    """Declare a case for 2 to 4 rows."""
    CASES.append(declare(name=make.__name__, n=Range(2, 4), mode="inference")(make))
    return make


# --- containers ---------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


@dataclasses.dataclass
class Batch:
    x: torch.Tensor
    scale: float
    names: tuple[str, ...] = ()


@torch.compile
def of_caches(x: Any, caches: Any) -> Any:
    for cache in caches:
        cache[: x.shape[0]].copy_(x)
    return x + caches[2].sum()


@torch.compile
def of_pair(pair: Any) -> Any:
    return pair.a * 2 + pair.b


@torch.compile
def of_batch(batch: Any) -> Any:
    return batch.x * batch.scale + len(batch.names)


@torch.compile
def of_dict(given: Any) -> Any:
    return given["x"] + given["more"]["y"][0]


@torch.compile
def of_sizes(x: Any, sizes: Any) -> Any:
    return [part.sum(0) for part in x.split(sizes)]


@case
def list_of_caches(n: int) -> Call:
    return Call(of_caches, rows(n, 4), [torch.zeros(16, 4, device=device()) for _ in range(3)])


@case
def tuple_of_caches(n: int) -> Call:
    return Call(of_caches, rows(n, 4), tuple(torch.zeros(16, 4, device=device()) for _ in range(3)))


@case
def named_tuple(n: int) -> Call:
    return Call(of_pair, Pair(rows(n), rows(n)))


@case
def data_class(n: int) -> Call:
    return Call(of_batch, Batch(rows(n), 2.5, ("a", "b")))


@case
def nested_dict(n: int) -> Call:
    return Call(of_dict, {"x": rows(n), "more": {"y": [rows(n)]}})


@case
def list_of_sizes(n: int) -> Call:
    return Call(of_sizes, rows(n + 3), [n, 3])


# --- ways to call and to compile ----------------------------------------------------------------------------------------


def logged(function: Any) -> Any:
    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return inner


@torch.compile(dynamic=True)
def of_any(*args: Any, **named: Any) -> Any:
    return args[0] * 2 + named.get("b", 0)


@logged
def with_defaults(x: Any, scale: int = 3, bias: Any = None) -> Any:
    return x * scale if bias is None else x * scale + bias


class Scale:
    def __init__(self, k: float) -> None:
        self.k = k

    def __call__(self, x: Any) -> Any:
        return x * self.k + 1

    @torch.compile
    def method(self, x: Any) -> Any:
        return x - self.k


@torch.compile
def inner_function(x: Any) -> Any:
    return x.sin()


@torch.compile
def outer_function(x: Any) -> Any:
    return inner_function(x) + 1


@torch.compile
@logged
def under_wraps(x: Any) -> Any:
    return x + 1


partly = torch.compile(functools.partial(torch.addcmul, value=0.5))
decorated = torch.compile(with_defaults, dynamic=True)
scaled, scale = torch.compile(Scale(3.0)), Scale(4.0)


@case
def star_args(n: int) -> Call:
    return Call(of_any, rows(n), b=rows(n))


@case
def partial(n: int) -> Call:
    return Call(partly, rows(n), rows(n), rows(n))


@case
def decorator_over_defaults(n: int) -> Call:
    return Call(decorated, rows(n), bias=rows(n))


@case
def decorator_around(n: int) -> Call:
    return Call(under_wraps, rows(n))


@case
def callable_object(n: int) -> Call:
    return Call(scaled, rows(n))


@case
def method(n: int) -> Call:
    return Call(scale.method, rows(n))


@case
def nested_functions(n: int) -> Call:
    return Call(outer_function, rows(n))


# --- modules ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, compiled_inside: bool = False) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8, device=device()).requires_grad_(False)
        self.caches = [torch.zeros(16, 8, device=device()) for _ in range(2)]
        if compiled_inside:
            self.a.forward = torch.compile(self.a.forward)  # type: ignore[method-assign]

    def forward(self, x: Any) -> Any:
        for cache in self.caches:
            cache[: x.shape[0]].copy_(x)
        return self.a(x).relu() + self.caches[1].sum()


@case
def compiled_module(n: int) -> Call:
    return Call(torch.compile(Net().eval()), rows(n))


@case
def module_compiles_itself(n: int) -> Call:
    net = Net().eval()
    net.compile()
    return Call(net, rows(n))


@case
def compiled_forward(n: int) -> Call:
    net = Net().eval()
    net.forward = torch.compile(net.forward)  # type: ignore[method-assign]
    return Call(net, rows(n))


@case
def compiled_layer_in_compiled_module(n: int) -> Call:
    return Call(torch.compile(Net(compiled_inside=True).eval()), rows(n))


@case
def module_of_torch(n: int) -> Call:
    layers = nn.Sequential(nn.Linear(8, 8, device=device()), nn.ReLU()).requires_grad_(False)
    return Call(torch.compile(layers), rows(n))


# --- what Dynamo traces -------------------------------------------------------------------------------------------------


@torch.compile(fullgraph=True)
def of_cond(x: Any, flag: Any) -> Any:
    return torch.cond(flag, lambda a: a.sin(), lambda a: a.cos(), (x,))


@torch.compile(fullgraph=True)
def of_loop(x: Any, k: Any) -> Any:
    loop: Any = torch._higher_order_ops.while_loop
    return loop(lambda i, a: i < 3, lambda i, a: (i + 1, a * 2), (k, x))


@torch.compile
def of_vmap(x: Any) -> Any:
    return torch.func.vmap(lambda row: row.softmax(-1))(x)


@torch.compile
def of_numpy(x: Any) -> Any:
    return torch.from_numpy(np.sin(x.numpy()))


@torch.compile
def doubled(x: Any) -> Any:
    return x * 2


@torch.compile
def of_linear(x: Any, w: Any) -> Any:
    return x @ w


@torch.compile
def gives_back(x: Any) -> Any:
    return x, x[:1], x.add_(1)


def relative(score: Any, _b: Any, _h: Any, q: Any, k: Any) -> Any:
    return score + (q - k)


flex = torch.compile(flex_attention, dynamic=True)


@case
def cond(n: int) -> Call:
    return Call(of_cond, rows(n), torch.tensor(n % 2 == 0, device=device()))


@case
def while_loop(n: int) -> Call:
    return Call(of_loop, rows(n), torch.tensor(0, device=device()))


@case
def flex_attention_with_a_score(n: int) -> Call:
    q, k, v = (torch.randn(1, 2, n + 1, 16, device=device()) for _ in range(3))
    return Call(flex, q, k, v, relative)


@case
def vmap(n: int) -> Call:
    return Call(of_vmap, rows(n))


@case
def numpy(n: int) -> Call:
    return Call(of_numpy, rows(n))


def marks(x: Any) -> Any:
    torch._dynamo.mark_dynamic(x, 0)
    return doubled(x)


def may_mark(x: Any) -> Any:
    torch._dynamo.maybe_mark_dynamic(x, 0)
    return doubled(x)


def marks_unbacked(x: Any) -> Any:
    decorators: Any = torch._dynamo.decorators
    decorators.mark_unbacked(x, 0)
    return doubled(x)


def under_autocast(x: Any, w: Any) -> Any:
    with torch.autocast(x.device.type, torch.bfloat16):
        return of_linear(x, w)


@case
def mark_dynamic(n: int) -> Call:
    return Call(marks, rows(n))


@case
def maybe_mark_dynamic(n: int) -> Call:
    return Call(may_mark, rows(n))


@case
def mark_unbacked(n: int) -> Call:
    return Call(marks_unbacked, rows(n))


@case
def autocast_around(n: int) -> Call:
    return Call(under_autocast, rows(n), rows(8))


@case
def inputs_given_back(n: int) -> Call:
    return Call(gives_back, rows(n))


@case
def aliased_inputs(n: int) -> Call:
    x = rows(n)
    return Call(of_pair, Pair(x, x))


recipe = Recipe("users-calls", CASES)
NOT_CAPTURED = ("cond", "while_loop", "numpy")
"""What reads values on the host, or needs them there."""
captured = Recipe("users-calls", [one for one in CASES if one.name not in NOT_CAPTURED])
