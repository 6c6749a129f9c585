"""Triton's misses inside a capture: real kernels and Triton's own launch path; only the device and the capture are not real."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import triton
import triton.language as tl
from gpu_stub import Device
from pretend import capture
from triton.compiler import CompiledKernel
from triton.runtime.autotuner import Autotuner
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import aot_cache
from aot_cache.errors import CacheMiss, DeclarationError
from aot_cache.runtime import loader, policy
from aot_cache.upstream.hooks import capture_mode


def kernels() -> dict[str, Any]:
    """New kernels, which nobody has launched."""

    @triton.jit
    def double(x, out, n, factor, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(x + at, mask=at < n) * factor, mask=at < n)

    resets: list[list[str]] = []

    @triton.jit
    def add(x, out, n, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + at, tl.load(out + at, mask=at < n) + tl.load(x + at, mask=at < n), mask=at < n)

    def measured(kernel_call: Any, quantiles: Any) -> list[float]:
        kernel_call()
        return [1.0, 1.0, 1.0]

    configs = [triton.Config({"BLOCK": block}) for block in (32, 64, 128)]
    tuned = triton.autotune(configs, key=["n"], do_bench=measured, cache_results=True)(add)
    tuned.pre_hook = lambda kwargs, reset_only=False: resets.append([str(reset_only)])
    return {"double": double, "add": add, "tuned": tuned, "resets": resets}


@pytest.fixture
def made(device: Device) -> Iterator[dict[str, Any]]:
    del device  # from Triton 3.8 on, kernels unload their modules when they go: there must be something to do that
    found = kernels()
    yield found
    for function in (found["double"], found["add"]):
        function.device_caches.clear()


@pytest.fixture(autouse=True)
def armed(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The guard, and nothing of it afterwards; and no choice that another test has left on disk."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    del device  # first
    loader.LEDGER.reset()
    loader.MISSES.reset()
    loader.GUARD.forget_warnings()
    with mock.patch.object(policy, "_default", None), mock.patch.dict(policy._own), mock.patch.dict(policy._twins):
        aot_cache.arm("fallback")
        yield
        aot_cache.disarm()


def counts(kinds: tuple[str, ...] = ("fallback", "unsafe", "refused")) -> dict[str, int]:
    found = aot_cache.stats()["in_capture"]
    return {kind: found[kind] for kind in kinds if found[kind]}


def launch(kernel: Any, n: int = 64, block: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    x, out = torch.ones(n), torch.zeros(n)
    kernel[(triton.cdiv(n, block), 1)](x, out, n, 2.0, BLOCK=block)
    return x, out


def tune(kernel: Any, n: int = 64) -> None:
    kernel[(1,)](torch.ones(n), torch.zeros(n), n)


def test_a_kernel_without_a_twin_compiles_relaxed_and_is_called_unsafe(
    made: dict[str, Any],
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    relaxed: list[str] = []
    original, load = capture_mode.relaxed, device.load_binary

    def noted() -> Any:
        relaxed.append("enter")
        return original()

    def load_binary(*args: Any) -> Any:
        relaxed.append("load")
        return load(*args)

    monkeypatch.setattr(capture_mode, "relaxed", noted)
    monkeypatch.setattr(driver.active.utils, "load_binary", load_binary)
    with capture(), pytest.warns(loader.AotCacheWarning, match="double was compiled inside a CUDA graph capture"):
        launch(made["double"])
    assert len(device.launched) == len(device.loaded) == 1 and relaxed[0] == "enter" and relaxed[-1] == "load"
    assert counts() == {"unsafe": 1}
    assert aot_cache.stats()["unsafe"] == [f"{__name__}:kernels.<locals>.double"]
    with capture(), warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        launch(made["double"])
        launch(made["double"], 128, 128)
    assert counts() == {"unsafe": 2}, "a hit, and another specialization"
    assert len(device.launched) == 3


def test_a_twin_runs_in_the_kernel_s_place(made: dict[str, Any], device: Device) -> None:
    seen: list[Any] = []

    @aot_cache.fallback(made["double"])
    def twin(x: torch.Tensor, out: torch.Tensor, factor: float, BLOCK: int, grid: tuple[int, int, int]) -> None:
        seen.append((factor, BLOCK, grid))
        torch.mul(x, factor, out=out)

    with capture(), mock.patch.object(JITFunction, "compile", side_effect=AssertionError, create=True):
        x, out = launch(made["double"], 100, 64)
    torch.testing.assert_close(out, x * 2)
    assert seen == [(2.0, 64, (2, 1, 1))] and type(seen[0][1]) is int
    assert counts() == {"fallback": 1} and not device.launched and not device.loaded
    launch(made["double"], 100, 64)
    assert len(device.launched) == 1 and len(seen) == 1, "outside of a capture it compiles as ever"
    with capture():
        launch(made["double"], 100, 64)
    assert len(device.launched) == 2 and len(seen) == 1 and counts() == {"fallback": 1}, "and then it hits"


def test_a_twin_takes_what_it_names(made: dict[str, Any]) -> None:
    got: list[dict[str, Any]] = []

    @aot_cache.fallback(made["double"])
    def everything(**arguments: Any) -> None:
        got.append(arguments)

    with capture():
        launch(made["double"])
    assert sorted(got[0]) == ["BLOCK", "factor", "n", "out", "x"] and got[0]["n"] == 64


@pytest.mark.parametrize("twin", [lambda x, outt: None, lambda what, /: None])
def test_a_twin_that_takes_something_else_is_refused(made: dict[str, Any], twin: Any) -> None:
    with pytest.raises(DeclarationError, match=r"takes (outt|what)"):
        aot_cache.fallback(made["double"])(twin)


def test_a_twin_for_no_kernel_is_refused() -> None:
    with pytest.raises(DeclarationError, match="a Triton kernel that gets an eager fallback"):
        aot_cache.fallback(test_a_twin_for_no_kernel_is_refused)
    with pytest.raises(DeclarationError, match="a function, a module or a Triton kernel"):
        aot_cache.fallback(len)


def test_on_rocm_it_raises_before_anything_is_recorded(
    made: dict[str, Any],
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The silent case: HIP takes a compile inside a capture without a word, and the graph is wrong."""
    monkeypatch.setattr(torch.version, "hip", "7.1")
    with capture(), pytest.raises(CacheMiss, match=r"double.*inside a CUDA graph capture"):
        launch(made["double"])
    assert not device.launched and not device.loaded and counts() == {"refused": 1}
    aot_cache.fallback(made["double"])(lambda x, out: torch.mul(x, 2, out=out))
    with capture():
        x, out = launch(made["double"])
    torch.testing.assert_close(out, x * 2)
    assert not device.launched and counts() == {"refused": 1, "fallback": 1}
    launch(made["double"])
    assert len(device.launched) == 1


