"""Four ranks over gloo, each a process: they go together or not at all, and nothing hangs."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from aot_cache.artifact import target as targets
from aot_cache.store import write_bundle

HERE = Path(__file__).parent
RANKS = 4
Said = dict[str, dict[int, Any]]


def write(folder: Path) -> None:
    """Two sound bundles with nothing in them."""
    for name in ("one", "other"):
        details = json.dumps(
            {"cases": [], "units": [], "tunings": [], "graphs": [], "calls": [], "failed": []}
        ).encode()
        digest = hashlib.sha256(details).hexdigest()
        lists = ("kernels", "units", "tunings", "native", "metadata_sets", "signatures", "binaries", "graphs")
        manifest = {"kind": "units", "recipe": name, "target": targets.get("cpu").properties(), "details": digest}
        manifest |= {"toolchain": {"triton": ""}, "metadata": {}, "graph_key": {}, "late": {}, **{n: [] for n in lists}}
        manifest |= {"spec": "", "origin": "traced", "ranks": 1, "complete": True}
        write_bundle(folder / f"{name}.safetensors", manifest, {digest: details})


def job(
    *scenes: str, seconds: float = 90, script: str = "rank_child.py", path: tuple[Path, ...] = (), **variables: str
) -> tuple[Said, list[int | None]]:
    """(what each rank said of each scene, exit codes; None for a rank that was still there at the end)."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS)}
    common |= {
        "PYTHONPATH": os.pathsep.join(map(str, [*path, HERE, HERE.parent])),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    command = [sys.executable, "-W", "ignore", str(HERE / script), *scenes]
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": str(n)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for n in range(RANKS)
    ]
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(0.1)
    codes = [process.poll() for process in processes]  # before one is killed, which others would notice
    said: Said = {}
    for process in processes:
        process.kill()
        for line in process.communicate()[0].splitlines():
            rank, name, facts = json.loads(line)
            said.setdefault(name, {})[rank] = facts
    return said, codes


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """One job for all scenes after which it goes on."""
    folder = tmp_path_factory.mktemp("bundles")
    write(folder)
    found, codes = job(FOLDER=str(folder))
    assert codes == [0] * RANKS
    return found


def everywhere(said: Said, scene: str) -> Any:
    """What all ranks say alike."""
    facts = [{k: v for k, v in one.items() if k != "seconds"} for one in said[scene].values()]
    assert len(facts) == RANKS and all(one == facts[0] for one in facts), facts
    return facts[0]


@pytest.mark.parametrize("scene", ["all say yes", "all the same"])
def test_agreement(said: Said, scene: str) -> None:
    assert everywhere(said, scene) == {"answer": None}


def test_disagreement_names_the_ranks_and_their_values(said: Said) -> None:
    error = (
        "expected every rank to agree on start, found rank 2: no memory; hint: see why on these ranks: the others agree"
    )
    assert everywhere(said, "one says no") == {"error": error}
    error = "expected the same bundle on every rank, found ranks 0, 1, 2: abc; rank 3: def"
    assert everywhere(said, "one differs") == {"error": error}


def test_ranks_at_different_places(said: Said) -> None:
    errors = {rank: facts["error"] for rank, facts in said["another place"].items()}
    assert errors[0].startswith("expected every rank to be at 'right', found ranks 1, 2, 3: at 'left'")
    assert errors[1] == errors[3] and errors[1].startswith(
        "expected every rank to be at 'left', found rank 0: at 'right'"
    )


def test_all_ranks_have_all_batches(said: Said) -> None:
    found = everywhere(said, "all have batches")
    assert found["ran"] == [8, 4, 1, 8, 4, 1], "all warmed up first, the largest first, and captured second"
    assert found["captured"] == [8, 4, 1] and found["sums"] == [10.0] * 3
    assert [entry["action"] for entry in found["report"]] == ["captured"] * 3


def test_a_shape_for_which_no_rank_has_a_batch_is_skipped(said: Said) -> None:
    found = everywhere(said, "none has a batch for 8")
    assert found["ran"] == [4, 1, 4, 1] and found["captured"] == [4, 1]
    assert found["report"][0] == {"shape": 8, "action": "skipped", "why": "no rank has a batch"}


def test_a_batch_that_one_rank_lacks_raises_before_anything_runs(said: Said) -> None:
    found = everywhere(said, "one has no batch for 8")
    error = "expected every rank to capture 8, or none, found rank 2: batch is None; "
    error += "hint: see why on these ranks: the others could capture it"
    assert found == {"ran": [], "error": error}


def test_a_batch_that_one_rank_lacks_drops_the_shape_on_all(said: Said) -> None:
    found = everywhere(said, "one has no batch for 8, dropped")
    assert found["ran"] == [4, 1, 4, 1] and found["captured"] == [4, 1]
    assert found["report"][0] == {"shape": 8, "action": "dropped", "why": "rank 2: batch is None"}


def test_a_unit_that_one_rank_lacks(said: Said) -> None:
    why = "rank 1: not everything that it needs is installed (model:gated: its graph is not loaded)"
    assert why in everywhere(said, "one lacks a unit")["error"]
    found = everywhere(said, "one lacks a unit, dropped")
    assert found["ran"] == [] and found["captured"] == []
    assert {entry["why"] for entry in found["report"]} == {why}


def test_a_miss_that_one_rank_sees_only_in_the_capture(said: Said) -> None:
    found = everywhere(said, "a miss during the capture")
    assert found["captured"] == [8, 1]
    (dropped,) = [entry for entry in found["report"] if entry["action"] == "dropped"]
    assert dropped["shape"] == 4 and dropped["why"].startswith("rank 3: ") and dropped["why"].endswith("(eager)")


def test_all_ranks_load_the_same_bundle_or_none(said: Said) -> None:
    assert everywhere(said, "the same bundle") == {"loaded": 1, "error": "", "warnings": 0}
    found = everywhere(said, "another bundle")
    assert found["loaded"] == 0 and "expected the same bundle on every rank, found ranks 0, 1, 2: " in found["error"]
    assert everywhere(said, "no bundle") == {"loaded": 0, "error": "", "warnings": 1}, "as ever: served without, warned"


def test_without_us_it_hangs() -> None:
    """The seed: one rank goes on, the others wait for it in a collective, for ever."""
    _, codes = job("hangs without us", seconds=15)
    assert codes == [None] * RANKS


def test_a_rank_that_is_killed() -> None:
    said, codes = job("killed")
    assert codes == [0, 0, 0, -9]
    for rank in range(3):
        assert said["killed"][rank]["error"].startswith("no answer to start from rank 3 within 2 s")
        assert said["killed"][rank]["seconds"] < 10


def test_a_rank_that_sleeps_past_the_timeout() -> None:
    said, codes = job("sleeps")
    assert codes == [0] * RANKS
    assert all("no answer to start from rank 1 within 1 s" in said["sleeps"][rank]["error"] for rank in (0, 2, 3))


def test_a_rank_that_raises_tells_the_others() -> None:
    said, codes = job("raises")
    assert codes == [0] * RANKS
    assert said["raises"][1] == {"own": "out of memory for 4"}
    for rank in (0, 2, 3):
        facts = said["raises"][rank]
        assert "rank 1: MemoryError: out of memory for 4" in facts["error"] and facts["ran"] == [8]
        assert facts["seconds"] < 20, "long before its timeout"
