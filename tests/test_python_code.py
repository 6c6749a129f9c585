"""aot_cache.upstream.codec.python_code: what a function does, told in bytes and words that are the same in another process.

Every digest here is of code that was compiled for the test: where it stands (file, line, module) is chosen freely.
"""

from __future__ import annotations

import enum
import functools
import importlib
import json
import marshal
import operator
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from limits import HANGS

from aot_cache.upstream.codec import python_code
from aot_cache.upstream.codec.code_bytes import dump, load
from aot_cache.upstream.codec.python_code import digest, digests, identity, place

ROOT = Path(__file__).parents[1]


def code_of(source: str, filename: str = "a.py", lines_before: int = 0) -> CodeType:
    """The code of the only function in `source`."""
    module = compile("\n" * lines_before + source, filename, "exec", dont_inherit=True)
    (code,) = [value for value in module.co_consts if isinstance(value, CodeType)]
    return code


def function_of(code: CodeType, **f_globals: Any) -> Callable[..., Any]:
    return types.FunctionType(code, {"__builtins__": __builtins__, **f_globals})


# --- digests ----------------------------------------------------------------------------------------------------------

SAMPLE = """
def f(x, *rest, key=None, **more):
    '''What it does.'''
    def inner(y):
        return [y + n for n in range(3)] if y in {1, 2, "three"} else (lambda z: z * 2)(y)
    try:
        total = inner(x) + KNOWN.attribute
    except ValueError:
        total = "no"
    return total, rest, key, more
"""


def test_where_a_function_stands_is_no_part_of_it() -> None:
    here = code_of(SAMPLE)
    assert digest(code_of(SAMPLE, "/somewhere/else.py")) == digest(here)
    assert digest(code_of(SAMPLE, lines_before=400)) == digest(here)
    assert digest(code_of(SAMPLE.replace("\n", "\n\n"))) == digest(here), "lines between its own"
    assert digest(code_of("if True:\n" + SAMPLE.replace("\n", "\n    "))) == digest(here)
    assert len(digest(here)) == 32 and set(digest(here)) <= set("0123456789abcdef")


@pytest.mark.xfail(
    sys.version_info >= (3, 13),
    strict=True,
    reason="a class's body holds its first line (__firstlineno__) as a constant",
)
def test_where_a_function_with_a_class_stands_is_no_part_of_it() -> None:
    source = "def f(x):\n    class Inner:\n        def g(self): return x\n    return Inner"
    assert digest(code_of(source)) == digest(code_of(source, lines_before=7))


def test_running_a_function_does_not_change_it() -> None:
    """CPython rewrites the instructions of busy functions in place."""
    fresh, busy = code_of(SAMPLE), code_of(SAMPLE, "busy.py")
    known = types.SimpleNamespace(attribute=1)
    for n in range(2000):
        function_of(busy, KNOWN=known)(n + 5, key=0)
    for code in (fresh, busy):
        assert digest.__wrapped__(code) == digest(fresh)
    assert dump(busy, {}, "") == dump(fresh, {}, "")


