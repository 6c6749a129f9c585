"""Inductor's kernels that would measure or load inside a capture: upstream's own classes, without a GPU beneath them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from contracts import need, parameters
from pretend import capture
from torch._inductor.runtime.static_triton_launcher import StaticallyLaunchedTritonKernel
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

import aot_cache
from aot_cache.errors import CacheMiss
from aot_cache.runtime import loader, policy

pytestmark = pytest.mark.contract("inductor_miss")


@pytest.fixture(autouse=True)
def _armed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(policy, "_default", None)
    loader.LEDGER.reset()
    loader.MISSES.reset()
    loader.GUARD.forget_warnings()
    aot_cache.arm("fallback")
    yield
    aot_cache.disarm()


@pytest.fixture
def tuner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A kernel with three configs, that counts what is measured."""
    found: Any = CachingAutotuner.__new__(CachingAutotuner)
    found.fn = SimpleNamespace(__name__="triton_red_fused_sum_0")
    found.launchers = [SimpleNamespace(config=number) for number in range(3)]
    found.measured = []
    monkeypatch.setattr(CachingAutotuner, "benchmark_all_configs", lambda self: self.measured.append(1) or 1 / 0)
    monkeypatch.setattr(CachingAutotuner, "get_coordinate_descent_tuner", lambda self: 1 / 0, raising=False)
    return found


def counts() -> dict[str, int]:
    return {kind: count for kind, count in aot_cache.stats()["in_capture"].items() if count}


def test_where_a_kernel_measures() -> None:
    """`run` measures only through these two, and takes the one launcher that is left."""
    source = inspect.getsource(CachingAutotuner.run)
    need("self.autotune_to_one_config(" in source, "CachingAutotuner.run measures elsewhere")
    need("self.coordinate_descent_tuning(" in source, "CachingAutotuner.run descends elsewhere")
    need("(launcher,) = self.launchers" in source, "CachingAutotuner.run does not take its only launcher")
    need(parameters(CachingAutotuner.coordinate_descent_tuning)[:2] == ["self", "launcher"], "what descending is given")


def test_the_first_config_is_taken_and_forgotten(tuner: Any) -> None:
    configs = list(tuner.launchers)
    with capture():
        tuner.autotune_to_one_config()
    assert tuner.launchers == configs[:1] and not tuner.measured and counts() == {"fallback": 1}
    loader.GUARD.capture_is_over()
    assert tuner.launchers == configs
    with pytest.raises(ZeroDivisionError):
        tuner.autotune_to_one_config()
    assert tuner.measured == [1], "outside of a capture it measures as ever"
    (miss, *_) = aot_cache.stats()["misses"]
    assert (miss["kind"], miss["name"], miss["action"]) == ("tuning", "triton_red_fused_sum_0", "first config")


def test_nothing_descends_inside_a_capture(tuner: Any) -> None:
    with capture():
        assert tuner.coordinate_descent_tuning(tuner.launchers[1]) is tuner.launchers[1]
    assert counts() == {"fallback": 1}


@pytest.mark.parametrize("name", ["error", "observe"])
def test_policies(tuner: Any, name: str) -> None:
    aot_cache.arm(name)
    with capture(), pytest.raises(CacheMiss if name == "error" else ZeroDivisionError):
        tuner.autotune_to_one_config()
    assert len(tuner.launchers) == 3 and counts() == ({"refused": 1} if name == "error" else {})


def kernel() -> Any:
    found: Any = StaticallyLaunchedTritonKernel.__new__(StaticallyLaunchedTritonKernel)
    found.name = "triton_poi_fused_add_0"
    return found


def test_a_load_inside_a_capture_is_unsafe(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[int] = []
    aot_cache.disarm()
    monkeypatch.setattr(StaticallyLaunchedTritonKernel, "load_kernel", lambda self, device: loads.append(device))
    aot_cache.arm()
    with capture(), pytest.warns(loader.AotCacheWarning, match="triton_poi_fused_add_0 was loaded inside"):
        kernel().load_kernel(0)
    assert loads == [0] and counts() == {"unsafe": 1, "module_load": 1}
    aot_cache.arm("error")
    with capture(), pytest.raises(CacheMiss, match="is compiled, but not loaded, inside a CUDA graph capture"):
        kernel().load_kernel(0)
    assert loads == [0]
    kernel().load_kernel(1)
    assert loads == [0, 1]
    aot_cache.disarm()
