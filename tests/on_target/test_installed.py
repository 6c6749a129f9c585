"""From the build to the launch: a real bundle of every kind of launch, installed, is what Triton's own launch path finds.

Only the device is not real: what would load a module there, or launch it, takes a note of it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_kernels as sample
import torch
import triton
from asking import Asked, asked_for, name_of
from gpu_stub import Device
from triton.compiler import CompiledKernel
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from aot_cache.artifact import manifest
from aot_cache.artifact import target as targets
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.errors import BundleCorrupt
from aot_cache.runtime.kernels import KernelSet
from aot_cache.runtime.ledger import Ledger
from aot_cache.store import read_bundle
from aot_cache.upstream.codec import triton_kernel, triton_names

pytestmark = pytest.mark.usefixtures("device")
ROOT = Path(__file__).parents[2]
MADE = "sample_kernels:make_kernel.<locals>.made"
ADDER = "sample_kernels:make_adder.<locals>.adder"
TUNERS = [value for value in vars(sample).values() if isinstance(value, Autotuner)]
PACKED = [[n * tokens for n in range(requests + 1)] for requests in (1, 2, 3) for tokens in (1, 5, 16)]

Launch = Callable[[], Any]
LAUNCHES: dict[str, list[Launch]] = {
    kind: [lambda host=host, n=n: host(n, "cpu") for n in sample.SIZES] for kind, host in sample.KINDS.items()
}
LAUNCHES["packed"] = [lambda starts=starts: sample.run_packed(torch.tensor(starts), "cpu") for starts in PACKED]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The bundle of every kind, built by a worker process of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        built = pipeline.build(
            Request(target=targets.get("h200"), store=tmp_path_factory.mktemp("store"), model="sample_kernels:recipe")
        )
    assert not built.failed and not built.sampled
    return built


def functions() -> list[JITFunction]:
    return [value for value in gc.get_objects() if issubclass(type(value), JITFunction)]


def _forget() -> None:
    for function in functions():  # in a frame of its own: the last one must not live on in a fixture's
        function.device_caches.clear()


@pytest.fixture(autouse=True)
def _nothing_installed() -> Iterator[None]:
    _forget()  # kernels of tests elsewhere, whose modules the collector may not have seen yet
    yield
    _forget()
    for tuner in TUNERS:
        tuner.cache.clear()


def ready(kernels: KernelSet) -> int:
    """Install and load on device 0, as `aot_cache.prime` does; returns how many units are new."""
    new = kernels.install(0)
    kernels.prime(0)
    return new


@pytest.fixture
def kernels(built: Built) -> KernelSet:
    """The bundle, installed on device 0 and loaded."""
    sample.made_once()
    kernels = KernelSet(read_bundle(built.path, built.digest), Ledger())
    assert ready(kernels) == built.units
    return kernels


def in_memory() -> dict[Asked, CompiledKernel]:
    """Everything in Triton's in-memory caches for device 0."""
    found: dict[Asked, CompiledKernel] = {}
    for function in functions():
        if 0 in function.device_caches:
            found |= {(name_of(function), key): kernel for key, kernel in function.device_caches[0][0].items()}
    return found


def test_what_is_asked_for_and_what_is_installed_are_the_same(built: Built) -> None:
    asked: set[Asked] = set()
    for launches in LAUNCHES.values():
        for launch in launches:
            asked |= asked_for(launch, *TUNERS)
    assert not in_memory()
    kernels = KernelSet(read_bundle(built.path), Ledger())
    ready(kernels)
    assert set(in_memory()) == asked
    assert kernels.report.installed == kernels.report.units == built.units == len(asked)


def test_the_report_after_installing(kernels: KernelSet) -> None:
    report = kernels.report
    assert report.pending == [] and report.stale == {} and report.unchosen == {} and report.other_kind == ""
    assert report.devices == [0] and report.primed == report.units
    assert not kernels.waiting(0) and kernels.waiting(1)
    assert kernels.install(0) == kernels.prime(0) == 0, "a second time there is nothing to do"


def test_every_binary_is_loaded(kernels: KernelSet, built: Built, device: Device) -> None:
    bundle = read_bundle(built.path)
    expected = {
        (unit["metadata"].get("name", whole["metadata"].get("name")), bundle.object(unit["object"]))
        for whole in [manifest.whole(bundle).to_json()]
        for unit in whole["units"]
    }
    assert {(name, binary) for name, binary, _ in device.loaded} == expected
    assert kernels.report.modules == len(device.loaded) >= len(expected)