OTHERS = {
    "a constant": ("def f(): return 1", "def f(): return 2"),
    "a constant's type": ("def f(): return 1", "def f(): return 1.0"),
    "an int and a bool": ("def f(): return 1", "def f(): return True"),
    "the sign of zero": ("def f(): return 0.0", "def f(): return -0.0"),
    "text and bytes": ("def f(): return 'a'", "def f(): return b'a'"),
    "text that looks like a number": ("def f(): return 1", "def f(): return '1'"),
    "a constant in a tuple": ("def f(): return (1, (2, 'a'))", "def f(): return (1, (2, 'b'))"),
    "the type of one in a tuple": ("def f(): return (1, 2)", "def f(): return (1, 2.0)"),
    "a constant in a set": ("def f(x): return x in {1, 2}", "def f(x): return x in {1, 3}"),
    "a set and a tuple": ("def f(x): return x in {1, 2}", "def f(x): return x in (1, 2)"),
    "a global's name": ("def f(): return a", "def f(): return b"),
    "an attribute's name": ("def f(x): return x.a", "def f(x): return x.b"),
    "its own name": ("def f(): return 1", "def g(): return 1"),
    "a parameter's name": ("def f(x): return 1", "def f(y): return 1"),
    "how many parameters": ("def f(x): return 1", "def f(x, y): return 1"),
    "a parameter by position only": ("def f(x): return x", "def f(x, /): return x"),
    "a parameter by name only": ("def f(x, y): return x", "def f(x, *, y): return x"),
    "further parameters": ("def f(x): return x", "def f(*x): return x"),
    "an operator": ("def f(x): return x + x", "def f(x): return x - x"),
    "the order": ("def f(x, y): return x - y", "def f(x, y): return y - x"),
    "a generator": ("def f(x): return x", "def f(x): yield x"),
    "a coroutine": ("def f(x): return x", "async def f(x): return x"),
    "what is tried": ("def f(x):\n try: a(); b()\n except E: c()", "def f(x):\n a()\n try: b()\n except E: c()"),
    "a nested function": ("def f(): return lambda x: x + 1", "def f(): return lambda x: x + 2"),
    "one nested twice": ("def f(): return lambda: lambda: 1", "def f(): return lambda: lambda: 2"),
    "what a nested one closes over": ("def f(a, b): return lambda: a", "def f(a, b): return lambda: b"),
    "code and its digest": ("def f(): return lambda: 1", f"def f(): return {digest(code_of('lambda: 1'))!r}"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_a_function_does_is_all_of_it(what: str) -> None:
    one, other = map(code_of, OTHERS[what])
    assert digest(one) != digest(other)
    assert dump(one, {}, "") != dump(other, {}, "")


constants = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4)
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)  # fmt: skip


@given(one=constants, other=constants)
def test_two_digests_are_equal_when_the_constants_are(one: Any, other: Any) -> None:
    first, second = (code_of(f"def f(x): return g(x, {value!r})") for value in (one, other))
    assert (digest(first) == digest(second)) == (repr(one) == repr(other))


@given(values=st.frozensets(st.integers() | st.text(max_size=3), min_size=2, max_size=6), order=st.randoms())
def test_the_order_of_a_set_is_nothing(values: frozenset[Any], order: Any) -> None:
    shuffled = list(values)
    order.shuffle(shuffled)
    one, other = (code_of(f"def f(x): return x in {{{', '.join(map(repr, v))}}}") for v in (values, shuffled))
    assert digest(one) == digest(other)


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.contract("python_code", "code_bytes")
def test_code_comes_back_from_its_bytes() -> None:
    code = code_of("def f(x): return [g(n, 'word') for n in range(x)] + [(lambda y: y * K)(x)]", "/home/me/model.py")
    data = dump(code, {}, "<model>")
    back = load(data)
    assert function_of(back, g=lambda n, word: (n, word), K=10)(2) == [(0, "word"), (1, "word"), 20]
    assert digest(back) == digest(code)
    assert dump(back, {}, "<model>") == data
    assert b"/home/me" not in data, "no path of the machine that built it"
    assert back.co_filename == "<model>" and back.co_firstlineno == code.co_firstlineno
    assert {c.co_filename for c in back.co_consts if isinstance(c, CodeType)} == {"<model>"}


def test_a_closure_and_defaults_fit_the_code_that_came_back() -> None:
    def outer(k: int) -> Callable[[int], int]:
        def inner(x: int, y: int = 5) -> int:
            return x * k + y

        return inner

    inner: Any = outer(3)
    back = types.FunctionType(load(dump(inner.__code__, {}, "")), {}, "inner", inner.__defaults__, inner.__closure__)
    assert back(2) == inner(2) == 11


