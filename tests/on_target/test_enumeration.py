"""The enumeration is the truth: for random kernels, host code and ranges it is what brute force finds, key by key.

Brute force is Triton's own `run` at every point, with real CPU tensors (see `asking`). What is compared with it went
through all of ours: the virtual tensors, the launch log, the dealing of points to children, and the plan's JSON.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from asking import Asked, asked_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sample_kernels import no_benchmark
from triton.runtime.autotuner import Autotuner

from aot_cache import Call, Case, Range, Recipe, Values
from aot_cache.artifact.plan import Plan
from aot_cache.builder import kernels_trace as tracing
from aot_cache.recipes import dimensions
from aot_cache.upstream.codec import triton_jit

Point = dict[str, int]
Expression = Callable[[Point], int]

# --- expressions: what host code computes from sizes -------------------------------------------------------------------

DIMS = ("a", "b")


def _named(text: str, function: Expression) -> Expression:
    function.__name__ = text  # hypothesis prints it
    return function


def _leaf() -> st.SearchStrategy[Expression]:
    dims = st.sampled_from(DIMS).map(lambda d: _named(d, lambda p: p[d]))
    return dims | st.sampled_from([1, 3, 16, 17]).map(lambda c: _named(str(c), lambda p: c))


def _combined(inner: st.SearchStrategy[Expression]) -> st.SearchStrategy[Expression]:
    constant = st.sampled_from([2, 3, 4, 8, 16, 64])
    large = st.sampled_from([16, 2**28, 2**31])
    name = lambda e: e.__name__  # noqa: E731
    return st.one_of(
        inner.map(lambda e: _named(f"next_power_of_2({name(e)})", lambda p: triton.next_power_of_2(max(e(p), 1)))),
        st.tuples(inner, constant).map(
            lambda t: _named(f"cdiv({name(t[0])}, {t[1]})", lambda p: triton.cdiv(t[0](p), t[1]))
        ),
        st.tuples(inner, constant).map(lambda t: _named(f"min({name(t[0])}, {t[1]})", lambda p: min(t[0](p), t[1]))),
        st.tuples(inner, inner).map(
            lambda t: _named(f"max({name(t[0])}, {name(t[1])})", lambda p: max(t[0](p), t[1](p)))
        ),
        st.tuples(inner, inner).map(lambda t: _named(f"({name(t[0])} - {name(t[1])})", lambda p: t[0](p) - t[1](p))),
        st.tuples(inner, constant).map(lambda t: _named(f"({name(t[0])} // {t[1]})", lambda p: t[0](p) // t[1])),
        st.tuples(inner, large).map(lambda t: _named(f"({name(t[0])} * {t[1]})", lambda p: t[0](p) % 2**20 * t[1])),
        st.tuples(inner, constant, inner, inner).map(
            lambda t: _named(
                f"({name(t[2])} if {name(t[0])} > {t[1]} else {name(t[3])})",
                lambda p: t[2](p) if t[0](p) > t[1] else t[3](p),
            )
        ),
    )


expressions = st.recursive(_leaf(), _combined, max_leaves=4)

# --- kernels ----------------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.int8)


@dataclass(frozen=True)
class Parameter:
    """One parameter of a random kernel and what host code passes for it."""

    kind: str
    value: Expression
    dtype: torch.dtype
    flags: frozenset[str]

    def made(self, point: Point, device: str) -> Any:
        number = self.value(point)
        if self.kind == "pointer":
            return torch.empty(512, dtype=self.dtype, device=device)[number % 33 :]
        if self.kind == "maybe pointer":
            return None if number % 3 else torch.empty(8, dtype=self.dtype, device=device)
        if self.kind == "tuple":
            return (number, torch.empty(4, dtype=self.dtype, device=device), 1)
        return {
            "int": number,
            "constexpr": number,
            "constexpr bool": number % 2 == 0,
            "constexpr text": ("tf32", "ieee")[number % 2],
            "bool": number % 2 == 0,
            "float": number / 2,
            "none or int": None if number % 2 else number,
        }[self.kind]


KINDS = [
    "int",
    "int",
    "pointer",
    "pointer",
    "constexpr",
    "constexpr",
    "constexpr bool",
    "constexpr text",
    "bool",
    "float",
]
KINDS += ["none or int", "maybe pointer", "tuple"]
FLAGS = ["do_not_specialize", "do_not_specialize_on_alignment"]

parameters = st.builds(
    Parameter,
    st.sampled_from(KINDS),
    expressions,
    st.sampled_from(DTYPES),
    st.frozensets(st.sampled_from(FLAGS), max_size=1),
)


@dataclass(frozen=True)
class Program:
    """A random kernel, the options of its launch, and what stands around it."""

    parameters: tuple[Parameter, ...]
    positional: int
    options: tuple[tuple[str, Expression], ...]
    wrapper: str
    ranges: tuple[Range | Values, ...]

    def source(self) -> str:
        names = []
        for number, parameter in enumerate(self.parameters):
            names.append(f"p{number}: tl.constexpr" if parameter.kind.startswith("constexpr") else f"p{number}")
        if self.wrapper != "plain":
            names.append("EXTRA: tl.constexpr")
        flags = [
            f"{flag}={[f'p{n}' for n, p in enumerate(self.parameters) if flag in p.flags and 'constexpr' not in p.kind]}"
            for flag in FLAGS
        ]
        return (
            "import triton\nimport triton.language as tl\n\n"
            f"@triton.jit({', '.join(flags)})\ndef kernel({', '.join(names)}):\n    pass\n"
        )

    def wrapped(self, kernel: Any) -> Any:
        first = "p0"
        if self.wrapper == "heuristics":
            return triton.heuristics({"EXTRA": lambda args: _size(args[first]) % 4 == 0})(kernel)
        if self.wrapper == "autotune":
            configs = [triton.Config({"EXTRA": extra}, num_warps=extra // 16) for extra in (16, 32, 64)]
            prune = {"early_config_prune": lambda c, named, **_: c[: 1 + _size(named[first]) % 3]}
            return triton.autotune(configs, key=["p0"], prune_configs_by=prune, do_bench=no_benchmark)(kernel)
        return kernel

    def run(self, kernel: Any, point: Point, device: str) -> None:
        """The host code."""
        made = [parameter.made(point, device) for parameter in self.parameters]
        named = {f"p{n}": value for n, value in enumerate(made) if n >= self.positional}
        options = {name: 2 ** (abs(value(point)) % 3) for name, value in self.options}
        kernel[(1,)](*made[: self.positional], **options, **named)

    @property
    def dims(self) -> dict[str, Range | Values]:
        return dict(zip(DIMS, self.ranges))

    def points(self) -> list[Point]:
        return [dict(zip(DIMS, values)) for values in itertools.product(*self.ranges)]


def _size(value: Any) -> int:
    return value if isinstance(value, int) else 5


@st.composite
def programs(draw: st.DrawFn) -> Program:
    wrapper = draw(st.sampled_from(["plain", "heuristics", "autotune"]))
    made = draw(st.lists(parameters, min_size=1, max_size=5))
    if wrapper == "autotune":  # its key is an int, and what is pruned depends on the key alone
        made[0] = Parameter("int", made[0].value, torch.float32, frozenset())
    options = [] if wrapper == "autotune" else ["num_warps", "num_stages"]
    names = draw(st.permutations(options))[: draw(st.integers(0, 2))]
    ranges = (
        draw(
            st.builds(
                lambda lo, span, step: Range(lo, lo + span, step),
                st.integers(0, 40),
                st.integers(0, 20),
                st.integers(1, 3),
            )
        ),
        Values(*draw(st.lists(st.sampled_from([1, 2, 15, 16, 17, 31, 64, 2**31 - 1, 2**31]), min_size=1, max_size=3))),
    )
    # An autotuner reads positional arguments by name; the key is always there.
    positional = draw(st.integers(1, len(made)))
    return Program(tuple(made), positional, tuple((name, draw(expressions)) for name in names), wrapper, ranges)


# --- the comparison ---------------------------------------------------------------------------------------------------

_numbers = itertools.count()


def imported(folder: Path, source: str) -> Any:
    """A kernel needs a file to be read from, and each a module of its own."""
    name = f"random_kernel_{next(_numbers)}"
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.kernel


def enumerated(program: Program, kernel: Any) -> dict[Asked, list[Point]]:
    """Key → points, by aot-cache."""

    def make(**point: int) -> Call:
        return Call(program.run, kernel, point, "cuda")

    recipe = Recipe("random", [Case("case", make, program.dims)])
    plan = tracing.trace(recipe, "h200", lambda *_: None, workers=2).plan
    plan = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    out = {}
    for unit in plan.units:
        specialization = [triton_jit.decode_pair(pair) for pair in unit.specialization]
        options = {name: triton_jit.decode(value) for name, value in unit.options.items()}
        out[unit.kernel, triton_jit.memory_key(specialization, options)] = dimensions.expand(unit.reached["case"])
    assert len(out) == len(plan.units)
    return out


def brute_force(program: Program, kernel: Any) -> dict[Asked, list[Point]]:
    """Key → points, by Triton."""
    tuners = [kernel] if isinstance(kernel, Autotuner) else []
    out: dict[Asked, list[Point]] = {}
    for point in program.points():
        for key in asked_for(lambda point=point: program.run(kernel, point, "cpu"), *tuners):
            out.setdefault(key, []).append(point)
    return out


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])
@given(program=programs(), block=st.sampled_from([4, 7, 256]))
def test_the_enumeration_is_what_brute_force_finds(program: Program, block: int, tmp_path: Path) -> None:
    kernel = program.wrapped(imported(tmp_path, program.source()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tracing, "BLOCK", block)
        ours = enumerated(program, kernel)
    theirs = brute_force(program, kernel)
    assert set(ours) == set(theirs)
    for key, points in theirs.items():
        assert sorted(ours[key], key=str) == sorted(points, key=str), key
