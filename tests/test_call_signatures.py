"""aot_cache.builder.call_signatures: which sizes of a compiled function's arguments change, and which calls are alike.

Calls are written down by hand (`Frame`), with real tensors on the CPU; nothing is traced or compiled.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aot_cache.builder.call_signatures import CallSignature, CallTrace, follows, seen_call
from aot_cache.misses.call_signature import Leaf, leaves, structure_of
from aot_cache.upstream.hooks.dynamo_frames import Frame

WRAPPING = {"backend": "inductor", "options": {}, "dynamic": None}
Function = Callable[..., Any]


def frame(function: Function, *args: Any, wrapping: Any = WRAPPING, module: str = "model", **named: Any) -> Frame:
    """The call `function(*args, **named)` as Dynamo sees it."""
    given = inspect.signature(function).bind(*args, **named)
    return Frame(function.__code__, {"__name__": module}, dict(given.arguments), wrapping, False)


def surveyed(*points: Frame | Sequence[Frame], mode: str = "inference") -> CallTrace:
    """What is known when each of `points` was run: the calls made there, or the only one."""
    survey = CallTrace()
    for number, calls in enumerate(points):
        several = [calls] if isinstance(calls, Frame) else calls
        survey.add([seen_call(call, mode) for call in several], number)
    return survey


def kinds_of(*points: Frame | Sequence[Frame], case: int = 0) -> list[CallSignature]:
    return list(surveyed(*points).signatures(case).values())


def fits(signature: CallSignature, call: Frame, mode: str = "inference") -> bool:
    return signature.fits(*structure_of(call, mode))


def f(x: Any) -> None: ...
def g(x: Any, k: Any) -> None: ...


def t(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


# --- sizes ------------------------------------------------------------------------------------------------------------


def test_a_size_that_is_always_the_same_is_static() -> None:
    (signature,) = kinds_of(frame(f, t(4, 8)), frame(f, t(4, 8)))
    assert signature.sizes == [[4, 8]] and signature.dynamic() == {} and signature.points == {0: [0, 1]}


def test_a_size_that_changes_is_dynamic_between_its_bounds() -> None:
    (signature,) = kinds_of(*(frame(f, t(n, 8)) for n in (5, 2, 9)))
    assert signature.sizes == [[[2, 9], 8]]
    assert signature.dynamic() == {"L['x']": [[0, 2, 9]]}
    assert signature.points == {0: [0, 1, 2]}


def test_several_sizes_that_change() -> None:
    (signature,) = kinds_of(*(frame(g, t(n, 8, 2 * n), n * 10) for n in (3, 2)))
    assert signature.dynamic() == {"L['x']": [[0, 2, 3], [2, 4, 6]], "L['k']": [[-1, 20, 30]]}


def test_how_sizes_follow_is_told_over_all_values_of_a_case() -> None:
    """Each of `Values` is surveyed alone, and is a signature of its own."""
    points = [{"n": n, "heads": heads} for heads in (16, 32) for n in (2, 3, 5)]
    traces = [CallTrace(), CallTrace()]
    for number, point in enumerate(points):
        survey = traces[number // 3]
        sizes = ((2 * point["n"], point["heads"], width) for width in (8, 9))  # two places that make such a call
        calls = [frame(g, t(*size), point["n"] + 1) for size in sizes]
        survey.add([seen_call(call, "inference") for call in calls], number)
    signature = next(iter(traces[1].signatures(0).values()))
    found = follows(traces, points)
    assert [found[signature.structure, n]["L['x']"] for n in (0, 1)] == [
        [[0, 2, "n"], [0, 1, "heads"], [w]] for w in (8, 9)
    ]
    assert found[signature.structure, 0]["L['k']"] == [[1, 1, "n"]] and signature.places == {0: {0}}


def test_sizes_that_are_the_model_s_own_follow_from_nothing() -> None:
    layer = Layer()
    survey = surveyed(frame(Layer.forward, layer, t(3)), frame(Layer.forward, layer, t(4)))
    (relations,) = follows([survey], [{"n": 3}, {"n": 4}]).values()
    assert relations["L['x']"] == [[0, 1, "n"]] and not any("_parameters" in path for path in relations)


def test_a_call_that_was_written_down_is_of_a_kind() -> None:
    (signature,) = kinds_of(*(frame(g, t(n, 8), n) for n in (2, 9)))
    assert signature.takes(signature.structure, {"L['x']": [5, 8], "L['k']": [6]})
    assert not signature.takes("another", {"L['x']": [5, 8], "L['k']": [6]})
    for sizes in ([10, 8], [1, 8], [5, 9], [5], [5, 8, 1]):
        assert not signature.takes(signature.structure, {"L['x']": sizes})
    assert not signature.takes(signature.structure, {"L['y']": [5, 8]})


def test_an_integer_changes_like_a_size() -> None:
    (signature,) = kinds_of(*(frame(g, t(4), n) for n in (7, 3)))
    assert signature.integer == [True, False] or signature.integer == [False, True]
    assert signature.dynamic() == {"L['k']": [[-1, 3, 7]]}
    assert fits(signature, frame(g, t(4), 5)) and not fits(signature, frame(g, t(4), 8))


@pytest.mark.parametrize("special", [0, 1])
def test_zero_and_one_make_kinds_of_their_own(special: int) -> None:
    """Dynamo has no dynamic dimension that may be 0 or 1."""
    found = kinds_of(*(frame(f, t(n, 8)) for n in (special, 2, 3, 4)))
    by_size = {json.dumps(signature.sizes): signature.points[0] for signature in found}
    assert by_size == {json.dumps([[special, 8]]): [0], json.dumps([[[2, 4], 8]]): [1, 2, 3]}


def test_an_integer_of_one_is_a_kind_of_its_own() -> None:
    found = kinds_of(*(frame(g, t(4), n) for n in (1, 2, 3)))
    assert sorted(len(signature.dynamic()) for signature in found) == [0, 1]


def test_ones_that_come_apart() -> None:
    """Each pattern of ones is a signature: batch 1 with many tokens is not many of one token."""
    points = [(b, n) for b in (1, 2, 3) for n in (1, 5, 6)]
    found = kinds_of(*(frame(f, t(b, n)) for b, n in points))
    sizes = {json.dumps(signature.sizes): [points[at] for at in signature.points[0]] for signature in found}
    assert sizes == {
        "[[1, 1]]": [(1, 1)],
        "[[1, [5, 6]]]": [(1, 5), (1, 6)],
        "[[[2, 3], 1]]": [(2, 1), (3, 1)],
        "[[[2, 3], [5, 6]]]": [(2, 5), (2, 6), (3, 5), (3, 6)],
    }


def test_a_one_that_never_changes_is_a_size_like_others() -> None:
    (signature,) = kinds_of(*(frame(f, t(1, n)) for n in (2, 3)))
    assert signature.sizes == [[1, [2, 3]]] and signature.points == {0: [0, 1]}


def test_a_size_that_is_one_or_one_other() -> None:
    found = kinds_of(*(frame(f, t(n)) for n in (1, 7)))
    assert sorted(json.dumps(signature.sizes) for signature in found) == ["[[1]]", "[[7]]"]
    assert not any(signature.dynamic() for signature in found), "one size is not a range"


def test_a_tensor_without_dimensions() -> None:
    (signature,) = kinds_of(frame(f, t()), frame(f, t()))
    assert signature.sizes == [[]] and signature.dynamic() == {}


def test_values_are_static() -> None:
    """Points that differ in a `Values` are surveyed apart: each choice is a signature, and equal ones are one."""
    apart = [surveyed(*(frame(f, t(n, heads)) for n in (2, 3))) for heads in (4, 8)]
    first, second = (survey.signatures(0) for survey in apart)
    assert not first.keys() & second.keys()
    assert [signature.sizes for signature in first.values()] == [[[[2, 3], 4]]]
    again = surveyed(*(frame(f, t(n, 4)) for n in (2, 3))).signatures(1)
    assert again.keys() == first.keys(), "another case calls it in the same way"
    assert [signature.points for signature in again.values()] == [{1: [0, 1]}]


# --- modules ----------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, width: int = 4, number: int = 0, scale: float = 1.0) -> None:
        super().__init__()
        self.number, self.scale, self.name, self.training = number, scale, f"layers.{number}", False
        self.linear = torch.nn.Linear(width, width)
        self.register_buffer("table", torch.zeros(width, 2))
        self.state: Any = None

    def forward(self, x: Any) -> None: ...


def test_parameters_belong_to_the_model() -> None:
    layer = Layer()
    found, _ = leaves(frame(Layer.forward, layer, t(3)))
    fixed = {leaf.path: leaf.fixed for leaf in found}
    assert fixed == {
        "L['self']._modules['linear']._parameters['weight']": True,
        "L['self']._modules['linear']._parameters['bias']": True,
        "L['self']._buffers['table']": True,
        "L['x']": False,
    }
    (signature,) = kinds_of(*(frame(Layer.forward, layer, t(n)) for n in (2, 3)))
    assert signature.dynamic() == {"L['x']": [[0, 2, 3]]}


def test_a_parameter_that_is_handed_in_is_fixed_too() -> None:
    found, _ = leaves(frame(f, torch.nn.Parameter(t(3))))
    assert [leaf.fixed for leaf in found] == [True]


def test_what_layers_have_as_plain_values_does_not_keep_them_apart() -> None:
    """A layer's number, name or scale is seldom asked for; where it is, Dynamo guards on it and is asked again."""
    layers = [Layer(number=n, scale=n / 2) for n in range(3)]
    found = kinds_of(*([frame(Layer.forward, layer, t(n)) for layer in layers] for n in (2, 3)))
    assert len(found) == 1 and found[0].points == {0: [0, 1]}