def test_names_are_changed_everywhere() -> None:
    source = """
def __compiled_fn_1_ab(x):
    def inner(y):
        return __compiled_fn_1_ab(y) + OTHER
    return __compiled_fn_1_ab(x) + inner(x), "__compiled_fn_1_ab", "not __compiled_fn_1_ab", x.__compiled_fn_1_ab
"""
    code = load(dump(code_of(source), {"__compiled_fn_1_ab": "graph", "x": "no local name"}, ""))
    (inner,) = [c for c in code.co_consts if isinstance(c, CodeType)]
    assert code.co_name == "graph" and code.co_names == ("graph",)
    assert inner.co_names == ("graph", "OTHER")
    assert "graph" in code.co_consts and "not __compiled_fn_1_ab" in code.co_consts
    assert code.co_varnames[0] == "x", "locals are not called from outside"
    given = types.SimpleNamespace(graph=7)
    made = function_of(code, graph=lambda x: 1, OTHER=2)(given)
    assert made == (4, "graph", "not __compiled_fn_1_ab", 7)


def test_equal_names_make_equal_bytes() -> None:
    """Dynamo numbers what it makes, in each process anew: renamed, the bytes are the same."""
    first = code_of("def f(x): return __compiled_fn_3_ab(x) + __import_a(x)")
    second = code_of("def f(x): return __compiled_fn_9_cd(x) + __import_b(x)")
    one = dump(first, {"__compiled_fn_3_ab": "graph", "__import_a": "module"}, "")
    other = dump(second, {"__compiled_fn_9_cd": "graph", "__import_b": "module"}, "")
    assert one == other and dump(first, {}, "") != dump(second, {}, "")


@pytest.mark.contract("python_code", "code_bytes")
def test_who_else_holds_a_constant_is_not_in_the_bytes() -> None:
    """marshal's later versions write references for objects that several hold, and mark text that is interned."""
    source = 'def f(x): return (x, "some words", "some words too", ("some words", 12345.5), 10 ** 20)'
    code = code_of(source)
    before = dump(code, {}, "")
    held = [code.co_consts, *code.co_consts, *code.co_names, *code.co_varnames] * 3
    interned = code.replace(
        co_consts=tuple(sys.intern(c) if isinstance(c, str) else c for c in code.co_consts),
        co_names=tuple(map(sys.intern, code.co_names)),
    )
    apart = code.replace(
        co_consts=tuple("".join(list(c)) if isinstance(c, str) else c for c in code.co_consts),
    )
    assert dump(code, {}, "") == dump(interned, {}, "") == dump(apart, {}, "") == before
    assert held


IN_A_PROCESS = """
import json, sys
from aot_cache.upstream.codec.code_bytes import dump
from aot_cache.upstream.codec.python_code import digest
code = next(c for c in compile(sys.argv[1], sys.argv[2], "exec").co_consts if hasattr(c, "co_code"))
if sys.argv[3]:
    kept = [sys.intern(name) for name in code.co_names + code.co_varnames]
print(json.dumps([digest(code), dump(code, {"KNOWN": "OTHER"}, "<m>").hex()]))
"""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="marshal writes sets in their order; a build has one hash seed")
def test_another_process_gives_the_same_bytes() -> None:
    """With another hash seed (the order of sets), another file name, and other text interned."""
    found = []
    for seed, name, intern in (("0", "a.py", ""), ("1", "/b/c.py", "yes"), ("4242", "", "")):
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS, SAMPLE, name, intern],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=HANGS,
            check=True,
        )
        found.append(json.loads(done.stdout))
    assert found[0] == found[1] == found[2]
    code = code_of(SAMPLE)
    assert found[0] == [digest(code), dump(code, {"KNOWN": "OTHER"}, "<m>").hex()]


def test_a_constant_that_has_no_bytes() -> None:
    code = code_of("def f(): return 1").replace(co_consts=(None, object()))
    with pytest.raises(ValueError):
        dump(code, {}, "")


@pytest.mark.parametrize("value", [3, "text", (1, 2), None])
def test_bytes_of_something_else(value: object) -> None:
    with pytest.raises(ValueError, match="bytes of a code object"):
        load(marshal.dumps(value, 2))


# --- identities -------------------------------------------------------------------------------------------------------


class Sample:
    """A class with all that a class has."""

    held = property(lambda self: 1)

    def method(self) -> int:
        return 1

    @staticmethod
    def static() -> int:
        return 2

    @classmethod
    def of_class(cls) -> int:
        return 3


class Colour(enum.Enum):
    RED = 1


class Number(enum.IntEnum):
    ONE = 1


class Bits(enum.Flag):
    A = 1
    B = 2


