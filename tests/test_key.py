"""aot_cache.artifact.key: each part alone makes another key, and nothing else does."""

from __future__ import annotations

import copy
import json
import string
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aot_cache.artifact import key
from aot_cache.artifact.key import Part, graph_parts, toolchain_parts, unit_key, unit_parts
from aot_cache.artifact.manifest import ServedGraph, graph_from_json

TOOLCHAIN: dict[str, Any] = {
    "triton": "3.7.1",
    "target": {"backend": "cuda", "arch": 90, "warp_size": 32},
    "toolkit": "Build cuda_12.9",
    "environment": {"A": "1", "B": "2"},
    "line_info": False,
}
UNIT: dict[str, Any] = {
    "kernel": "module:kernel",
    "source": "ab" * 32,
    "specialization": [{"t": ["*bf16", "D"]}, {"t": ["i32", ""]}, {"t": ["constexpr", 64]}],
    "options": {"num_warps": 4, "debug": False},
    "overrides": {},
}


def made(toolchain: dict[str, Any] = TOOLCHAIN, unit: dict[str, Any] = UNIT) -> str:
    return unit_key(unit_parts(toolchain=toolchain_parts(**toolchain), **unit))


def changed(value: dict[str, Any], path: tuple[Any, ...], new: Any) -> dict[str, Any]:
    out = copy.deepcopy(value)
    place: Any = out
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = new
    return out


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("triton",), "3.7.2"),
        (("target", "backend"), "hip"),
        (("target", "arch"), 100),
        (("target", "arch"), "90"),
        (("target", "warp_size"), 64),
        (("toolkit",), ""),
        (("environment", "A"), "2"),
        (("environment", "C"), ""),
        (("line_info",), True),
    ],
)
def test_each_part_of_the_toolchain(path: tuple[str, ...], new: Any) -> None:
    assert made(changed(TOOLCHAIN, path, new)) != made()


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("kernel",), "module:other"),
        (("source",), "ac" * 32),
        (("specialization", 0, "t", 0), "*fp16"),
        (("specialization", 0, "t", 1), ""),
        (("specialization", 1, "t", 1), None),
        (("specialization", 1), {"t": ["constexpr", 1]}),
        (("specialization", 2, "t", 1), 64.0),
        (("specialization", 2, "t", 1), "64"),
        (("specialization", 2, "t", 1), {"dtype": "fp32"}),
        (("options", "num_warps"), 8),
        (("options", "debug"), None),
        (("options", "num_stages"), 3),
        (("overrides", "num_warps"), 8),
    ],
)
def test_each_part_of_a_unit(path: tuple[Any, ...], new: Any) -> None:
    assert made(unit=changed(UNIT, path, new)) != made()


def test_what_a_target_has_besides_is_not_in_it() -> None:
    """The GPU's name or clock changes no code: one bundle's kernels serve every GPU of an architecture."""
    assert made(changed(TOOLCHAIN, ("target", "name"), "NVIDIA H200")) == made()


def test_the_order_of_options_changes_no_code() -> None:
    shuffled = {**UNIT, "options": dict(reversed(UNIT["options"].items()))}
    assert list(shuffled["options"]) != list(UNIT["options"])
    assert made(unit=shuffled) == made()
    assert made({**TOOLCHAIN, "environment": {"B": "2", "A": "1"}}) == made()


def test_parts_are_named() -> None:
    assert set(unit_parts(toolchain=toolchain_parts(**TOOLCHAIN), **UNIT)) == {
        "schema", "triton", "target", "toolkit", "environment", "line_info",
        "kernel", "source", "specialization", "options", "overrides",
    }  # fmt: skip


names = st.text(string.ascii_lowercase, min_size=1, max_size=4)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=8,
)


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


@given(one=st.dictionaries(names, values, min_size=1, max_size=5), other=st.data())
def test_two_keys_are_equal_when_all_parts_are(one: dict[str, Any], other: st.DataObject) -> None:
    name = other.draw(st.sampled_from(sorted(one)))
    two = {**one, name: other.draw(values)}
    assert (unit_key(one) == unit_key(two)) == (canonical(one) == canonical(two))


