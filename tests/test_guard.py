"""Dynamo's misses inside a capture: real Dynamo, a backend that keeps graphs as they are, and a capture that is not there."""

from __future__ import annotations

import contextlib
import json
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch._dynamo
from contracts import python
from pretend import capture
from torch._dynamo import convert_frame

import aot_cache
from aot_cache.errors import CacheMiss, DeclarationError
from aot_cache.runtime import loader, policy

Tensor = torch.Tensor


class Made:
    """Compiled functions that nobody has called, and how often anything of them was traced or compiled."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []
        self.frames: list[str] = []

    def backend(self, graph: Any, inputs: Any) -> Any:
        self.graphs.append(graph)
        return graph.forward

    def plain(self, **options: Any) -> Callable[[Tensor], Tensor]:
        def plain(x: Tensor) -> Tensor:
            return x.sin() + 1

        return torch.compile(plain, backend=self.backend, **options)

    def broken(self) -> Callable[[Tensor, bool], Tensor]:
        def helper(x: Tensor) -> Tensor:
            return x * 3

        def broken(x: Tensor, drafts: bool) -> Tensor:
            y = x + 1
            torch._dynamo.graph_break()
            return helper(y) if drafts else y - 1

        return torch.compile(broken, backend=self.backend)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """The guard armed; beneath it a count of its own of the frames that are traced."""
    found = Made()
    original = convert_frame._compile

    def counted(code: Any, *args: Any, **kwargs: Any) -> Any:
        found.frames.append(code.co_name)
        return original(code, *args, **kwargs)

    monkeypatch.setattr(convert_frame, "_compile", counted)
    torch._dynamo.reset()
    loader.LEDGER.reset()
    loader.MISSES.reset()
    with mock.patch.object(policy, "_default", None), mock.patch.dict(policy._own):
        aot_cache.arm("fallback")
        yield found
        aot_cache.disarm()
    loader.LEDGER.reset()
    torch._dynamo.reset()


def counts(which: str = "in_capture") -> dict[str, int]:
    return {kind: count for kind, count in aot_cache.stats()[which].items() if count}


X = torch.arange(4.0)


@pytest.mark.parametrize("options", [{}, {"fullgraph": True}, {"dynamic": True}], ids=str)
def test_the_table_of_the_contract(made: Made, options: dict[str, Any]) -> None:
    call = made.plain(**options)
    with capture():
        torch.testing.assert_close(call(X), X.sin() + 1)
    assert counts() == {"fallback": 1} and not made.frames and not made.graphs, "miss, capture active: eager"
    call(X)
    assert made.frames == ["plain"] and len(made.graphs) == 1, "miss, no capture: it compiles, nothing was remembered"
    with capture():
        torch.testing.assert_close(call(X), X.sin() + 1)
    call(X)
    assert counts() == {"fallback": 1} and len(made.frames) == 1, "hit: nothing happens"
    assert counts("total") == {"fallback": 1, "frame": 1, "graph_compile": 1}
    with capture():
        call(X.double())
    assert counts() == {"fallback": 2} and len(made.frames) == 1, "guards that fail are a miss"


def test_nested_frames_and_the_rest_after_a_graph_break(made: Made) -> None:
    call = made.broken()
    with capture():
        torch.testing.assert_close(call(X, True), (X + 1) * 3)
    assert counts() == {"fallback": 1} and not made.frames, "the call as a whole, with all that it calls"
    call(X, False)
    traced = len(made.frames)
    with capture():
        torch.testing.assert_close(call(X, True), (X + 1) * 3)
    assert counts() == {"fallback": 2} and len(made.frames) == traced, (
        "the warm-up took another branch than the capture"
    )
    assert "resume" in aot_cache.stats()["misses"][-1]["name"]
    call(X, True)
    assert len(made.frames) == traced + 1


def test_without_us_the_branch_is_compiled_inside_the_capture(made: Made) -> None:
    aot_cache.disarm()
    call = made.broken()
    call(X, False)
    traced = len(made.frames)
    with capture():
        call(X, True)
    assert len(made.frames) == traced + 1 and counts() == {}


def test_a_compiled_function_in_a_compiled_function_that_missed(made: Made) -> None:
    inner = made.plain()
    inner(X)

    @torch.compile(backend=made.backend)
    def outer(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return inner(x) + 1

    traced = len(made.frames)
    with capture():
        torch.testing.assert_close(outer(X), X.sin() + 2)
    assert counts() == {"fallback": 1} and len(made.frames) == traced, "the inner one hits"


def test_the_refusal_of_newer_torch_does_not_come_first(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch >= 2.14 raises where it traces inside a capture. Older ones are made to do so here."""
    if not hasattr(convert_frame, "trace_frame"):
        pytest.fail("upstream moved: frames are not traced by convert_frame.trace_frame")

    def refuse(*_: Any, **__: Any) -> Any:
        raise torch._dynamo.exc.TorchRuntimeError("torch.compile cannot JIT compile during CUDA graph capture.")

    call = made.plain()
    with capture(available=True):
        monkeypatch.setattr(convert_frame, "trace_frame", refuse)
        torch.testing.assert_close(call(X), X.sin() + 1)
    assert counts() == {"fallback": 1}
    aot_cache.disarm()
    with capture(), pytest.raises(torch._dynamo.exc.TorchRuntimeError, match="cannot JIT compile"):
        call(X)