def sample(x: int) -> int:
    return x + 1


NAMED: dict[str, str] = {  # expression: how its name begins
    "None": "value None",
    "...": "value Ellipsis",
    "NotImplemented": "value NotImplemented",
    "True": "value True",
    "3": "value 3",
    "2.5": "value 2.5",
    "'text'": "value 'text'",
    "b'bytes'": "value b'bytes'",
    "math": "module math",
    "os.path": f"module {os.path.__name__}",
    "int": "class builtins:int",
    "Sample": "class test_python_code:Sample",
    "sample": "function test_python_code:sample ",
    "Sample.method": "function test_python_code:Sample.method ",
    "Sample().method": "method function test_python_code:Sample.method ",
    "Sample.static": "function test_python_code:Sample.static ",
    "Sample.of_class": "method function test_python_code:Sample.of_class ",
    "sample.__code__": "code sample ",
    "Colour.RED": "enum test_python_code:Colour.RED",
    "Number.ONE": "enum test_python_code:Number.ONE",
    "Bits.B": "enum test_python_code:Bits.B",
    "len": "builtins:builtin_function_or_method builtins:len",
    "math.sqrt": "builtins:builtin_function_or_method math:sqrt",
    "operator.add": "builtins:builtin_function_or_method _operator:add",
    "str.upper": "builtins:method_descriptor builtins:str.upper",
    "dict.get": "builtins:method_descriptor builtins:dict.get",
    "int.real": "builtins:getset_descriptor builtins:int.real",
    "functools.reduce": "builtins:builtin_function_or_method _functools:reduce",
    "typing.Optional": "typing:_SpecialForm typing:",
    "torch": "module torch",
    "torch.nn": "module torch.nn",
    "torch.ops.aten": "module torch.ops.aten",
    "torch.nn.Linear": "class torch.nn.modules.linear:Linear",
    "torch.nn.functional.silu": "function torch.nn.functional:silu ",
    "torch._C._log_api_usage_once": "builtins:builtin_function_or_method ",
    "torch.relu": "builtins:builtin_function_or_method ",
    "torch.add": "builtins:builtin_function_or_method ",
    "torch.Tensor.add": "builtins:method_descriptor ",
    "torch.Tensor.shape": "builtins:getset_descriptor ",
    "torch._C._nn.gelu": "builtins:builtin_function_or_method torch._C._nn:gelu",
    "torch.float32": "torch:dtype torch.float32",
    "torch.device('cuda:1')": "torch:device cuda:1",
    "torch.strided": "torch:layout torch.strided",
    "torch.channels_last": "torch:memory_format torch.channels_last",
    "torch.ops.aten.add.Tensor": "torch._ops:OpOverload aten.add.Tensor",
    "torch.ops.aten.add": "torch._ops:OpOverloadPacket aten.add",
    "torch.Size([1, 2])": "torch:Size torch.Size([1, 2])",
}

NAMELESS = {
    "an object": object(),
    "an instance": Sample(),
    "a partial": functools.partial(sample, 1),
    "what itemgetter makes": operator.itemgetter(1),
    "a tuple": (1, 2),
    "a list": [1],
    "a dict": {"a": 1},
    "a set": {1},
    "a range": range(3),
    "a property": property(lambda self: 1),
    "a namespace": types.SimpleNamespace(a=1),
    "a method of a nameless callable": types.MethodType(functools.partial(sample), Sample()),
}


def evaluated(expression: str) -> Any:
    import math
    import typing

    import torch

    return eval(expression, {**globals(), "math": math, "torch": torch, "typing": typing})  # noqa: S307 - from the table above


@pytest.mark.parametrize("expression", NAMED)
@pytest.mark.contract("python_code")
def test_what_has_a_name(expression: str) -> None:
    found = identity(evaluated(expression))
    assert found.startswith(NAMED[expression])
    assert " 0x" not in found and "object at" not in found


@pytest.mark.parametrize("what", NAMELESS)
def test_what_has_no_name(what: str) -> None:
    assert identity(NAMELESS[what]) == ""