@given(st.dictionaries(names, values, max_size=5), names)
def test_a_part_that_is_there_differs_from_one_that_is_not(parts: dict[str, Any], name: str) -> None:
    without = {k: v for k, v in parts.items() if k != name}
    assert unit_key({**without, name: None}) != unit_key(without)


@given(st.dictionaries(names, values, max_size=5))
def test_the_order_of_parts_is_nothing(parts: dict[str, Any]) -> None:
    assert unit_key(dict(reversed(parts.items()))) == unit_key(parts)


@given(values)
def test_a_digest_is_64_hex_digits_of_the_json(value: Any) -> None:
    digest = key.digest(value)
    assert len(digest) == 64 and set(digest) <= set(string.hexdigits.lower())
    assert digest == key.digest(json.loads(json.dumps(value)))


def test_values_cannot_be_moved_between_parts() -> None:
    assert unit_key({"a": "xy", "b": ""}) != unit_key({"a": "x", "b": "y"})
    assert unit_key({"a": ["x", "y"]}) != unit_key({"a": ["x"], "b": ["y"]})


def test_a_key_of_today_is_the_key_of_tomorrow() -> None:
    """Stores outlive releases: a key that changes by accident makes every build start anew."""
    assert key.SCHEMA == "1"
    assert made() == "0a1d5a966dd99bd2fa43b7aae8f3c591df67e380bb5055a967078b49861ed622"


# --- graphs -----------------------------------------------------------------------------------------------------------

BOUND: dict[str, Any] = {
    "torch": "2.13.0",
    "git": "ab" * 20,
    "python": "3.11",
    "triton": "3.7.1",
    "target": {"backend": "cuda", "arch": 90, "warp_size": 32, "multi_processor_count": 132, "name": "NVIDIA H200"},
}


@pytest.mark.parametrize(
    ("path", "new"),
    [
        (("torch",), "2.13.1"),
        (("git",), "ac" * 20),
        (("python",), "3.12"),
        (("triton",), ""),
        (("target", "arch"), 100),
        (("target", "multi_processor_count"), 114),
        (("target", "name"), "NVIDIA H100"),
    ],
)
def test_each_part_that_graphs_are_bound_to(path: tuple[str, ...], new: Any) -> None:
    """Other than a kernel's: Inductor looks at the number of multiprocessors, and bytecode is bound to a Python."""
    assert unit_key(graph_parts(**changed(BOUND, path, new))) != unit_key(graph_parts(**BOUND))


def test_what_graphs_are_bound_to_has_names() -> None:
    made = graph_parts(**BOUND)
    assert set(made) == {"torch", "torch git", "python", "triton", "target"}
    assert json.loads(json.dumps(made)) == made
    made["target"]["arch"] = 100
    assert BOUND["target"]["arch"] == 90, "the target is the caller's own"


def test_the_objects_of_a_graph_are_all_that_it_names() -> None:
    graph = {
        "guard_state": "a1", "bytecode": "b2", "settings": "c3", "graphs": {"g": "d4", "h": "e5"},
        "libraries": {"source": "f6"}, "resumes": {"r": {"code": "a7", "module": "m", "free": False}},
        "function": "model:f", "code": "b8", "inlined": [["m", "f", "c9"]], "identities": [], "imports": {"i": "m"},
    }  # fmt: skip
    graph |= {"mode": "", "wrapping": None, "values": [], "choices": {}, "module": "model"}
    assert graph_from_json(ServedGraph, graph).objects() == {"a1", "b2", "c3", "d4", "e5", "f6", "a7"}


def test_kinds_of_records_are_told_apart() -> None:
    assert len({key.UNITS, key.NATIVE, key.IR, key.GRAPHS}) == 4


def test_parts_beside_this_host() -> None:
    assert Part("triton", "3.7", "3.7").same and not Part("triton", "3.7", "3.6").same
    assert Part("x", "1", "2").needed and not Part("x", "1", "2", needed=False).needed