def test_layers_of_other_sizes_are_other_kinds() -> None:
    layers = [Layer(4), Layer(8), Layer(4)]
    found = kinds_of(*([frame(Layer.forward, layer, t(n)) for layer in layers] for n in (2, 3)))
    assert sorted(signature.sizes[found[0].paths.index("L['self']._buffers['table']")][0] for signature in found) == [
        4,
        8,
    ]
    assert all(signature.points == {0: [0, 1]} for signature in found)


def test_a_state_that_a_module_holds_may_change() -> None:
    """A plain tensor attribute is no weight: it may be as long as the point says."""

    def call(n: int) -> Frame:
        layer = Layer()
        layer.state = t(n, 4)
        return frame(Layer.forward, layer, t(3))

    (signature,) = kinds_of(call(5), call(6))
    assert signature.dynamic() == {"L['self'].state": [[0, 5, 6]]}


def test_a_swapped_submodule_is_another_structure() -> None:
    plain, swapped, frozen = Layer(), Layer(), Layer()
    swapped.linear = torch.nn.Sequential(swapped.linear)  # type: ignore[assignment]
    frozen.linear.weight.requires_grad_(False)
    found = {structure_of(frame(Layer.forward, layer, t(3)), "inference")[0] for layer in (plain, swapped, frozen)}
    assert len(found) == 3