@pytest.mark.contract("python_code")
def test_an_optimized_module_has_no_name() -> None:
    import torch

    assert identity(torch.nn.Linear(2, 2)) == "" and identity(torch.nn.Parameter(torch.ones(2))) == ""


NAMES = """
import json, sys, test_python_code as own
print(json.dumps({e: own.identity(own.evaluated(e)) for e in own.NAMED}))
"""


def test_another_process_gives_the_same_names() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", NAMES],
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=True,
    )
    assert json.loads(done.stdout) == {expression: identity(evaluated(expression)) for expression in NAMED}


def test_all_names_differ() -> None:
    names = [identity(evaluated(expression)) for expression in NAMED]
    assert len(set(names)) == len(names)


def test_a_function_is_named_by_what_it_does() -> None:
    """One that was replaced by another of its name, or changed, is not the one that a graph was made with."""
    one, same, other = (
        types.FunctionType(code_of(f"def f(x): return x + {n}"), {"__name__": "model"}) for n in (1, 1, 2)
    )
    assert identity(one) == identity(same) != identity(other)
    elsewhere = types.FunctionType(code_of("def f(x): return x + 1"), {"__name__": "other"})
    assert identity(elsewhere) != identity(one)
    renamed = types.FunctionType(one.__code__, {"__name__": "model"})
    renamed.__qualname__ = "Layer.f"
    assert identity(renamed) != identity(one)
    held = types.MethodType(other, Sample())
    assert identity(held) != identity(types.MethodType(one, Sample())) and identity(held).startswith("method function")


def test_what_is_bound_to_an_object_is_not_named_by_its_class() -> None:
    """`SEPARATE = ", ".join` replaced by `"; ".join` is another function."""
    assert identity([].append) == ""
    assert identity(", ".join) != identity("; ".join) or identity(", ".join) == ""
    assert identity(n for n in range(3)) == ""
    assert identity(list[int]) != identity(list[str])


def test_a_tensor_has_no_name() -> None:
    """Its text is its values, rounded, and read from the device; two of them are not one."""
    import torch

    assert identity(torch.ones(2)) == ""


def test_a_function_behind_a_cache_is_named_by_what_it_does() -> None:
    one, other = (types.FunctionType(code_of(f"def f(x): return x + {n}"), {"__name__": "m"}) for n in (1, 2))
    assert identity(functools.lru_cache(one)) != identity(functools.lru_cache(other))


# --- where code stands ------------------------------------------------------------------------------------------------

TOOLS = """
import functools

def kept(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

def lost(function):
    return lambda *args: function(*args)

def helper(x):
    return x + 100
"""

