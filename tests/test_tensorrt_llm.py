"""TensorRT-LLM's capture loop (its PR 14986), on four ranks that have room for different batches: a stand-in with the order of
calls of both layouts, whose ranks hang without us.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import test_ranks
from contracts import python
from limits import HANGS
from test_ranks import RANKS

FAKE = Path(__file__).parent / "fake_tensorrt_llm"
SHORT, LONG = 5.0, 120.0
"""Seconds that a collective waits: where it is to hang, and where it is not."""
SCENES = (
    "all have room",
    "none has room for 8",
    "one has no room for 8",
    "one has no room for 8, dropped",
    "two lack, dropped",
    "one raises",
    "one raises, dropped",
    "the draft lacks",
    "told otherwise",
    "alone",
)
TWICE = {"1.2": 1, "main": 2}
"""Times that a layout goes over the shapes."""


def job(
    *scenes: str, layout: str, over: str, ours: bool = True, limit: float = LONG, **more: str
) -> tuple[dict[str, list[Any]], list[int | None]]:
    """(scene → what each rank said of it, exit codes)."""
    told = {"FAKE_TENSORRT_LLM": layout, "OVER": over, "LIMIT": str(limit), "OURS": str(int(ours)), **more}
    said, codes = test_ranks.job(*scenes, seconds=HANGS, script="tensorrt_llm_child.py", path=(FAKE,), **told)
    return {scene: [facts for _, facts in sorted(by_rank.items())] for scene, by_rank in said.items()}, codes


@dataclass(frozen=True)
class Job:
    """All scenes, on one layout, by one way of talking."""

    layout: str
    over: str
    said: dict[str, list[Any]]

    def ran(self, *shapes: tuple[int, int]) -> list[list[int]]:
        """What a rank runs for these shapes in this layout."""
        return [list(shape) for shape in shapes] * TWICE[self.layout]


@pytest.fixture(
    scope="module", params=[(layout, over) for layout in TWICE for over in ("torch", "another")], ids="-".join
)
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Job:
    layout, over = request.param
    folder = tmp_path_factory.mktemp("bundles")
    test_ranks.write(folder)
    bundle = {"AOT_CACHE": str(folder / "one.safetensors"), "AOT_CACHE_STRICT": "1"}
    said, codes = job(*SCENES, layout=layout, over=over, **bundle)
    assert codes == [0] * RANKS
    return Job(layout, over, said)


def test_all_capture_the_largest_first(done: Job) -> None:
    shapes = [(size, draft_len) for size in (8, 4, 2) for draft_len in (3, 0)]
    for rank in done.said["all have room"]:
        assert rank["ran"] == done.ran(*shapes) and rank["error"] == "" and rank["leaked"] == 0


def test_all_skip_what_none_has_room_for(done: Job) -> None:
    for rank in done.said["none has room for 8"]:
        assert rank["ran"] == done.ran((4, 0), (2, 0)) and rank["error"] == "" and rank["leaked"] == 0
        assert not [line for line in rank["said"] if "leave out" in line]


def test_ranks_that_differ_raise_before_a_forward(done: Job) -> None:
    """On every rank, with the rank that has no room, and how little it has; what the others had made is free again."""
    for rank in done.said["one has no room for 8"]:
        assert rank["ran"] == [] and rank["leaked"] == 0
        assert rank["error"].startswith(
            "RankDisagreement: expected every rank to capture batch_size=8, draft_len=0, or none"
        )
        assert "rank 2: batch is None (5 free blocks in its KV cache)" in rank["error"]


def test_ranks_that_differ_leave_the_shape_out(done: Job) -> None:
    for rank in done.said["one has no room for 8, dropped"]:
        assert rank["ran"] == done.ran((4, 0), (2, 0)) and rank["error"] == "" and rank["leaked"] == 0
        left_out = [
            line for line in rank["said"] if "all ranks leave out the graph of batch_size=8, draft_len=0" in line
        ]
        assert len(left_out) == TWICE[done.layout] and "rank 2: batch is None (5 free blocks" in left_out[0]


def test_each_rank_may_lack_another_size(done: Job) -> None:
    for rank in done.said["two lack, dropped"]:
        assert rank["ran"] == done.ran((2, 0)) and rank["error"] == "" and rank["leaked"] == 0


@pytest.mark.parametrize("scene", ["one raises", "one raises, dropped"])
def test_a_rank_that_raises_stops_all(done: Job, scene: str) -> None:
    """An error is not a lack of room: no rank goes on without it, whatever is to happen with shapes."""
    for number, rank in enumerate(done.said[scene]):
        assert rank["ran"] == [[8, 0]] and rank["leaked"] == 0
        if number == 1:
            assert rank["error"] == "RuntimeError: Can't allocate new blocks for window size 4096"
        else:
            assert rank["error"].startswith("RankDisagreement: expected every rank to make a batch for batch_size=4")
            assert "rank 1: " in rank["error"] and "Can't allocate new blocks" in rank["error"]


def test_a_draft_model_agrees_for_itself(done: Job) -> None:
    for target, draft in done.said["the draft lacks"]:
        assert target["ran"] == done.ran((8, 0), (4, 0), (2, 0)) and target["error"] == ""
        assert draft["ran"] == done.ran((4, 0)) and draft["error"] == "" and draft["leaked"] == 0


def test_ranks_that_are_told_otherwise_say_so(done: Job) -> None:
    """Else one would leave a shape out, and the others raise."""
    for rank in done.said["told otherwise"]:
        assert rank["ran"] == [] and rank["leaked"] == 0
        assert rank["error"].startswith("RankDisagreement: expected the same AOT_CACHE_MIXED on every rank")
        assert "rank 3: drop" in rank["error"]


def test_an_engine_without_peers_asks_nobody(done: Job) -> None:
    for number, rank in enumerate(done.said["alone"]):
        assert rank["ran"] == (done.ran((4, 0), (2, 0)) if number == 2 else done.ran((8, 0), (4, 0), (2, 0)))


def test_the_bundle_is_ready_before_the_warm_up(done: Job) -> None:
    for rank in done.said["all have room"]:
        lines = [line for line in rank["said"] if line.startswith("aot-cache is ready: 0 of 0 kernel specializations")]
        assert len(lines) == 1


@pytest.mark.parametrize("over", ["torch", "another"])
def test_it_hangs_without_us(over: str) -> None:
    """The rank without room is through at once, and the others wait for it until their collective gives up."""
    said, _ = job("one shape", layout="main", over=over, ours=False, limit=SHORT)
    ends = said["one shape"]
    assert [rank["error"] == "" for rank in ends] == [False, False, True, False], ends
    assert ends[2]["ran"] == [] and ends[2]["seconds"] < SHORT
    waited = [rank for number, rank in enumerate(ends) if number != 2]
    assert all(rank["ran"] == [[8, 0]] and rank["seconds"] > SHORT - 1 for rank in waited), ends


@pytest.mark.parametrize("over", ["torch", "another"])
def test_ranks_at_other_shapes_say_so(over: str) -> None:
    said, codes = job("other shapes", layout="1.2", over=over)
    assert codes == [0] * RANKS
    for rank in said["other shapes"]:
        assert rank["ran"] == [[8, 0]] and rank["error"].startswith("RankDisagreement: ") and rank["leaked"] == 0


def run(code: str, layout: str) -> subprocess.CompletedProcess[str]:
    """`code` beside the stand-in."""
    done = python(code, {"PYTHONPATH": str(FAKE), "FAKE_TENSORRT_LLM": layout})
    assert done.returncode == 0, done.stderr
    return done


def test_a_release_with_another_layout_is_named() -> None:
    done = run("import aot_cache.auto, tensorrt_llm._torch.pyexecutor.model_engine", "of tomorrow")
    assert done.stderr.count("this TensorRT-LLM has its warm-up elsewhere") == 1


def test_a_line_in_a_pth_file_is_enough(tmp_path: Path) -> None:
    """Processes that an engine starts by itself import nothing of ours; `site` does, for every Python of the image."""
    (tmp_path / "aot_cache.pth").write_text("import aot_cache.auto\n")
    code = f"import site; site.addsitedir({str(tmp_path)!r})\n"
    code += "from tensorrt_llm._torch.pyexecutor.model_engine import PyTorchModelEngine as engine\n"
    code += "print(engine.warmup.__module__)"
    assert run(code, "1.2").stdout.strip() == "aot_cache.upstream.hooks.tensorrt_llm_warmup"