# --- structures -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Batch:
    tokens: Any
    length: int
    signature: str = "decode"


class Key(enum.Enum):
    ONE = 1


STRUCTURES: dict[str, tuple[Any, Any]] = {
    "type": (t(4), t(4, dtype=torch.bfloat16)),
    "dimensions": (t(4), t(4, 2)),
    "grad": (t(4), t(4).requires_grad_()),
    "device": (t(4), t(4).to("meta")),
    "parameter": (torch.nn.Parameter(t(4), requires_grad=False), t(4)),
    "none": (t(4), None),
    "float": (1.0, 2.0),
    "text": ("a", "b"),
    "bool": (True, False),
    "int and bool": (1, True),
    "int and float": (1, 1.0),
    "bytes": (b"a", "a"),
    "length of a list": ([t(4)], [t(4), t(4)]),
    "list and tuple": ([t(4)], (t(4),)),
    "keys": ({"a": t(4)}, {"b": t(4)}),
    "class": (Batch(t(4), 3), {"tokens": t(4), "length": 3, "signature": "decode"}),
    "a field's value": (Batch(t(4), 3), Batch(t(4), 3, "prefill")),
    "a field's signature": (Batch(t(4), 3), Batch([t(4)], 3)),
    "function": (torch.relu, 3),
}