MODULE = """
import functools
from tools_module import helper, kept, lost
import tools_module

def plain(x):
    return x + 1

def own_wrapper(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)
    return wrapper

@kept
def decorated(x):
    return x + 2

@kept
@kept
def twice(x):
    return x + 3

@lost
def behind_a_lambda(x):
    return x + 4

@own_wrapper
def owned(x):
    return x + 5

def outer(x):
    def inner(y):
        return (lambda z: z + 6)(y)
    return inner(x)

def factory(k):
    def made(x):
        return x + k
    return made

made = factory(7)
alias = plain

class Layer:
    def forward(self, x):
        return x + 8
    @staticmethod
    def static(x):
        return x + 9
    @classmethod
    def of_class(cls, x):
        return x + 10
    @property
    def size(self):
        return 11
    @size.setter
    def size(self, value):
        self.value = value + 12
    @kept
    def kept(self, x):
        return x + 13
    other = plain
    class Inner:
        def forward(self, x):
            return x + 14

def _local():
    class Local:
        def forward(self, x):
            return x + 15
    return Local

Local = _local()
bound = Layer().forward
foreign = helper
functions = {"one": lambda x: x + 16}
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (tmp_path / "tools_module.py").write_text(TOOLS)
    (tmp_path / "placed_module.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield importlib.import_module("placed_module")
    for name in ("placed_module", "tools_module"):
        del sys.modules[name]


def inner_code(code: CodeType, name: str) -> CodeType:
    """The code of the function `name` that is written inside."""
    found = [value for value in code.co_consts if isinstance(value, CodeType)]
    for value in found:
        found += [inner for inner in value.co_consts if isinstance(inner, CodeType)]
    (wanted,) = [value for value in found if value.co_name == name]
    return wanted


PLACED: dict[str, Callable[[Any], tuple[str, CodeType, CodeType]]] = {
    # what is looked up, its name, the function around it
    "a function": lambda m: ("plain", m.plain.__code__, m.plain.__code__),
    "a decorated one": lambda m: ("decorated", m.decorated.__wrapped__.__code__, m.decorated.__wrapped__.__code__),
    "one decorated twice": lambda m: (
        "twice", m.twice.__wrapped__.__wrapped__.__code__, m.twice.__wrapped__.__wrapped__.__code__
    ),
    "one behind a lambda": lambda m: (
        "behind_a_lambda",
        m.behind_a_lambda.__closure__[0].cell_contents.__code__,
        m.behind_a_lambda.__closure__[0].cell_contents.__code__,
    ),
    "one that a decorator of its module wraps": lambda m: (
        "owned", m.owned.__wrapped__.__code__, m.owned.__wrapped__.__code__
    ),
    "the wrapper of its module": lambda m: ("own_wrapper", m.owned.__code__, m.own_wrapper.__code__),
    "a nested function": lambda m: ("outer", inner_code(m.outer.__code__, "inner"), m.outer.__code__),
    "a lambda in a nested function": lambda m: ("outer", inner_code(m.outer.__code__, "<lambda>"), m.outer.__code__),
    "one that a function made": lambda m: ("factory", m.made.__code__, m.factory.__code__),
    "a method": lambda m: ("Layer.forward", m.Layer.forward.__code__, m.Layer.forward.__code__),
    "a static method": lambda m: ("Layer.static", m.Layer.static.__code__, m.Layer.static.__code__),
    "a class method": lambda m: ("Layer.of_class", m.Layer.of_class.__code__, m.Layer.of_class.__code__),
    "a getter": lambda m: ("Layer.size", m.Layer.size.fget.__code__, m.Layer.size.fget.__code__),
    "a setter": lambda m: ("Layer.size", m.Layer.size.fset.__code__, m.Layer.size.fset.__code__),
    "a decorated method": lambda m: (
        "Layer.kept", m.Layer.kept.__wrapped__.__code__, m.Layer.kept.__wrapped__.__code__
    ),
    "a method of an inner class": lambda m: (
        "Layer.Inner.forward", m.Layer.Inner.forward.__code__, m.Layer.Inner.forward.__code__
    ),
    "a method of a class that a function made": lambda m: ("_local", m.Local.forward.__code__, m._local.__code__),
}  # fmt: skip


@pytest.mark.parametrize("what", PLACED)
def test_where_code_stands(module: ModuleType, what: str) -> None:
    name, code, outermost = PLACED[what](module)
    assert place(code, "placed_module") == (name, outermost)
    assert digest(outermost) in digests("placed_module")[name]


@pytest.mark.parametrize("what", PLACED)
def test_a_function_is_found_by_its_name_and_digest(module: ModuleType, what: str) -> None:
    """As `digests` says, without a walk through the module where its name leads to it."""
    name, _, outermost = PLACED[what](module)
    here = python_code.Functions()
    assert here.has("placed_module", name, digest(outermost))
    assert not here.has("placed_module", name, "0" * 32)
    assert not here.has("placed_module", f"{name}.other", digest(outermost))
    assert not here.has("no_module_of_this_name", name, digest(outermost))


def test_most_functions_are_where_their_name_says(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.nn.functional as module

    name = module.__name__
    walked = [(qualname, found) for qualname, every in digests(name).items() for found in every]
    with monkeypatch.context() as patched:
        patched.setattr(python_code, "digests", lambda _: {})
        quick = sum(python_code.Functions().has(name, *one) for one in walked)
    assert len(walked) > 100 and quick > 0.8 * len(walked)
    here = python_code.Functions()
    assert all(here.has(name, *one) for one in walked)


def test_what_a_lazy_mapping_would_import_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' mappings import every model when they are asked for their values, and fail."""
    lazy = ModuleType("lazy_module")
    exec(  # noqa: S102 - the source is below
        """
def refuse(self, *_):
    raise ValueError("this imports a thousand modules")
class Mapping(dict):
    __len__ = __iter__ = values = items = keys = refuse
class Row(list):
    __len__ = __iter__ = refuse
class Pair(tuple):
    __len__ = __iter__ = refuse
def made():
    return lambda x: x + 1
mapping = dict.__new__(Mapping)
dict.__setitem__(mapping, "one", made)
row, pair = Row([made]), Pair([made])
""",
        vars(lazy),
    )
    monkeypatch.setitem(sys.modules, "lazy_module", lazy)
    assert "made" in digests("lazy_module")


