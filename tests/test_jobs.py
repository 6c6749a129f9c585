"""Jobs of several ranks that tools start: what each rank is told, and that none is left waiting."""

from __future__ import annotations

import os
import sys

import jobs
import pytest


@pytest.mark.parametrize(("seen", "own"), [(None, ["0", "1"]), ("", ["0", "1"]), ("2,5", ["2", "5"])])
def test_each_rank_has_a_gpu_of_its_own(seen: str | None, own: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if seen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
    assert [jobs.own_gpu(rank) for rank in range(2)] == [{"CUDA_VISIBLE_DEVICES": name} for name in own]


def test_what_ranks_said_and_how_they_ended() -> None:
    script = "import os, sys; sys.stderr.write(os.environ['RANK'] * 100_000)"  # more than a pipe holds
    told = [{**os.environ, "RANK": rank} for rank in "01"]
    assert jobs.run([sys.executable, "-c", script], told, 60) == [(0, "0" * 100_000), (0, "1" * 100_000)]


def test_a_rank_that_fails_ends_those_that_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "GRACE", 0.0)
    script = "import os, sys, time; sys.exit('lost') if os.environ['RANK'] == '0' else time.sleep(600)"
    told = [{**os.environ, "RANK": rank} for rank in "01"]
    assert jobs.run([sys.executable, "-c", script], told, 300) == [(1, "lost\n"), (-9, "")]