@pytest.mark.parametrize("what", STRUCTURES)
def test_other_structures_are_other_kinds(what: str) -> None:
    one, other = (frame(f, value) for value in STRUCTURES[what])
    assert structure_of(one, "inference")[0] != structure_of(other, "inference")[0]
    found = kinds_of(one, other)
    assert len(found) == 2 and [fits(signature, one) for signature in found] == [True, False]


def test_code_wrapping_mode_and_module_are_part_of_a_kind() -> None:
    other = {**WRAPPING, "options": {"max_autotune": True}}
    calls = [
        (frame(f, t(4)), "inference"),
        (frame(f, t(4)), "no_grad"),
        (frame(f, t(4)), "inference bfloat16"),
        (frame(f, t(4), wrapping=other), "inference"),
        (frame(f, t(4), wrapping={**WRAPPING, "dynamic": True}), "inference"),
        (frame(f, t(4), module="other"), "inference"),
        (frame(lambda x: x, t(4)), "inference"),
    ]
    assert len({structure_of(call, mode)[0] for call, mode in calls}) == len(calls)


def test_where_a_function_stands_is_no_part_of_a_kind() -> None:
    """A relocated tree, or a line above: the plan's signatures keep their names."""
    moved = f.__code__.replace(co_filename="/elsewhere.py", co_firstlineno=999)
    call = frame(f, t(4))
    assert structure_of(dataclasses.replace(call, code=moved), "grad")[0] == structure_of(call, "grad")[0]


def test_what_is_called_is_named_for_people() -> None:
    (signature,) = kinds_of(frame(Layer.forward, Layer(), t(2)))
    assert (
        signature.function in ("Layer.forward", "forward") and signature.module == "model"
    )  # Python 3.10 has no co_qualname
    assert signature.line == Layer.forward.__code__.co_firstlineno and signature.wrapping == WRAPPING


NESTED: dict[str, Callable[[int], Any]] = {
    "list": lambda n: [t(n), t(3)],
    "tuple": lambda n: (t(3), t(n)),
    "dict": lambda n: {"a": t(n), 'it\'s "b"\n': t(3), 7: t(3)},
    "keys of other types": lambda n: {(1, "a"): t(n), None: t(3), 2.5: t(3), True: t(3), b"x": t(3)},
    "dataclass": lambda n: Batch(t(n), n),
    "all of them": lambda n: {"states": [Batch((t(n), None), n), Batch([{"k": t(n)}], n)]},
    "ints": lambda n: [n, {"k": n}, 3],
}


@pytest.mark.parametrize("what", NESTED)
def test_sizes_are_found_wherever_they_are(what: str) -> None:
    calls = [frame(f, NESTED[what](n)) for n in (5, 6)]
    (signature,) = kinds_of(*calls)
    changing = [[(d, low, high) for d, low, high in dims] for dims in signature.dynamic().values()]
    assert changing and all(low == 5 and high == 6 for dims in changing for _, low, high in dims)
    for call in calls:  # a path is what Dynamo is later told by (`dynamo_inputs.mark`)
        for leaf in leaves(call)[0]:
            assert eval(leaf.path, {"L": call.f_locals}) is leaf.value  # noqa: S307 - our own path