def test_the_error_names_what_is_missing_and_what_is_there(made: dict[str, Any], device: Device) -> None:
    launch(made["double"], 64, 64)
    launch(made["double"], 63, 32)
    aot_cache.arm("error")
    with capture(), pytest.raises(CacheMiss) as raised:
        launch(made["double"], 64, 128)
    message = str(raised.value)
    assert (
        "no specialization of" in message and "kernels.<locals>.double" in message and "inside a CUDA graph" in message
    )
    assert "for (x=*fp32 D, out=*fp32 D, n=i32 D, factor=fp32, BLOCK=128), inside a CUDA graph capture" in message
    assert "the nearest is for (x=*fp32 D, out=*fp32 D, n=i32 D, factor=fp32, BLOCK=64): " in message
    assert "BLOCK is 128 instead of 64; hint: declare it" in message, "the nearest of the two"
    assert "n is" not in message, "what is the same is not named"
    assert len(device.launched) == 2 and counts() == {"refused": 1}


def test_options_are_parts_that_differ(made: dict[str, Any]) -> None:
    launch(made["double"])
    aot_cache.arm("error")
    x = torch.ones(64)
    with capture(), pytest.raises(CacheMiss, match="num_warps is 8 instead of unset"):
        made["double"][(1,)](x, x, 64, 2.0, BLOCK=64, num_warps=8)
    with capture(), pytest.raises(CacheMiss, match=r"x is \*fp16 D instead of \*fp32 D"):
        made["double"][(1,)](x.half(), x, 64, 2.0, BLOCK=64)