@pytest.mark.skipif(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14), reason="torch < 2.14 does not refuse")
def test_the_refusal_of_this_torch_does_not_come_first(made: Made) -> None:
    call = made.plain()
    with capture(available=True), mock.patch.object(torch._C, "_cuda_isCurrentStreamCapturing", create=True):
        torch.testing.assert_close(call(X), X.sin() + 1)
    assert counts() == {"fallback": 1} and not made.frames


def test_many_threads_at_once(made: Made) -> None:
    call, wrong, gate = made.plain(), [], threading.Barrier(8)

    def run(number: int) -> None:
        x = torch.arange(number + 3.0)
        gate.wait()
        for _ in range(20):
            if not torch.equal(call(x), x.sin() + 1):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    with capture():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong and counts() == {"fallback": 160} and not made.frames
    call(X)
    assert made.frames == ["plain"]


# --- policies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suppressed", [False, True])
def test_policy_error_raises_and_a_later_call_compiles(made: Made, suppressed: bool) -> None:
    aot_cache.arm("error")
    call = made.plain()
    with mock.patch.object(torch._dynamo.config, "suppress_errors", suppressed), capture():
        with pytest.raises(
            CacheMiss, match=r"no graph for .*plain, inside a CUDA graph capture: it is not compiled by"
        ):
            call(X)
    assert counts() == {"refused": 1} and not made.frames
    call(X)
    assert made.frames == ["plain"]
    with capture():
        call(X)


def test_policy_error_after_seal(made: Made) -> None:
    aot_cache.arm("error")
    call = made.plain()
    call(X)
    aot_cache.seal()
    call(X)
    with pytest.raises(CacheMiss, match=r"after seal\(\)"):
        call(X.double())
    assert counts("after_seal") == {"refused": 1} and len(made.frames) == 1


def test_a_miss_after_seal_is_recorded(made: Made) -> None:
    aot_cache.seal()
    made.plain()(X)
    assert counts("after_seal") == {"frame": 1, "graph_compile": 1}
    (miss,) = aot_cache.stats()["misses"]
    assert miss["sealed"] and not miss["in_capture"] and miss["action"] == "compiled"


def test_policy_observe_changes_nothing(made: Made) -> None:
    aot_cache.arm("observe")
    with capture():
        made.plain()(X)
    assert counts() == {"frame": 1, "graph_compile": 1} and made.frames == ["plain"]


