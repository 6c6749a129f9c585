"""Kernels that a library makes, imports or chooses configs for no sooner than at its first launch: installed all the same."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_stub import Device
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from aot_cache.artifact import target as targets
from aot_cache.builder.pipeline import Built, Request, build
from aot_cache.errors import NotReady
from aot_cache.runtime import loader
from aot_cache.runtime.kernels import KernelSet
from aot_cache.runtime.ledger import Ledger
from aot_cache.store import read_bundle
from aot_cache.upstream.codec import triton_jit, triton_kernel
from aot_cache.upstream.hooks import torch_capture

ROOT = Path(__file__).parents[2]
KERNEL = """
import triton
import triton.language as tl

@triton.jit
def {name}(x, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)
"""
PACKAGE = {
    "__init__.py": "",
    "lazily.py": KERNEL.format(name="lazily"),
    "rewritten.py": KERNEL.format(name="rewritten")
    + """
import functools
import linecache

@functools.cache
def made():  # as xformers.triton.vararg_kernel does: another source, executed among the globals of the first one
    source, name = rewritten.src.replace("* 2", "* 3"), "<made from rewritten>"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    exec(compile(source, name, "exec"), globals(), found := {})
    return triton.jit(found["rewritten"])
""",
    "tuned.py": KERNEL.format(name="tuned")
    + """
zeroed = []

def pruned(configs, named, **kwargs):  # as gemlite's kernels do: other configs, with a hook that a result needs
    for config in configs:
        yield triton.Config({"BLOCK": config.kwargs["BLOCK"] * 2}, num_warps=2, pre_hook=lambda args: zeroed.append(1))

tuned = triton.autotune(
    [triton.Config({"BLOCK": 32}), triton.Config({"BLOCK": 64})], key=["n"], prune_configs_by={"early_config_prune": pruned}
)(tuned)
""",
}
RECIPE = """
import torch

from aot_cache import Call, Range, Recipe, declare, device

def lazily(x):
    from late_package.lazily import lazily
    lazily[(1,)](x, x.numel(), BLOCK=64)

def rewritten(x):
    from late_package.rewritten import made
    made()[(1,)](x, x.numel(), BLOCK=64)

def tuned(x):
    from late_package.tuned import tuned
    tuned[lambda meta: (1,)](x, x.numel())

def case(fn):
    return declare(name=fn.__name__, n=Range(5, 6))(lambda n: Call(fn, torch.empty(n, device=device())))

recipe = Recipe("late", [case(lazily), case(rewritten), case(tuned)])
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Built]:
    folder = tmp_path_factory.mktemp("late")
    (folder / "late_package").mkdir()
    for name, text in PACKAGE.items():
        (folder / "late_package" / name).write_text(text)
    (folder / "late_recipe.py").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
        patch.syspath_prepend(str(folder))
        found = build(Request(target=targets.get("h200"), store=folder / "store", model="late_recipe:recipe"))
        assert not found.failed and found.units == 4, "one each, and two configs"
        yield found
        for name in [name for name in sys.modules if name.startswith("late_")]:
            del sys.modules[name]


@pytest.fixture
def hits(built: Built, device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[KernelSet]:
    """The bundle in this process, which has the package and none of its modules; nothing may be compiled or measured."""

    def forbidden(self: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{self} missed")

    for name in [name for name in sys.modules if name.startswith("late_")]:
        del sys.modules[name]
    import late_package  # noqa: F401

    kernels = KernelSet(read_bundle(built.path), Ledger())
    monkeypatch.setattr(loader.SESSION, "_kernels", [kernels])
    monkeypatch.setattr(JITFunction, "_do_compile", forbidden)
    monkeypatch.setattr(Autotuner, "_bench", forbidden)
    monkeypatch.setattr(torch_capture, "cuda_is_up", lambda: True)
    monkeypatch.setattr(loader.SESSION, "_prime_libraries", lambda: None)
    with contextlib.ExitStack() as hooks:
        loader.arm("error")
        hooks.callback(loader.disarm)
        loader.HOOKS.once("triton", loader.SESSION.triton_hooks)
        yield kernels


def call(name: str, n: int) -> None:
    import late_recipe

    getattr(late_recipe, name)(torch.empty(n, device="cpu"))


def test_ready_imports_what_is_under_a_package_that_is_imported(hits: KernelSet, device: Device) -> None:
    loader.prime()
    assert "late_package.lazily:lazily" in hits.report.pending
    loader.ready()
    assert "late_package.lazily" in sys.modules and hits.report.pending == [] and hits.report.not_imported == {}
    loaded = len(device.loaded)
    call("lazily", 5)
    assert len(device.launched) == 1 and len(device.loaded) == loaded


def test_what_is_not_of_an_imported_package_is_left_alone(hits: KernelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "late_package")
    loader.ready()
    assert len(hits.report.pending) == 3 and not any(name.startswith("late_package") for name in sys.modules)


def test_a_module_that_cannot_be_imported_is_named(hits: KernelSet, monkeypatch: pytest.MonkeyPatch) -> None:
    class Refuses:
        def find_spec(self, name: str, *_: Any) -> None:
            if name == "late_package.lazily":
                raise RuntimeError("no such GPU")

    monkeypatch.setattr(sys, "meta_path", [Refuses(), *sys.meta_path])
    with pytest.raises(NotReady, match=r"lazily \(its module cannot be imported: RuntimeError: no such GPU\)"):
        loader.ready(strict=True)
    assert hits.report.pending == ["late_package.lazily:lazily"]


def test_a_kernel_made_from_another_of_its_name(hits: KernelSet, device: Device) -> None:
    loader.ready()
    assert "rewritten" in str(hits.report.stale), "its module has one of that name and of other source"
    call("rewritten", 5)
    assert len(device.launched) == 1 and hits.report.stale == {} and loader.LEDGER.to_json()["total"]["late_install"]


def test_a_choice_among_configs_that_a_tuner_makes_when_it_is_called(hits: KernelSet, device: Device) -> None:
    import late_package.tuned as module

    loader.ready()
    assert hits.report.unchosen == {}
    tuning = hits.bundle.manifest["tunings"][0]
    triton_kernel.choose([module.tuned], tuning["key"], {"BLOCK": 128, "num_warps": 2, "num_ctas": 1, "num_stages": 3})
    call("tuned", 5)
    (config,) = module.tuned.cache.values()
    assert len(device.launched) == 1 and module.zeroed == [1], "its own hook ran, once"
    assert config.kwargs == {"BLOCK": 64}, "the first choice that was given stays"
    loader.GUARD.capture_is_over()
    assert list(module.tuned.cache.values()) == [config], "it was no choice for one capture only"


def test_a_choice_can_be_replaced_and_forgotten(hits: KernelSet, device: Device) -> None:
    import late_package.tuned as module

    loader.ready()
    tuning = hits.bundle.manifest["tunings"][0]
    wanted = {"BLOCK": 128, "num_warps": 2, "num_ctas": 1, "num_stages": 3}
    call("tuned", 5)
    assert not triton_kernel.choose([module.tuned], tuning["key"], wanted, replace=True)
    call("tuned", 5)
    assert [config.kwargs for config in module.tuned.cache.values()] == [{"BLOCK": 128}]
    triton_kernel.forget(module.tuned, tuple(triton_jit.decode(part) for part in tuning["key"]))
    assert module.tuned.cache == {}