@pytest.mark.parametrize("kind", LAUNCHES)
def test_every_launch_hits(kind: str, kernels: KernelSet, device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own `run`, hit path and all, finds its kernel at every point; nothing is compiled, tuned or loaded."""

    def forbidden(self: Any, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"{self} missed with {args[:1]}")

    monkeypatch.setattr(JITFunction, "_do_compile", forbidden)
    monkeypatch.setattr(Autotuner, "_bench", forbidden)
    loaded = len(device.loaded)
    for launch in LAUNCHES[kind]:
        before = len(device.launched)
        launch()
        assert len(device.launched) > before
    assert len(device.loaded) == loaded
    if kind.startswith("tuned"):
        assert len(device.launched) == len(LAUNCHES[kind]), "one launch each: no candidate but the chosen one"


# What says where and when a kernel was compiled, not what it is.
PLACE = {"hash", "extern_libs", "ir_override"}


@pytest.mark.parametrize("kind", LAUNCHES)
def test_an_installed_kernel_is_what_triton_compiles(kind: str, built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """Field by field beside a kernel that Triton compiled here, for the same launch."""
    original: Any = JITFunction.run

    def warm_up(self: JITFunction, *args: Any, **kwargs: Any) -> Any:
        return original(self, *args, **{**kwargs, "warmup": True})

    sample.made_once()
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", warm_up)
        for launch in LAUNCHES[kind][-1:]:
            launch()
    compiled = in_memory()
    for function in functions():
        function.device_caches.clear()
    kernels = KernelSet(read_bundle(built.path), Ledger())
    ready(kernels)
    installed = in_memory()
    assert compiled
    for key, theirs in compiled.items():
        ours = installed[key]
        assert set(vars(theirs)) <= {*vars(ours), "kernel", "asm"}, "these two are made when they are read"
        # In capitals: the environment of the compiler's process.
        fields = {name for name in theirs.metadata._fields if not name.isupper()}
        assert {name for name in ours.metadata._fields if not name.isupper()} >= fields - {"ir_override"}
        same = {name for name in fields - PLACE if getattr(ours.metadata, name) == getattr(theirs.metadata, name)}
        assert same == fields - PLACE
        assert ours.packed_metadata == theirs.packed_metadata
        assert ours.name == theirs.name
        assert ours.kernel == theirs.kernel == ours.asm["cubin"], "the binary"
        assert type(ours.kernel) is type(theirs.kernel) and type(ours.asm) is type(theirs.asm)
        for name in ("fn", "language", "ext", "name", "signature"):
            assert getattr(ours.src, name) == getattr(theirs.src, name), name
        assert list(ours.src.signature) == list(theirs.src.signature), "the order of arguments"
        theirs._init_handles()
        for name in ("module", "function", "n_regs", "n_spills", "n_max_threads"):
            assert getattr(ours, name) == getattr(theirs, name), name


def test_the_first_config_that_fits_is_chosen(kernels: KernelSet) -> None:
    choices = {key[0]: config.kwargs["BLOCK"] for key, config in sample.tuned.cache.items()}
    assert choices == {1: 16, 2: 16, 4: 16, 16: 16, 32: 32, 64: 64}


def test_a_choice_that_is_there_stays(built: Built) -> None:
    """The library, or the user, chose before the bundle came."""
    sample.tuned.cache[(64, "torch.float32")] = sample.TUNED_CONFIGS[2]
    ready(KernelSet(read_bundle(built.path), Ledger()))
    assert sample.tuned.cache[(64, "torch.float32")] is sample.TUNED_CONFIGS[2]


def test_a_kernel_that_is_there_stays(built: Built) -> None:
    """What the process compiled before is not replaced: a CUDA graph may hold it."""
    launch = LAUNCHES["scale"][0]
    ((_, key),) = asked_for(launch)
    own = object()
    sample.scale.device_caches[0][0][key] = own
    ready(KernelSet(read_bundle(built.path), Ledger()))
    assert sample.scale.device_caches[0][0][key] is own


def test_kernels_that_are_made_later_are_pending(built: Built) -> None:
    sample._made.clear()
    getattr(triton.runtime.jit, "_triton_jit_function_registry", {}).pop(MADE, None)  # keeps the last of each name
    gc.collect()
    kernels = KernelSet(read_bundle(built.path), Ledger())
    first = ready(kernels)
    assert kernels.report.pending == [MADE] and kernels.waiting(0)
    sample.made_once()
    asked = {key for launch in LAUNCHES["made"] for key in asked_for(launch)}
    assert ready(kernels) == built.units - first == len(asked)
    assert kernels.report.pending == [] and not kernels.waiting(0)
    assert asked <= set(in_memory())


def test_a_factorys_kernels_are_each_their_own(kernels: KernelSet, device: Device) -> None:
    """The two that were built, one of them made again later, and one that nobody declared."""
    names = [kernel["name"] for kernel in kernels.bundle.manifest["kernels"]]
    assert sum("adder@" in name for name in names) == 2
    one, two = (set(kernel.device_caches[0][0].values()) for kernel in (sample.one_more, sample.two_more))
    assert one and two and {k.hash for k in one}.isdisjoint(k.hash for k in two), "the binaries are two"
    name = ADDER
    again, third = sample.make_adder(2), sample.make_adder(3)
    assert kernels.adopt(again, name, 0) and not kernels.adopt(third, name, 0)
    assert {k.hash for k in again.device_caches[0][0].values()} == {k.hash for k in two}
    assert not third.device_caches[0][0]
    assert kernels.report.installed == kernels.report.units


def test_one_of_a_factorys_kernels_may_come_later(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    getattr(triton.runtime.jit, "_triton_jit_function_registry", {}).pop(ADDER, None)  # keeps the last of each name
    gc.collect()  # what another test has made of this factory is not part of this one
    everything = triton_kernel.functions_in_memory

    def without_the_second(names: set[str]) -> dict[str, list[JITFunction]]:
        return {name: [f for f in found if "[2]" not in name_of(f)] for name, found in everything(names).items()}

    kernels = KernelSet(read_bundle(built.path), Ledger())
    with monkeypatch.context() as patch:
        patch.setattr(triton_kernel, "functions_in_memory", without_the_second)
        ready(kernels)
    (waiting,) = [name for name in kernels.report.pending if "adder" in name]
    assert kernels.report.stale == {} and kernels.waiting(0) and not sample.two_more.device_caches[0][0]
    assert ready(kernels) and waiting not in kernels.report.pending and sample.two_more.device_caches[0][0]


def test_kernels_that_nothing_tells_apart_are_not_installed(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two that look the same may be of other code: none is taken, and it is said why."""
    also = sample.make_adder(1)
    monkeypatch.setattr(triton_names, "hidden", lambda function: (("table in adder", int(function is also)),))
    kernels = KernelSet(read_bundle(built.path), Ledger())
    ready(kernels)
    ((name, why),) = kernels.report.stale.items()
    assert "adder@" in name and "table in adder" in why
    assert not sample.one_more.device_caches[0][0] and not also.device_caches[0][0]
    assert sample.two_more.device_caches[0][0]


def test_odd_objects_in_memory_do_no_harm(built: Built) -> None:
    """Kernels made inside functions are looked for among all objects of the process, whatever they are."""

    class Odd:
        __module__ = property(lambda self: 1)  # type: ignore[assignment]

        @property
        def __class__(self) -> Any:  # lazy modules import themselves when they are asked
            raise RuntimeError("touched")

    odd = [Odd()]
    kernels = KernelSet(read_bundle(built.path), Ledger())
    assert ready(kernels) and odd


def closure_of(kernels: KernelSet, name: str) -> dict[str, Any]:
    entry = next(kernel for kernel in kernels.bundle.manifest["kernels"] if kernel["name"] == name)
    closure: dict[str, Any] = entry["closure"]
    return closure


def test_a_kernel_of_other_source_is_not_installed(built: Built) -> None:
    kernels = KernelSet(read_bundle(built.path), Ledger())
    name = "sample_kernels:scale"
    closure_of(kernels, name)[name]["src"] = "0" * 32
    installed = ready(kernels)
    assert kernels.report.stale == {name: f"the source of {name} differs"}
    assert name not in {kernel for kernel, _ in in_memory()} and 0 < installed < built.units
    assert name not in kernels.report.pending and not kernels.waiting(0)


def test_a_kernel_that_sees_another_global_is_not_installed(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = KernelSet(read_bundle(built.path), Ledger())
    refs = closure_of(kernels, "sample_kernels:scale")["sample_kernels:scale"]["refs"]
    assert refs["tl.load"]
    refs["tl.load"] = "triton language.core.something"
    ready(kernels)
    assert "tl.load in sample_kernels:scale was" in kernels.report.stale["sample_kernels:scale"]


def test_a_function_that_is_handed_in_is_part_of_the_source(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    """`apply` is given `double`: with another `double` here its binary is of other code."""
    monkeypatch.setattr(sample.double, "_src", sample.double.src.replace("2", "3"))
    monkeypatch.setattr(sample.double, "hash", None)
    monkeypatch.setattr(sample.apply, "hash", None)
    asked = asked_for(lambda: sample.run_nested(17, "cpu"))
    kernels = KernelSet(read_bundle(built.path), Ledger())
    ready(kernels)
    assert not asked & set(in_memory()), "the launch with the new `double` would run the old one's code"


def test_a_binary_that_was_damaged_is_found_and_leaves_nothing_behind(built: Built, tmp_path: Path) -> None:
    """What is left in Triton's caches can be launched: without the damaged binary it compiles again, as ever."""
    data = bytearray(built.path.read_bytes())
    data[-100] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    kernels = KernelSet(read_bundle(damaged, built.digest), Ledger())
    with pytest.raises(BundleCorrupt):
        ready(kernels)
    assert not [key for key, kernel in in_memory().items() if kernel.kernel is None], "kernels without a binary"


def test_what_is_found_can_be_launched(built: Built, device: Device) -> None:
    """Another thread may launch at any moment, also between installing and loading."""
    kernels = KernelSet(read_bundle(built.path), Ledger())
    kernels.install(0)
    for kernel in in_memory().values():
        kernel._init_handles()
    ready(kernels)
    assert len(in_memory()) == kernels.report.units


def test_every_unit_is_in_the_manifest_with_its_points(built: Built) -> None:
    whole = manifest.whole(read_bundle(built.path)).to_json()
    assert whole["complete"] and len(whole["units"]) == built.units and not whole["pruned"]
    reached = {case for unit in whole["units"] for case in unit["reached"]}
    assert reached == {*sample.KINDS, "packed"}