def test_a_function_s_own_policy(made: Made) -> None:
    strict, broken = made.plain(), made.broken()
    assert aot_cache.policy("error")(strict) is strict
    aot_cache.policy("error")(broken)
    broken(X, False)
    with capture():
        with pytest.raises(CacheMiss):
            strict(X)
        with pytest.raises(CacheMiss):
            broken(X, True)  # the rest after the graph break is part of it
    assert counts() == {"refused": 2}


def test_a_module_s_own_policy(made: Made) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2

    for layer in (Layer(), torch.compile(Layer(), backend=made.backend)):
        with mock.patch.dict(policy._own):
            aot_cache.policy("error")(layer)
            with capture(), pytest.raises(CacheMiss):
                torch.compile(Layer(), backend=made.backend)(X)


def test_policies_that_there_are_not(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (lambda: aot_cache.arm("eager"), lambda: aot_cache.policy("eager")):
        with pytest.raises(DeclarationError, match="policy to be one of fallback, error, observe, found 'eager'"):
            call()
    with pytest.raises(DeclarationError, match="a function, a module or a Triton kernel, found an object of type int"):
        aot_cache.policy("error")(3)
    monkeypatch.setattr(policy, "_default", None)
    monkeypatch.setenv("AOT_CACHE_POLICY", "eager")
    with pytest.warns(loader.AotCacheWarning, match="AOT_CACHE_POLICY to be one of"):
        aot_cache.arm()
    assert aot_cache.stats()["policy"] == "fallback", "a server is not brought down by a variable"


def test_the_policy_of_the_environment(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "_default", None)
    monkeypatch.setenv("AOT_CACHE_POLICY", "error")
    with capture(), pytest.raises(CacheMiss):
        made.plain()(X)
    aot_cache.arm("fallback")
    with capture():
        made.plain()(X)
    assert counts() == {"refused": 1, "fallback": 1}, "an argument goes before the variable"


# --- what is told ---------------------------------------------------------------------------------------------------------


def test_misses_are_written_to_a_file(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "misses.jsonl"
    monkeypatch.setenv("AOT_CACHE_MISSES", str(file))
    call = made.plain()
    with capture():
        for _ in range(9):
            call(X)
        call(X.double())
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["seen"] for line in lines] == [1, 2, 4, 8, 1], "a miss that repeats is not written every time"
    first = lines[0]
    assert first["aot-cache miss"] == 1 and first["kind"] == "graph" and first["name"].endswith("plain")
    assert first["sizes"] == {"L['x']": [4]} and first["place"].startswith(f"{__file__}:") and first["mode"] == "grad"
    assert lines[-1]["structure"] != first["structure"], "another dtype is another structure"


def test_a_miss_that_cannot_be_explained_is_still_safe(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is left alone: whoever builds from it would refuse a line that says nothing."""
    monkeypatch.setenv("AOT_CACHE_MISSES", str(tmp_path / "misses.jsonl"))
    monkeypatch.setattr(loader.SESSION._answers, "reasons", mock.Mock(side_effect=ZeroDivisionError))
    with capture():
        torch.testing.assert_close(made.plain()(X), X.sin() + 1)
    assert counts() == {"fallback": 1} and not (tmp_path / "misses.jsonl").exists()
    assert aot_cache.stats()["misses"][0]["why"] == "the reason is unknown"


def test_a_file_that_cannot_be_written_is_one_warning(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AOT_CACHE_MISSES", str(tmp_path))
    call = made.plain()
    with capture():
        with pytest.warns(loader.AotCacheWarning, match="cannot write the miss of .*plain"):
            call(X)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.testing.assert_close(call(X), X.sin() + 1)
    assert counts() == {"fallback": 2}


APPEND = """
import sys
from aot_cache.runtime.miss_log import append
for number in range(400):
    append(sys.argv[1], f"{sys.argv[2]} {number} " + "x" * 5000)
"""


def test_processes_append_whole_lines(tmp_path: Path) -> None:
    file = tmp_path / "misses"
    threads = [threading.Thread(target=python, args=(APPEND, {}, str(file), str(n))) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [line.split(" ") for line in file.read_text().splitlines()]
    assert {len(line) for line in lines} == {3} and {line[2] for line in lines} == {"x" * 5000}
    assert sorted((int(a), int(b)) for a, b, _ in lines) == [(a, b) for a in range(3) for b in range(400)]


def test_the_ledger_as_prometheus_text(made: Made) -> None:
    with capture():
        made.plain()(X)
    text = aot_cache.prometheus()
    assert 'aot_cache_events_in_capture_total{kind="fallback"} 1\n' in text
    assert 'aot_cache_events_total{kind="frame"} 0\n' in text and text.endswith("aot_cache_sealed 0\n")
    names = [line.split("{")[0].split(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert set(names) == {line.split(" ")[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert aot_cache.prometheus({**aot_cache.stats(), "sealed": True}).endswith("aot_cache_sealed 1\n")


# --- leaving nothing behind -------------------------------------------------------------------------------------------------

NOTHING_LEFT = """
import sys
if {first!r} == "arm":
    import aot_cache
    waiting = list(sys.meta_path)
    aot_cache.arm()
    assert "torch" not in sys.modules and "triton" not in sys.modules
    aot_cache.disarm()
    assert sys.meta_path == waiting
    aot_cache.arm()
import torch, triton, torch._dynamo, torch._inductor.runtime.triton_heuristics, torch._inductor.cpp_builder
import triton.runtime.autotuner, triton.runtime.jit, triton.runtime.build, triton.compiler
from torch._dynamo import convert_frame, decorators, eval_frame, output_graph
from torch._inductor.runtime import static_triton_launcher, triton_heuristics
from torch._inductor import cpp_builder
import aot_cache
if {first!r} == "arm":
    aot_cache.disarm()
def look():
    owners = [convert_frame, convert_frame.CatchErrorsWrapper, decorators, eval_frame, output_graph.OutputGraph,
        triton_heuristics.CachingAutotuner, static_triton_launcher.StaticallyLaunchedTritonKernel, cpp_builder.CppBuilder,
        triton.runtime.autotuner.Autotuner, triton.runtime.jit.JITFunction, triton.compiler.CompiledKernel,
        triton.runtime.build, triton.backends.nvidia.driver, torch.cuda.CUDAGraph, torch._TorchCompileInductorWrapper]
    found = {{(str(o), name): value for o in owners for name, value in vars(o).items() if callable(value)}}
    found["listener"] = triton.knobs.compilation.listener
    found["loads"] = list(triton.knobs.runtime.kernel_load_end_hook.calls)
    return found
def ours(found):
    return sorted(str(name) for name, value in found.items() if "aot_cache" in str(getattr(value, "__module__", "")))
plain = look()
assert not ours(plain), ours(plain)
aot_cache.arm()
assert len(ours(look())) >= 20, ours(look())
aot_cache.disarm()
after = look()
changed = [name for name in plain if plain[name] is not after[name] and plain[name] != after[name]]
assert not changed and plain.keys() == after.keys(), changed
assert not [finder for finder in sys.meta_path if "aot_cache" in type(finder).__module__]
print("nothing left")
"""


@pytest.mark.parametrize("first", ["arm", "import"])
def test_disarmed_nothing_is_left(first: str) -> None:
    done = python(NOTHING_LEFT.format(first=first), {})
    assert done.stdout == "nothing left\n", done.stderr[-2000:]


# --- which captures are active ------------------------------------------------------------------------------------------------


class FakeGraph:
    """What is hooked of `torch.cuda.CUDAGraph`."""

    fails = False

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if self.fails:
            raise RuntimeError("no capture")

    def capture_end(self) -> None:
        if self.fails:
            raise RuntimeError("lost")


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    from aot_cache.upstream.hooks import torch_capture

    monkeypatch.setattr(torch.cuda, "CUDAGraph", type("CUDAGraph", (FakeGraph,), dict(vars(FakeGraph))))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    seen = {"before": 0, "after": 0}

    def note(when: str) -> None:
        seen[when] += 1

    undo = torch_capture.watch_captures(lambda: note("before"), lambda: note("after"))
    yield seen
    undo()


def active(elsewhere: bool) -> bool:
    from aot_cache.upstream.hooks import torch_capture

    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(torch_capture.capturing()))
    if elsewhere:
        thread.start()
        thread.join()
        return found[0]
    return torch_capture.capturing()


@pytest.mark.parametrize(
    ("mode", "here", "elsewhere"), [("global", True, True), ("thread_local", True, False), ("relaxed", False, False)]
)
def test_a_capture_counts_where_it_forbids_to_compile(
    captures: dict[str, int], mode: str, here: bool, elsewhere: bool
) -> None:
    """The current stream is another one than is captured: only the mode tells."""
    graph: Any = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode=mode)
    assert (active(False), active(True)) == (here, elsewhere) and captures == {"before": 1, "after": 0}
    graph.capture_end()
    assert not active(False) and not active(True) and captures == {"before": 1, "after": 1}


def test_the_mode_by_place_and_by_default(captures: dict[str, int]) -> None:
    graph: Any = torch.cuda.CUDAGraph()
    graph.capture_begin(None, "relaxed")
    assert not active(True)
    graph.capture_end()
    graph.capture_begin()
    assert active(True)


def test_captures_that_fail_or_are_thrown_away_are_over(captures: dict[str, int]) -> None:
    graph: Any = torch.cuda.CUDAGraph()
    graph.fails = True
    with pytest.raises(RuntimeError, match="no capture"):
        graph.capture_begin()
    assert not active(True)
    graph.fails = False
    graph.capture_begin()
    graph.fails = True
    with pytest.raises(RuntimeError, match="lost"):
        graph.capture_end()
    assert not active(True)
    graph.fails = False
    graph.capture_begin()
    assert active(True)
    del graph
    assert not active(True)


def test_a_stream_that_may_not_be_asked_counts(captures: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", mock.Mock(side_effect=RuntimeError("implicit")))
    assert active(False)


# --- before a capture ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def primed(monkeypatch: pytest.MonkeyPatch, captures: dict[str, int]) -> Iterator[list[int]]:
    """How often the libraries were asked for, where captures begin in this process."""
    from aot_cache.upstream.hooks import cuda_libraries

    del captures  # a CUDAGraph that can begin
    calls: list[int] = []
    monkeypatch.setattr(cuda_libraries, "prime", lambda: calls.append(1))
    monkeypatch.setattr(cuda_libraries, "meanwhile", contextlib.nullcontext)
    with mock.patch.object(policy, "_default", None):
        aot_cache.arm("fallback")
        yield calls
        aot_cache.disarm()


def test_libraries_are_primed_before_a_capture(primed: list[int]) -> None:
    graph: Any = torch.cuda.CUDAGraph()
    graph.capture_begin(capture_error_mode="relaxed")
    graph.capture_end()
    assert primed == [1]
    aot_cache.ready()
    assert primed == [1, 1]


def test_nothing_is_primed_while_another_capture_forbids_it(primed: list[int]) -> None:
    first: Any = torch.cuda.CUDAGraph()
    first.capture_begin()
    second: Any = torch.cuda.CUDAGraph()
    second.capture_begin(capture_error_mode="relaxed")
    assert primed == [1]


def test_observe_primes_nothing(primed: list[int]) -> None:
    aot_cache.arm("observe")
    graph: Any = torch.cuda.CUDAGraph()
    graph.capture_begin()
    assert primed == []


def test_a_library_that_cannot_be_primed_is_a_warning(primed: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    from aot_cache.upstream.hooks import cuda_libraries

    monkeypatch.setattr(cuda_libraries, "prime", mock.Mock(side_effect=RuntimeError("CUDA out of memory")))
    graph: Any = torch.cuda.CUDAGraph()
    with pytest.warns(
        loader.AotCacheWarning, match="could not initialise CUDA's libraries before a capture: CUDA out of"
    ):
        graph.capture_begin()
