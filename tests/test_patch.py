"""Functions of other libraries that we replace: given back whole, with others' hooks before and after ours, under threads."""

from __future__ import annotations

import functools
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from contracts import python
from hypothesis import given
from hypothesis import strategies as st
from limits import HANGS

from aot_cache.upstream import patch


class Base:
    def inherited(self, x: int) -> int:
        return x


class Owner(Base):
    def method(self, x: int) -> int:
        return x

    @classmethod
    def of_class(cls, x: int) -> int:
        return x if cls is Owner else -1

    @staticmethod
    def static(x: int) -> int:
        return x


NAMES = ["method", "of_class", "static", "inherited"]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    before, patches = dict(vars(Owner)), patch.installed()
    yield
    gc.collect()
    assert dict(vars(Owner)) == before and patch.installed() == patches


def add(number: int) -> Callable[..., int]:
    """A replacement that shows where in a chain it stands: digits, the first that is called last."""
    return lambda original, *args: original(*args) * 10 + number


def foreign(name: str, number: int) -> Callable[[], None]:
    """What others do: wrap what is there, and put back blindly what was there."""
    raw, bound = vars(Owner).get(name), getattr(Owner, name)
    inner = raw if raw is not None and callable(raw) else bound

    def theirs(*args: Any) -> int:
        return int(inner(*args)) * 10 + number

    setattr(Owner, name, staticmethod(theirs) if isinstance(raw, (staticmethod, classmethod)) else theirs)

    def leave() -> None:
        setattr(Owner, name, raw) if raw is not None else delattr(Owner, name)

    return leave


def call(name: str) -> int:
    return int(getattr(Owner(), name)(7))


@pytest.mark.parametrize("name", NAMES)
def test_the_original_comes_back_itself(name: str) -> None:
    stood = vars(Owner).get(name)
    undo = patch.replace(Owner, name, add(1))
    assert call(name) == 71 and getattr(Owner, name).__name__ == name
    assert patch.installed()[-1] == {"owner": f"{__name__}.Owner", "name": name, "by": "test_patch", "state": "in"}
    undo()
    undo()  # a second time there is nothing to do
    assert call(name) == 7 and vars(Owner).get(name) is stood


@pytest.mark.parametrize("name", NAMES)
def test_somebody_s_hook_from_before_stays(name: str) -> None:
    leave = foreign(name, 2)
    undo = patch.replace(Owner, name, add(1))
    assert call(name) == 721
    undo()
    assert call(name) == 72
    leave()


@pytest.mark.parametrize("name", NAMES)
def test_somebody_s_hook_from_after_stays(name: str) -> None:
    """Taken out, ours is passed by; it leaves the chain when whoever stands on it does."""
    undo = patch.replace(Owner, name, add(1))
    leave = foreign(name, 2)
    assert call(name) == 712 and patch.installed()[-1]["state"] == "wrapped"
    undo()
    assert call(name) == 72 and patch.installed()[-1]["state"] == "passed by"
    again = patch.replace(Owner, name, add(3))
    assert call(name) == 723
    again()
    assert call(name) == 72
    leave()
    assert call(name) == 7
    patch.replace(Owner, name, add(1))()


def test_somebody_who_looks_like_ours_is_not_ours() -> None:
    undo = patch.replace(Owner, "method", add(1))
    inner = Owner.method

    @functools.wraps(inner)
    def theirs(self: Owner, x: int) -> int:
        return inner(self, x) * 10 + 2

    Owner.method = theirs  # type: ignore[method-assign]
    undo()
    assert call("method") == 72
    Owner.method = inner  # type: ignore[method-assign]
    patch.replace(Owner, "method", add(1))()