def test_after_seal_the_policy_error_raises_everywhere(made: dict[str, Any], device: Device) -> None:
    aot_cache.arm("error")
    launch(made["double"])
    aot_cache.seal()
    launch(made["double"])
    with pytest.raises(CacheMiss, match=r"after seal\(\)"):
        launch(made["double"], 64, 32)
    with pytest.raises(CacheMiss, match=r"autotuner.*after seal\(\)"):
        tune(made["tuned"])
    assert len(device.launched) == 2


def test_observe_changes_nothing(made: dict[str, Any], device: Device) -> None:
    aot_cache.arm("observe")
    aot_cache.fallback(made["double"])(lambda x: 1 / 0)
    with capture(), warnings.catch_warnings():
        warnings.simplefilter("error")
        launch(made["double"])
        tune(made["tuned"])
    assert counts() == {} and counts(("tuning", "benchmark")) == {"tuning": 1, "benchmark": 3}
    assert device.launched == ["double", "add", "add", "add", "add"]
    assert [miss["action"] for miss in aot_cache.stats()["misses"]] == ["observed"] * 5


def test_one_kernel_s_own_policy(made: dict[str, Any]) -> None:
    assert aot_cache.policy("error")(made["double"]) is made["double"]
    aot_cache.policy("error")(made["tuned"])
    with capture():
        with pytest.raises(CacheMiss):
            launch(made["double"])
        with pytest.raises(CacheMiss):
            tune(made["tuned"])
    policy._own.clear()
    with capture(), pytest.warns(loader.AotCacheWarning):
        launch(made["double"])


# --- autotuners -------------------------------------------------------------------------------------------------------


def test_an_autotuner_measures_nothing_inside_a_capture(made: dict[str, Any], device: Device, tmp_path: Path) -> None:
    """Nothing is recorded that eager would not have launched: no benchmark, no reset of what a benchmark dirtied."""
    with capture(), pytest.warns(loader.AotCacheWarning):
        tune(made["tuned"])
    with capture():
        tune(made["tuned"])
    assert device.launched == ["add", "add"] and made["resets"] == []
    assert counts() == {"fallback": 1, "unsafe": 1} and counts(("tuning", "benchmark")) == {}
    assert not list(tmp_path.rglob("*.autotune.json")), "what was not measured is not written down"
    assert made["tuned"].best_config.kwargs == {"BLOCK": 32}
    loader.GUARD.capture_is_over()
    before = len(device.launched)
    tune(made["tuned"])
    assert len(device.launched) == before + 4, "outside of a capture it measures as ever: three configs, one launch"
    assert len(list(tmp_path.rglob("*.autotune.json"))) == 1 and ["True"] in made["resets"]
    with capture():
        tune(made["tuned"])
    assert counts() == {"fallback": 1, "unsafe": 1}, "and then it hits"


def test_a_capture_is_a_reason_to_forget_only_its_own_choice(made: dict[str, Any]) -> None:
    tune(made["tuned"], 64)
    with capture(), pytest.warns(loader.AotCacheWarning):
        tune(made["tuned"], 63)  # another key, and a specialization that is not there
    assert len(made["tuned"].cache) == 2
    loader.GUARD.capture_is_over()
    assert [key[0] for key in made["tuned"].cache] == [64]


def test_a_config_that_is_there_goes_before_the_first(made: dict[str, Any]) -> None:
    tune(made["tuned"], 64)
    made["tuned"].cache.clear()
    functions = made["add"].device_caches[0][0]
    for key in [key for key in functions if "('constexpr', 64)" not in key]:
        del functions[key]
    with capture(), warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(made["tuned"], 64)
    assert made["tuned"].best_config.kwargs == {"BLOCK": 64} and counts() == {"fallback": 1}