def test_integers_and_tensors_of_one_call_are_told_apart() -> None:
    (signature,) = kinds_of(*(frame(f, Batch(t(n), n)) for n in (5, 6)))
    assert signature.dynamic() == {"L['x'].tokens": [[0, 5, 6]], "L['x'].length": [[-1, 5, 6]]}


def test_keys_that_have_no_literal() -> None:
    call = frame(f, {Key.ONE: t(4), torch.float32: t(4)})
    for leaf in leaves(call)[0]:
        assert eval(leaf.path, {"L": call.f_locals}) is leaf.value  # noqa: S307 - our own path


def test_an_object_with_slots() -> None:
    slotted = dataclasses.make_dataclass("Slotted", ["x"], slots=True)
    (signature,) = kinds_of(*(frame(f, slotted(t(n))) for n in (5, 6)))
    assert signature.dynamic()


def test_circles_end() -> None:
    def call(n: int) -> Frame:
        value: list[Any] = [t(n)]
        value.append(value)
        layer = Layer()
        layer.me = [layer]  # type: ignore[assignment]
        batch = Batch(value, 3)
        batch.signature = batch  # type: ignore[assignment]
        return frame(g, [batch, layer], value)

    found = kinds_of(call(2), call(3))
    assert len(found) == 1 and found[0].dynamic()


def test_what_is_too_deep_is_left_alone() -> None:
    value: Any = t(5)
    for _ in range(50):
        value = [value]
    assert leaves(frame(f, value))[0] == []


def test_names_do_not_depend_on_the_process() -> None:
    """No address of an object may get into a plan."""
    values = [object(), Batch(t(3), 2), lambda x: x, torch.relu, Layer(), {Key.ONE: 1}, Key.ONE, t(2), torch.float32]
    _, text = leaves(frame(f, values))
    assert not re.search(r"0x[0-9a-f]{6,}", text)


# --- calls, one after the other ---------------------------------------------------------------------------------------


def test_the_nth_call_is_compared_with_the_nth() -> None:
    """Two calls a point, one of a fixed size and one that changes: two signatures, not one that changes everywhere."""
    found = kinds_of(*([frame(f, t(4)), frame(f, t(n))] for n in (5, 6, 7)))
    assert sorted(json.dumps(signature.sizes) for signature in found) == ["[[4]]", "[[[5, 7]]]"]


def test_calls_that_are_alike_are_one_kind() -> None:
    found = kinds_of(*([frame(f, t(n))] * 3 for n in (5, 6)))
    assert len(found) == 1 and found[0].points == {0: [0, 1]}


def test_a_point_may_make_fewer_calls() -> None:
    found = kinds_of([frame(f, t(2)), frame(f, t(9))], [frame(f, t(3))], [])
    assert {json.dumps(signature.sizes): signature.points[0] for signature in found} == {
        "[[[2, 3]]]": [0, 1],
        "[[9]]": [0],
    }


def test_nothing_is_called() -> None:
    assert kinds_of([], []) == [] and CallTrace().signatures(0) == {}


# --- fitting ----------------------------------------------------------------------------------------------------------

