"""Graphs for ROCm from a machine without one, by whatever torch is here: their kernels are machine code of the target."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from limits import HANGS
from projects import HERE, ROOT, _environment

from aot_cache.artifact import manifest
from aot_cache.artifact import target as targets
from aot_cache.store import read_bundle

AMDGPU = 224
"""ELF's number of the machine."""
MACHINES = {"mi300x": 0x4C, "rx9070xt": 0x4E}
"""LLVM's numbers of gfx942 and gfx1201, in the low byte of the ELF flags."""
KINDS = 2 * 3
"""Three functions, each with a graph for one row and one for more."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What `build` says of each target's bundle."""
    folder = tmp_path_factory.mktemp("rocm")
    shutil.copy(HERE / "sample_rocm.py", folder)
    chosen = [word for target in MACHINES for word in ("--target", target)]
    command = "-m aot_cache build --model sample_rocm:recipe --store store --json".split()
    run = subprocess.run(
        [sys.executable, *command, *chosen],
        env={**_environment(), "PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    said = {bundle["target"]: bundle for bundle in json.loads(run.stdout)["bundles"]}
    return {target: {**facts, "path": folder / facts["path"]} for target, facts in said.items()}


@pytest.fixture(params=MACHINES)
def artifacts(request: pytest.FixtureRequest, built: dict[str, dict[str, Any]]) -> tuple[str, list[tuple[Any, bytes]]]:
    """(target, [(graph's facts, artifact) for each])."""
    assert not built[request.param]["failed"]
    bundle = read_bundle(Path(built[request.param]["path"]))
    graphs = manifest.whole(bundle).to_json()["graphs"]
    return request.param, [(graph, bundle.object(digest)) for graph in graphs for digest in graph["graphs"].values()]


def test_every_kernel_is_machine_code_of_the_target(artifacts: tuple[str, list[tuple[Any, bytes]]]) -> None:
    target, found = artifacts
    assert len(found) == KINDS
    for graph, data in found:
        binaries = [data[at.start() : at.start() + 64] for at in re.finditer(rb"\x7fELF", data)]
        assert len(binaries) >= len(graph["kernels"]) >= 1  # one for each config
        assert {int.from_bytes(head[18:20], "little") for head in binaries} == {AMDGPU}
        assert {head[48] for head in binaries} == {MACHINES[target]}


def test_wavefronts_are_the_targets(artifacts: tuple[str, list[tuple[Any, bytes]]]) -> None:
    """In the code object's own metadata, and in what Inductor chose its blocks by."""
    target, found = artifacts
    wanted = targets.get(target).warp_size
    for graph, data in found:
        sizes = [data[at.end()] for at in re.finditer(rb"\.wavefront_size", data)]
        assert set(sizes) == {wanted} and len(sizes) >= len(graph["kernels"])
        devices = re.findall(rb"DeviceProperties\(type='(\w+)',.*?cc='(\w+)'.*?warp_size=(\d+)\)", data)
        assert {(b"hip", str(targets.get(target).arch).encode(), str(wanted).encode())} == set(devices)


# --- a kernel that is not for the target ------------------------------------------------------------------------------


def _autotuner(*shared: int, **other: Any) -> Any:
    device = {"type": "hip", "cc": "gfx942", "warp_size": 64, **other}
    results = [SimpleNamespace(kernel=SimpleNamespace(shared=size)) for size in shared or (0,)]
    return SimpleNamespace(fn=normed_kernel, device_props=SimpleNamespace(**device), compile_results=results)


def normed_kernel() -> None: ...


@pytest.mark.parametrize("other", [{"type": "cuda"}, {"cc": "gfx90a"}, {"warp_size": 32}], ids=str)
def test_a_kernel_for_another_device_is_refused(other: dict[str, Any]) -> None:
    from aot_cache.upstream.virtual import inductor_target

    inductor_target._keep_what_fits(targets.get("mi300x"), _autotuner())
    with pytest.raises(RuntimeError, match=r"compiled normed_kernel for .*mi300x is"):
        inductor_target._keep_what_fits(targets.get("mi300x"), _autotuner(**other))


def test_configs_that_need_more_shared_memory_are_dropped() -> None:
    from aot_cache.upstream.virtual import inductor_target

    most = 64 * 1024
    autotuner = _autotuner(most + 1, most, most + 2, 0)
    inductor_target._keep_what_fits(targets.get("mi300x"), autotuner)
    assert [result.kernel.shared for result in autotuner.compile_results] == [most, 0]
    with pytest.raises(RuntimeError, match="normed_kernel needs 65537 bytes of shared memory, mi300x has 65536"):
        inductor_target._keep_what_fits(targets.get("mi300x"), _autotuner(most + 2, most + 1))