@given(st.lists(st.sampled_from(["ours", "theirs", "out 0", "out 1", "out 2", "leave"]), max_size=9))
def test_whatever_the_order(steps: list[str]) -> None:
    """Theirs come and go as on a stack, which is all that blind wrapping allows; ours in any order."""
    ours: list[tuple[int, Callable[[], None]]] = []
    theirs: list[Callable[[], None]] = []
    chain: list[tuple[str, int]] = []
    for number, step in enumerate(steps):
        digit = number % 9 + 1
        if step == "ours":
            ours.append((digit, patch.replace(Owner, "method", add(digit))))
            chain.append(("ours", digit))
        elif step == "theirs":
            theirs.append(foreign("method", digit))
            chain.append(("theirs", digit))
        elif step.startswith("out") and len(ours) > int(step[4:]):
            digit, undo = ours.pop(int(step[4:]))
            undo()
            chain.remove(("ours", digit))
        elif step == "leave" and chain and chain[-1][0] == "theirs":
            theirs.pop()()
            chain.pop()
        assert str(call("method")) == "7" + "".join(str(digit) for _, digit in chain)
    while chain:
        kind, _ = chain.pop()
        theirs.pop()() if kind == "theirs" else ours.pop()[1]()
    patch.replace(Owner, "method", add(1))()  # sweeps out what was passed by
    assert call("method") == 7


def test_in_and_out_a_thousand_times() -> None:
    """Whether or not somebody stands on the first one: no chain grows, which would end in a RecursionError."""
    first = patch.replace(Owner, "method", add(1))
    leave = foreign("method", 2)
    first()
    for _ in range(1000):
        patch.replace(Owner, "method", add(3))()
    assert call("method") == 72 and len([p for p in patch.installed() if p["name"] == "method"]) == 1
    leave()
    patch.replace(Owner, "method", add(1))()


def test_what_is_not_there_is_an_error_and_nothing_is_replaced() -> None:
    with pytest.raises(AttributeError):
        patch.replace_all(Owner, {"method": add(1), "gone": add(1)})
    assert call("method") == 7


# --- for one thread ---------------------------------------------------------------------------------------------------