STRANGE: dict[str, tuple[Frame, bool]] = {
    "within": (frame(g, t(4, 8), 20), True),
    "the least": (frame(g, t(2, 8), 10), True),
    "the largest": (frame(g, t(9, 8), 30), True),
    "smaller": (frame(g, t(1, 8), 20), False),
    "empty": (frame(g, t(0, 8), 20), False),
    "larger": (frame(g, t(10, 8), 20), False),
    "another static size": (frame(g, t(4, 7), 20), False),
    "a smaller integer": (frame(g, t(4, 8), 9), False),
    "a negative integer": (frame(g, t(4, 8), -20), False),
    "another structure": (frame(g, t(4, 8), 20.0), False),
    "another function": (frame(lambda x, k: x, t(4, 8), 20), False),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_call_fits_where_its_sizes_are_within(what: str) -> None:
    call, expected = STRANGE[what]
    (signature,) = kinds_of(frame(g, t(2, 8), 10), frame(g, t(9, 8), 30))
    assert fits(signature, call) is expected
    assert not fits(signature, call, "grad"), "another mode"


sizes = st.integers(0, 5)
calls_of_a_point = st.lists(st.tuples(sizes, sizes, sizes), max_size=3)


def call_of(a: int, b: int, c: int) -> Frame:
    return frame(g, [t(a, 7), t(b, a)], {"k": c})


@given(points=st.lists(calls_of_a_point, max_size=6))
def test_every_call_that_was_seen_fits_a_kind_of_its_point(points: list[list[tuple[int, int, int]]]) -> None:
    """What fits none is unmatched: its point would be looked at again, and be as unmatched as before."""
    found = kinds_of(*([call_of(*call) for call in calls] for calls in points))
    for number, calls in enumerate(points):
        for call in calls:
            assert any(number in signature.points[0] for signature in found if fits(signature, call_of(*call)))
    for signature in found:
        assert all(low >= 2 for dims in signature.dynamic().values() for _, low, _ in dims)
        assert all(low < high for dims in signature.dynamic().values() for _, low, high in dims)
        assert all(points[number] for number in signature.points[0])


@given(
    points=st.lists(calls_of_a_point, min_size=1, max_size=5), order=st.randoms(), other=st.tuples(sizes, sizes, sizes)
)
def test_the_order_of_points_makes_no_difference(
    points: list[list[tuple[int, int, int]]], order: Any, other: tuple[int, int, int]
) -> None:
    shuffled = list(points)
    order.shuffle(shuffled)
    one, two = (
        {signature.id: signature for signature in kinds_of(*([call_of(*call) for call in calls] for calls in each))}
        for each in (points, shuffled)
    )
    assert one.keys() == two.keys()
    for name, signature in one.items():
        assert fits(signature, call_of(*other)) == fits(two[name], call_of(*other))
        assert sorted(map(str, (points[n] for n in signature.points[0]))) == sorted(
            map(str, (shuffled[n] for n in two[name].points[0]))
        )


def with_state(n: int) -> Frame:
    layer = Layer()
    layer.inner = Layer()
    layer.inner.state = t(n, 4)
    return frame(Layer.forward, layer, t(3))


UNFIT: dict[str, tuple[str, Callable[[int], Frame]]] = {
    "integers below zero": ("-1 stands for `none yet` in _Series.low and high", lambda n: frame(g, t(4), n - 4)),
    "weights that change": ("_sizes takes the first point's sizes of what is fixed", lambda n: frame(f, weight(n))),
    "states of submodules": ("all that is under a submodule counts as its weights", with_state),
}


def weight(n: int) -> torch.Tensor:
    return torch.nn.Parameter(t(n, 4))


@pytest.mark.parametrize("what", UNFIT)
def test_calls_that_were_seen_fit_a_kind(what: str) -> None:
    """Else `GraphBuilder.compile_all` would look at their points again."""
    calls = [UNFIT[what][1](n) for n in (2, 3, 5, 7)]
    found = kinds_of(*calls)
    for number, call in enumerate(calls):
        assert any(number in signature.points[0] for signature in found if fits(signature, call))


def test_kinds_are_json() -> None:
    (signature,) = kinds_of(*(frame(g, t(n, 8), n) for n in (2, 3)))
    facts = [
        signature.id,
        signature.structure,
        signature.paths,
        signature.integer,
        signature.sizes,
        signature.dynamic(),
        signature.wrapping,
    ]
    assert json.loads(json.dumps(facts)) == facts
    assert re.fullmatch("[0-9a-f]{16}", signature.id)


def test_a_leaf_has_sizes() -> None:
    assert Leaf("L['x']", t(2, 3), False).sizes == (2, 3) and Leaf("L['k']", 7, False).sizes == (7,)