def test_what_another_module_wrote_stands_there(module: Any) -> None:
    assert place(module.helper.__code__, "placed_module") is None
    assert place(module.helper.__code__, "tools_module") == ("helper", module.helper.__code__)
    wrapper = module.decorated.__code__  # it is called `decorated`, and is of tools_module
    assert place(wrapper, "placed_module") is None
    assert place(wrapper, "tools_module") == ("kept", sys.modules["tools_module"].kept.__code__)
    assert not {"helper", "foreign", "lost"} & set(digests("placed_module"))


def test_a_wrapper_does_not_stand_for_what_it_wraps(module: Any) -> None:
    """functools.wraps gives it the name; its code is the same around any function."""
    assert digests("placed_module")["decorated"] == {digest(module.decorated.__wrapped__.__code__)}
    assert digest(module.decorated.__wrapped__.__code__) != digest(module.twice.__wrapped__.__wrapped__.__code__)


def test_what_is_not_there() -> None:
    code = code_of("def f(): return 1")
    assert place(code, "no_module_of_this_name") is None and digests("no_module_of_this_name") == {}
    assert place(code, __name__) is None


def test_a_source_that_changed_has_other_digests(module: Any, tmp_path: Path) -> None:
    """Exactly the function that was changed, and those around it, and nothing that moved."""
    before = digests("placed_module")
    text = "# a comment above everything\n\n" + MODULE.replace("z + 6", "z + 60").replace("x + 14", "x + 140")
    (tmp_path / "placed_module.py").write_text(text)
    importlib.invalidate_caches()
    del sys.modules["placed_module"]
    importlib.import_module("placed_module")
    after = digests("placed_module")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"outer", "Layer.Inner.forward"}


def test_strange_things_in_a_module_do_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Circles, empty cells, and objects that lie about themselves."""
    strange = ModuleType("strange_module")
    exec(  # noqa: S102 - the source is below
        """
class Liar:
    def __getattr__(self, name):
        raise RuntimeError(name)
liar = Liar()
def unfilled():
    def inner():
        return later
    if False:
        later = 1
    return inner
cell = unfilled()
def circle():
    return circle
circle.__wrapped__ = circle
class Own:
    pass
Own.own = Own
def deep(n):
    f = lambda: n
    for _ in range(100):
        f = (lambda f: lambda: f())(f)
    return f
deepest = deep(1)
""",
        vars(strange),
    )
    monkeypatch.setitem(sys.modules, "strange_module", strange)
    assert {"unfilled", "circle", "deep"} <= set(digests("strange_module"))


HELD = {
    "one in a dict": "functions = {'one': lambda x: x + 1}\ntarget = functions['one']",
    "one behind a cache": "import functools\ntarget = lambda x: x + 1\ncached = functools.lru_cache(target)",
    "a cached property": (
        "import functools\nclass Layer:\n    @functools.cached_property\n    def target(self): return 1\n"
        "target = vars(Layer)['target'].func"
    ),
    "one that a function made": "def make():\n    return lambda x: x + 1\ntarget = make()",
}


@pytest.mark.parametrize("what", HELD)
def test_code_that_is_held_by_an_object(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a graph inlined and `place` does not find is not compared when the graph is looked up."""
    holder = ModuleType("holder_module")
    exec(HELD[what], vars(holder))  # noqa: S102 - the table above
    monkeypatch.setitem(sys.modules, "holder_module", holder)
    code = vars(holder).pop("target").__code__
    assert place(code, "holder_module") is not None
