"""What the kernel trace notes of compiled calls, and what graphs make of it."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from aot_cache.builder.call_signatures import CallSignature, CallTrace, seen_call
from aot_cache.builder.recorded_calls import Call, RecordedCalls, call_of, resized
from aot_cache.upstream.hooks.dynamo_frames import Frame

WRAPPING = {"backend": "inductor", "options": {}, "dynamic": None}


def step(x: torch.Tensor, many: int, part: Any = None, name: str = "") -> None: ...


def given(rows: int, *, inside: bool = False) -> dict[str, Any]:
    part = (torch.empty(rows, 2),) if inside else None
    return {"x": torch.empty(rows, 8), "many": rows * 2, "part": part, "name": "a"}


def signatures(*points: dict[str, Any]) -> list[CallSignature]:
    """The signatures that a survey of Dynamo's own frames tells."""
    survey = CallTrace()
    for number, arguments in enumerate(points):
        bound = inspect.signature(step).bind(**arguments).arguments
        frame = Frame(step.__code__, {"__name__": __name__}, dict(bound), WRAPPING, False)
        survey.add([seen_call(frame, "no_grad")], number)
    return list(survey.signatures(0).values())


def noted(*points: dict[str, Any]) -> list[list[Call]]:
    return [[call_of(step, (), arguments)] for arguments in points]


def test_a_call_is_noted_by_the_sizes_of_its_tensors_and_integers() -> None:
    weight = torch.nn.Parameter(torch.empty(3, 3))
    name, sizes = call_of(step, (torch.empty(4, 8), 7), {"part": weight, "name": "b"})
    assert name == f"{__name__}:step"
    assert sizes == {"L['x']": [4, 8], "L['many']": [7]}


def test_a_call_under_torch_compile_is_the_function_s() -> None:
    assert call_of(torch.compile(step), (torch.empty(2, 8),), {})[0] == f"{__name__}:step"


def test_what_is_no_python_function_has_no_sizes() -> None:
    assert call_of(torch.nn.functional.relu.__class__, (), {}) == ("", {})
    assert call_of(None, (), {}) == ("", {})


def test_points_that_nobody_looked_at_are_known_by_what_was_noted() -> None:
    points = [given(n) for n in (2, 3, 4, 9)]
    (signature,) = signatures(*points[:2], points[3])
    recorded = RecordedCalls({"case": noted(*points[:2], points[3], points[2])})
    assert recorded.is_consistent(signature, "case", {0, 1, 2}, [0, 1, 2])
    assert recorded.at(signature, "case", 3) == [{"L['x']": [4, 8], "L['many']": [8]}]
    assert recorded.knows("case", 3) and not recorded.knows("case", 4) and not recorded.knows("other", 0)


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param([], id="nothing was noted"),
        pytest.param([[], [], []], id="no call was noted where one was seen"),
        pytest.param([[("other:step", {"L['x']": [2, 8], "L['many']": [4]})]] * 3, id="another function's"),
        pytest.param(noted(given(2), given(100), given(9)), id="other sizes than were seen"),
    ],
)
def test_what_does_not_agree_with_the_survey_is_not_trusted(calls: list[list[Call]]) -> None:
    (signature,) = signatures(given(2), given(3), given(9))
    assert not RecordedCalls({"case": calls}).is_consistent(signature, "case", {0, 1, 2}, [0, 1, 2])


def test_a_kind_noted_where_the_survey_saw_none_is_not_trusted() -> None:
    (signature,) = signatures(given(2), given(9))
    recorded = RecordedCalls({"case": noted(given(2), given(9), given(5))})
    assert not recorded.is_consistent(signature, "case", {0, 1, 2}, [0, 1])


def test_a_size_inside_an_argument_is_not_noted_and_so_not_trusted() -> None:
    (signature,) = signatures(given(2, inside=True), given(9, inside=True))
    recorded = RecordedCalls({"case": noted(given(2, inside=True), given(9, inside=True))})
    assert not recorded.is_consistent(signature, "case", {0, 1}, [0, 1])


def test_a_point_at_which_a_known_function_is_called_otherwise_is_strange() -> None:
    known = signatures(given(2), given(9))
    wide = {**given(3), "x": torch.empty(3, 16)}
    recorded = RecordedCalls({"case": noted(given(2), given(9), given(5), wide, given(10))})
    assert recorded.unmatched_points(known, "case") == {3, 4}


def test_arguments_of_other_sizes_are_like_those_they_are_made_from() -> None:
    template = {"x": torch.empty(4, 8, dtype=torch.bfloat16), "many": 8, "name": "a", "flag": True}
    made = resized(template, {"L['x']": [6, 8], "L['many']": [12]})
    assert made is not None
    assert (list(made["x"].shape), made["x"].dtype) == ([6, 8], torch.bfloat16)
    assert (made["many"], made["name"], made["flag"]) == (12, "a", True)
    assert template["many"] == 8 and list(template["x"].shape) == [4, 8]


def test_tensors_are_made_in_the_mode_of_those_they_are_made_from() -> None:
    with torch.inference_mode():
        inside = torch.empty(4)
        outside = resized({"x": torch.nn.Parameter(torch.empty(1), requires_grad=False).data}, {"L['x']": [2]})
    made = resized({"x": inside}, {"L['x']": [2]})
    assert made is not None and made["x"].is_inference()
    assert outside is not None


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(torch.empty(8, 4).t(), id="turned"),
        pytest.param(torch.empty(9, 8)[1:5], id="not at its storage's start"),
        pytest.param(torch.empty(4, 8, requires_grad=True), id="with a gradient"),
    ],
)
def test_a_tensor_that_is_not_simply_dense_is_left_to_the_host_code(value: torch.Tensor) -> None:
    assert resized({"x": value}, {"L['x']": [6, 8]}) is None