def in_turns(*parts: Callable[[Callable[[int], None]], None]) -> None:
    """Run functions in threads of their own; `at(n)` in one of them waits until it is moment n."""
    moment, reached, failed = [0], threading.Condition(), []

    def at(wanted: int) -> None:
        with reached:
            assert reached.wait_for(lambda: moment[0] == wanted or failed, HANGS)
            moment[0] += 1
            reached.notify_all()

    def run(part: Callable[[Callable[[int], None]], None]) -> None:
        try:
            part(at)
        except BaseException as error:
            failed.append(error)
            with reached:
                reached.notify_all()

    threads = [threading.Thread(target=run, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANGS)
    assert failed == []


@pytest.mark.parametrize("name", NAMES)
def test_two_threads_one_inside_the_other(name: str) -> None:
    """The second enters before the first leaves, and leaves after it: what was there is there again."""
    stood, thread = vars(Owner).get(name), patch.OnThisThread(Owner, name)

    def first(at: Callable[[int], None]) -> None:
        at(0)
        with thread.replaced(add(1)):
            at(1)
            at(4)
            assert call(name) == 71
        at(5)

    def second(at: Callable[[int], None]) -> None:
        at(2)
        with thread.replaced(add(2)):
            assert call(name) == 72
            with thread.replaced(add(3)):
                assert call(name) == 73
            at(3)
            at(6)
            assert call(name) == 72
        at(7)

    in_turns(first, second)
    assert vars(Owner).get(name) is stood and call(name) == 7


def test_other_threads_see_nothing_of_it() -> None:
    thread = patch.OnThisThread(Owner, "method")
    found: list[int] = []
    with thread.replaced(add(1)):
        other = threading.Thread(target=lambda: found.append(call("method")))
        other.start()
        other.join(HANGS)
        assert call("method") == 71
    assert found == [7]


def test_graphs_that_are_loaded_by_two_threads_leave_nothing_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second enters before the first leaves, unless it has to wait, and leaves after it."""
    from torch._inductor.codecache import CppCodeCache, FxGraphCache
    from torch._inductor.triton_bundler import TritonBundler

    from aot_cache.upstream.hooks import inductor_artifact, inductor_cpp, inductor_tuning

    owners = [
        (FxGraphCache, "cache_hit_post_compile"),
        (CppCodeCache, "load_async"),
        (TritonBundler, "read_and_emit"),
    ]
    before = [vars(owner)[name] for owner, name in owners]
    folders = {name: os.environ.get(name) for name in inductor_artifact._FOLDERS}
    inside, both, left = threading.Semaphore(0), threading.Event(), threading.Event()

    class Slowly:
        @staticmethod
        def deserialize_compile_artifacts(data: bytes) -> Callable[[], bytes]:
            inside.release()
            if data == b"2":
                both.set()
                left.wait(0.5)  # the second one leaves last, if it can be inside together with the first
            else:
                both.wait(0.5)
            return lambda: data

    monkeypatch.setattr(inductor_artifact, "Serializable", Slowly)
    found: list[bytes] = []

    def load(data: bytes) -> None:
        with inductor_cpp.serving(lambda digest: None), inductor_tuning.choosing({}):
            found.append(inductor_artifact.load_graph(data)())
        left.set()

    threads = [threading.Thread(target=load, args=(data,)) for data in (b"1", b"2")]
    for thread in threads:
        thread.start()
        assert inside.acquire(timeout=0.2) or thread is threads[1]
    for thread in threads:
        thread.join(HANGS)
    assert sorted(found) == [b"1", b"2"]
    assert [vars(owner)[name] for owner, name in owners] == before
    assert {name: os.environ.get(name) for name in inductor_artifact._FOLDERS} == folders


# --- all of them, in a serving process --------------------------------------------------------------------------------

SERVING = """
import sys, types
import torch, torch._dynamo, torch._inductor, triton
import torch._inductor.runtime.triton_heuristics, torch._inductor.runtime.static_triton_launcher, torch._inductor.cpp_builder
import aot_cache
from aot_cache.upstream import patch
from aot_cache.upstream.hooks import inductor_later

def seen():
    return {(one["owner"], one["name"]) for one in aot_cache.stats()["patches"]}

def owner_of(name):
    parts = name.split(".")
    for split in range(len(parts), 0, -1):
        module = sys.modules.get(".".join(parts[:split]))
        if module is not None:
            for part in parts[split:]:
                module = getattr(module, part)
            return module

aot_cache.arm()
patched = seen()
aot_cache.disarm()
assert len(patched) >= 15 and not seen(), patched
before = {(o, n): vars(owner_of(o)).get(n) for o, n in patched}
for _ in range(1000):
    aot_cache.arm()
    aot_cache.disarm()
after = {(o, n): vars(owner_of(o)).get(n) for o, n in patched}
assert after == before, [key for key in before if before[key] is not after[key]]

aot_cache.arm()
calls = []
for place, name in patched:  # somebody wraps all of them after us
    owner = owner_of(place)
    inner = vars(owner).get(name) or getattr(owner, name)
    def theirs(*args, inner=inner, key=(place, name), **kwargs):
        calls.append(key)
        return inner(*args, **kwargs)
    setattr(owner, name, theirs)
mine = {(o, n): vars(owner_of(o))[n] for o, n in patched}
assert {one["state"] for one in aot_cache.stats()["patches"]} == {"wrapped"}
aot_cache.disarm()
assert {(o, n): vars(owner_of(o))[n] for o, n in patched} == mine, "their hooks were taken out"
assert {one["state"] for one in aot_cache.stats()["patches"]} == {"passed by"}
assert torch.compile(lambda x: x + 1)(torch.ones(2)).tolist() == [2, 2] and calls, "and they are called"
assert aot_cache.stats()["total"]["frame"] == 0, "nothing is counted any more"

inductor_later.call_without_debug()
import torch._inductor.debug
assert type(torch._inductor.debug) is types.ModuleType
print("well")
"""


@pytest.mark.contract("patch")
def test_a_serving_process_gives_everything_back_and_leaves_others_hooks() -> None:
    done = python(SERVING, {})
    assert done.returncode == 0 and done.stdout.strip() == "well", done.stderr[-3000:]


def test_what_stands_in_for_a_module_is_given_back() -> None:
    code = """
import sys, types
import torch, torch._dynamo, torch._inductor
import aot_cache
from aot_cache.upstream.hooks import inductor_later
aot_cache.arm()
sys.modules.pop("torch._inductor.debug", None)
torch._inductor.__dict__.pop("debug", None)
inductor_later.call_without_debug()
assert type(torch._inductor.debug) is not types.ModuleType and not torch._inductor.debug.RECORD_GRAPH_EXECUTION
aot_cache.disarm()
assert torch._inductor.debug is sys.modules["torch._inductor.debug"]
assert type(torch._inductor.debug) is types.ModuleType
print("well")
"""
    done = python(code, {})
    assert done.stdout.strip() == "well", done.stderr[-3000:]