def test_a_tuned_kernel_with_a_twin_is_one_fallback(made: dict[str, Any], device: Device) -> None:
    aot_cache.fallback(made["tuned"])(lambda x, out: out.add_(x))
    with capture():
        tune(made["tuned"])
    assert counts() == {"fallback": 1} and not device.launched and not device.loaded


def test_a_failing_launch_leaves_the_tuner_as_it_was(made: dict[str, Any]) -> None:
    hook = made["tuned"].pre_hook
    with capture(), mock.patch.object(JITFunction, "_do_compile", side_effect=MemoryError):
        with pytest.raises(MemoryError):
            tune(made["tuned"])
    assert made["tuned"].pre_hook is hook


# --- a kernel that is compiled and not loaded --------------------------------------------------------------------------


def compile_only(kernel: Any) -> None:
    x = torch.ones(64)
    kernel.warmup(x, x, 64, 2.0, BLOCK=64, grid=(1,))


def test_a_late_load_is_unsafe(made: dict[str, Any], device: Device) -> None:
    compile_only(made["double"])
    assert not device.loaded
    with capture(), pytest.warns(loader.AotCacheWarning, match="double was loaded inside"):
        launch(made["double"])
    assert counts() == {"unsafe": 1} and len(device.loaded) == len(device.launched) == 1


def test_a_late_load_under_policy_error_raises(made: dict[str, Any], device: Device) -> None:
    aot_cache.arm("error")
    compile_only(made["double"])
    with capture(), pytest.raises(CacheMiss, match="is compiled, but not loaded"):
        launch(made["double"])
    assert not device.loaded and not device.launched
    launch(made["double"])
    assert len(device.launched) == 1


# --- what is written down ------------------------------------------------------------------------------------------------


def test_a_miss_is_written_as_the_next_build_needs_it(
    made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "misses.jsonl"
    monkeypatch.setenv("AOT_CACHE_MISSES", str(file))
    with capture(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        launch(made["double"])
        tune(made["tuned"])
    first, tuning, second = map(json.loads, file.read_text().splitlines())
    name = f"{__name__}:kernels.<locals>.double"
    assert (first["kind"], first["name"], first["in_capture"], first["action"]) == ("kernel", name, True, "unsafe")
    assert first["unit"]["kernel"] == name and first["unit"]["specialization"][4] == {"t": ["constexpr", 64]}
    assert tuning["kind"] == "tuning" and tuning["action"] == "first config"
    assert [c["BLOCK"] for c in tuning["tuning"]["candidates"]] == [32, 64, 128]
    assert [u["via"] for u in tuning["units"]] == [[[0, 0]], [[0, 1]], [[0, 2]]]
    assert second["kind"] == "kernel" and second["unit"] == {k: v for k, v in tuning["units"][0].items() if k != "via"}


# --- leaving nothing behind ------------------------------------------------------------------------------------------------


def hooked() -> dict[str, Any]:
    return {
        **{f"JITFunction.{n}": getattr(JITFunction, n) for n in ("run", "_do_compile", "_pack_args")},
        **{f"Autotuner.{n}": getattr(Autotuner, n) for n in ("run", "prune_configs", "_bench", "check_disk_cache")},
        "load": CompiledKernel._init_handles,
        "listener": triton.knobs.compilation.listener,
        "build": triton.runtime.build._build,
        "modules": getattr(triton.runtime.build, "compile_module_from_src", None),
    }


def test_disarmed_nothing_is_left(made: dict[str, Any], device: Device) -> None:
    aot_cache.disarm()
    plain = hooked()
    aot_cache.arm()
    assert {name for name, value in hooked().items() if value is not plain[name]} >= {"JITFunction._do_compile", "load"}
    assert (
        hooked()["JITFunction.run"] is plain["JITFunction.run"] and hooked()["Autotuner.run"] is plain["Autotuner.run"]
    )
    aot_cache.disarm()
    assert all(value is plain[name] for name, value in hooked().items())
    with capture():
        launch(made["double"])
    assert counts() == {} and len(device.launched) == 1
