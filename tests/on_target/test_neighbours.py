"""What a recording does not have, but shows: the third class of an integer that it has in two.

The bundle, Triton's compiler and its launch path are real; only the device is not.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_neighbours as sample
import torch
from gpu_stub import Device, serving
from triton import knobs
from triton.runtime.jit import JITFunction

from aot_cache.artifact import target as targets
from aot_cache.artifact.plan import Plan, Unit
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.runtime.session import Session
from aot_cache.upstream.codec import triton_jit

ROOT = Path(__file__).parents[2]
KERNELS: list[JITFunction[Any]] = [sample.plain, sample.typed, sample.unaligned, sample.not_of_one, sample.sized]
OF_CLASS = {1: 1, "D": 32, "": 7}
"""Class of an integer → such an integer."""


def build(folder: Path, **request: Any) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        return pipeline.build(Request(target=targets.get("h200"), store=folder / "store", **request))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    """(folder with a store, the plan of all classes)"""
    folder = tmp_path_factory.mktemp("neighbours")
    built = build(folder, model="sample_neighbours:recipe")
    assert not built.failed and built.neighbours == 0, "a recipe declares what it needs"
    return folder, Plan.read(built.path.with_suffix(".plan.json"))


def recorded(whole: tuple[Path, Plan], folder: Path, *classes: object) -> Path:
    """A plan as a recording has it that met integers of these classes only."""
    plan = whole[1]
    units = [unit for unit in plan.units if unit.kernel.endswith(":sized") or class_of(unit) in classes]
    unaligned = [unit for unit in plan.units if unit.kernel.endswith(":unaligned") and class_of(unit) == ""]
    units += unaligned if "" not in classes else []  # a multiple of 16 is of that class, too
    path = folder / "recorded.plan.json"
    Plan(
        recipe="server", target="h200", origin="recorded", triton=plan.triton, units=units, closures=plan.closures
    ).write(path)
    return path


def class_of(unit: Unit) -> object:
    return unit.specialization[1]["t"][1]


def names(units: list[Unit]) -> set[str]:
    return {f"{unit.kernel.rpartition(':')[2]} {class_of(unit)}" for unit in units}


@pytest.fixture
def session(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    with serving(monkeypatch, tmp_path, KERNELS):
        session = Session([].append)
        yield session
        session.disarm()


@pytest.mark.parametrize("two", [*itertools.combinations(OF_CLASS, 2)], ids=str)
def test_the_third_class_is_served(
    two: tuple[object, ...], whole: tuple[Path, Plan], session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded has two classes of each integer; a server meets all three, and compiles none of these."""
    plan = recorded(whole, tmp_path, *two)
    built = build(whole[0], model=None, plans=(plan,), out=tmp_path / "server.safetensors")
    assert not built.failed, "not_of_one cannot be built for 1, which nobody asked for"
    after = Plan.read(built.path.with_suffix(".plan.json"))
    (third,) = set(OF_CLASS) - set(two)
    lacks = (
        f"unaligned {third}" if third == 1 else f"not_of_one {third}"
    )  # recorded in one class only: it shows nothing
    assert names(list(after.units)) == names(list(whole[1].units)) - {lacks}
    assert built.neighbours == len(after.units) - len(Plan.read(plan).units) > 0 and built.units == len(after.units)
    compiled: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", lambda **about: compiled.append(about["fn"].name))
    assert session.load(built.path, None, True, []) is not None
    session.ready(True, {})
    for n in OF_CLASS.values():
        sample.step(n, "cpu")
    assert compiled == [lacks.partition(" ")[0]] and session.stats()["total"]["compile"] == 1


def test_without_neighbours(whole: tuple[Path, Plan], tmp_path: Path) -> None:
    plan = recorded(whole, tmp_path, "", "D")
    only = build(whole[0], model=None, plans=(plan,), out=tmp_path / "server.safetensors", neighbours=False)
    assert (only.units, only.neighbours) == (len(Plan.read(plan).units), 0)


def test_a_bundle_named_like_its_recording(whole: tuple[Path, Plan], tmp_path: Path) -> None:
    """The recording stays as it was: it is what the next build needs."""
    plan = recorded(whole, tmp_path, "", "D").rename(tmp_path / "server.plan.json")
    before = plan.read_bytes()
    built = build(whole[0], model=None, plans=(plan,), out=tmp_path / "server.safetensors")
    assert built.neighbours > 0 and plan.read_bytes() == before


def test_one_class_shows_nothing(whole: tuple[Path, Plan], tmp_path: Path) -> None:
    plan = recorded(whole, tmp_path, "D")
    alone = build(whole[0], model=None, plans=(plan,), out=tmp_path / "server.safetensors")
    assert (alone.units, alone.neighbours) == (len(Plan.read(plan).units), 0)


@pytest.mark.contract("triton_jit")
@pytest.mark.parametrize("kernel", [sample.plain, sample.typed, sample.unaligned], ids=lambda kernel: kernel.__name__)
def test_the_classes_are_those_of_triton_s_binder(kernel: JITFunction[Any], device: Device) -> None:
    """Every integer that a launch binds is of a class that is listed."""
    kernel.device_caches.clear()
    listed = triton_jit.integer_classes(kernel, 1)
    x = torch.zeros(64)
    integers = [1, 2, 15, 16, 17, 48, 2**31 - 1, 2**31, 2**40, 2**40 + 1, 2**63 - 1]
    bound = [triton_jit.bind(kernel, (x, n), {"BLOCK": 64})[1][1] for n in integers]
    assert [pair for pair in map(triton_jit.encode, bound) if pair not in listed] == []
    with_sign = [pair for pair in listed if pair["t"][0] != "u64"]
    assert all(pair in list(map(triton_jit.encode, bound)) for pair in with_sign), "and no other is"
