"""Constants that are known only when the server starts: compiled then, and never at a launch, in a capture or counted as a miss.

The bundle, Triton's compiler and its launch path are real; only the device is not.
"""

from __future__ import annotations

import ast
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sample_at_start as sample
import torch
from gpu_stub import Device, serving
from pretend import capture
from triton import knobs
from triton.runtime.jit import JITFunction

from aot_cache.artifact import manifest
from aot_cache.artifact import target as targets
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.render import bundle as render_bundle
from aot_cache.errors import DeclarationError
from aot_cache.runtime.session import Session
from aot_cache.store import read_bundle

ROOT = Path(__file__).parents[2]
KERNELS: list[JITFunction[Any]] = [sample.conv, sample.update.fn, sample.other]


def build(folder: Path, *marks: str) -> Built:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "tests"), str(ROOT)]))
        return pipeline.build(
            Request(target=targets.get("h200"), store=folder, model="sample_at_start:recipe", at_start=marks)
        )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return build(tmp_path_factory.mktemp("store"), "num_lines")


class Served:
    """A process with the bundle, and Triton's own count of what it compiles."""

    def __init__(self, session: Session, warnings: list[str]) -> None:
        self.session, self.warnings = session, warnings
        self.compiled: list[str] = []

    def launch(self, n: int, lines: int) -> None:
        sample.step(n, lines, "cpu")

    def total(self, *kinds: str) -> list[int]:
        found = self.session.stats()["total"]
        return [found[kind] for kind in kinds]


@pytest.fixture
def served(built: Built, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    sample.update.cache.clear()
    warnings: list[str] = []
    with serving(monkeypatch, tmp_path, KERNELS):
        session = Session(warnings.append)
        found = Served(session, warnings)
        monkeypatch.setattr(
            knobs.runtime, "jit_post_compile_hook", lambda **about: found.compiled.append(about["fn"].name)
        )
        assert session.load(built.path, None, True, []) is not None
        session.ready(True, {})
        yield found
        session.disarm()


def test_what_is_in_the_bundle(built: Built) -> None:
    """Each specialization once, without the values; of the tuner's, the config that is served."""
    found = manifest.served(read_bundle(built.path))
    names = [found.kernels[one.kernel].name.rpartition(":")[2] for one in found.at_start]
    # n is 1, divisible by 16, or neither
    assert sorted(names) == ["conv", "conv", "conv", "update"]
    positions = {"conv": {"num_lines": 2}, "update": {"num_lines": 1}}
    assert all(one.arguments == positions[name] for one, name in zip(found.at_start, names))
    assert all(one.specialization[at] == ["constexpr", None] for one in found.at_start for at in one.arguments.values())


def test_inspect_says_what_waits(built: Built) -> None:
    facts = bundle_facts.bundle(read_bundle(built.path))
    assert facts["at_start"] == {"specializations": 4, "constants": ["num_lines"]}
    terminal_lines = dict(render_bundle._summary(facts))
    assert terminal_lines["at start"] == "4 are compiled when num_lines is known"


def test_a_value_that_is_told(served: Served, device: Device) -> None:
    served.launch(5, 384)  # what was built
    assert served.total("compile", "late_compile") == [0, 0]
    loaded = len(device.loaded)
    served.session.ready(True, {"num_lines": 6112})
    assert served.total("compile", "module_load", "late_compile") == [0, 0, 4] and len(device.loaded) == loaded + 4
    for n in (1, 5, 16):
        served.launch(n, 6112)
    assert served.total("compile", "module_load", "late_compile", "tuning") == [0, 0, 4, 0]
    assert served.compiled == [] and served.session.misses.to_json() == [], "Triton's launch path compiles nothing"
    assert len(device.loaded) == loaded + 4
    served.session.ready(True, {"num_lines": 6112})
    assert served.total("late_compile") == [4], "a second time there is nothing to do"


def test_a_value_of_the_first_launch(served: Served) -> None:
    served.launch(5, 500)
    assert served.total("compile", "late_compile") == [0, 4] and served.compiled == []
    for n in (1, 5, 16):
        served.launch(n, 500)
    assert served.total("compile", "late_compile") == [0, 4] and served.session.misses.to_json() == []


def test_a_value_of_a_capture_s_first_launch(served: Served) -> None:
    """Too late for that launch, which is unsafe; the others are compiled when the capture is over."""
    with capture():
        sample.conv[(1,)](torch.zeros(64), 5, num_lines=700, BLOCK=64)
    assert served.total("unsafe", "late_compile") == [1, 0]
    served.session.guard.capture_is_over()
    assert served.total("unsafe", "late_compile") == [1, 3]
    for n in (1, 5, 16):
        served.launch(n, 700)
    assert served.total("unsafe", "late_compile") == [1, 3]


def test_another_specialization_is_a_miss_as_ever(served: Served) -> None:
    sample.conv[(1,)](torch.zeros(64), 5, num_lines=500, BLOCK=32)
    assert served.total("compile", "late_compile") == [1, 0] and len(served.compiled) == 1
    (miss,) = served.session.misses.to_json()
    assert miss["action"] == "compiled"


def test_a_value_that_does_not_compile_is_a_warning(served: Served) -> None:
    served.session.ready(True, {"num_lines": "no number"})
    assert len(served.warnings) == 4 and all("could not compile sample_at_start:" in text for text in served.warnings)
    served.session.ready(True, {"num_lines": 9})
    assert served.total("late_compile") == [4] and len(served.warnings) == 4


def test_threads_parse_one_at_a_time(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11's parser fails now and then when two threads are in it."""
    inside, seen = 0, []

    def parse(self: Any) -> Any:
        nonlocal inside
        inside += 1
        seen.append(inside)
        time.sleep(0.05)
        inside -= 1
        return ast.parse(self._src)

    monkeypatch.setattr(JITFunction, "parse", parse)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    served.session.ready(True, {"num_lines": 10})
    assert len(seen) >= 4 and set(seen) == {1}
    assert served.total("late_compile") == [4] and served.warnings == []


@pytest.mark.parametrize(
    ("mark", "words"),
    [
        ("nothing", "no kernel has a parameter nothing"),
        ("n", "to be a tl.constexpr"),
        ("a b", "a constant as argument"),
    ],
)
def test_a_mark_that_fits_nothing(
    built: Built, tmp_path_factory: pytest.TempPathFactory, mark: str, words: str
) -> None:
    with pytest.raises(DeclarationError, match=words):
        build(built.path.parents[1], mark)
    assert built.path.exists()
