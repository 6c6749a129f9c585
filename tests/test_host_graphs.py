"""`verify` and `explain` on a bundle's graphs: torch, Python and vector instructions are compared, without torch, too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest
from test_manifest import GRAPH_FACTS, OBJECTS, of_graphs

from aot_cache.artifact import manifest
from aot_cache.artifact.manifest import Manifest, served
from aot_cache.artifact.target import TARGETS
from aot_cache.runtime import host_check
from aot_cache.store import read_bundle, write_bundle

ROOT = Path(__file__).parents[1]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def here() -> dict[str, str]:
    """What graphs are bound to in a process that compiles some."""
    code = (
        "import json; from aot_cache.upstream.codec import dynamo_globals; "
        "print(json.dumps(dynamo_globals.bound_to({'backend': 'cpu'})))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, str] = json.loads(done.stdout)
    return found


def a_bundle(path: Path, key: dict[str, Any], target: str = "cpu") -> Path:
    whole = of_graphs(GRAPH_FACTS, graph_key=key, calls=[], target=TARGETS[target].properties())
    lean, details = manifest.split(Manifest.from_json(whole))
    write_bundle(path, lean, {**OBJECTS, lean["details"]: details})
    return path


def command(*arguments: str, path: str = str(ROOT), isolated: bool = False) -> subprocess.CompletedProcess[str]:
    flags = ["-S"] if isolated else []
    return subprocess.run(
        [sys.executable, *flags, "-m", "aot_cache", *arguments],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_is_built_here_is_for_here(tmp_path: Path, here: dict[str, Any]) -> None:
    bundle = a_bundle(tmp_path / "b", here)
    parts = host_check.graph_parts(served(read_bundle(bundle)))
    assert [part.name for part in parts] == ["torch", "torch git", "python", "vector instructions"]
    assert all(part.same for part in parts), parts
    assert command("verify", str(bundle)).stdout == "ok\n"


OTHERS = [
    ("torch", "2.9.1"),
    ("torch git", "0" * 40),
    ("python", "3.8"),
    ("vector instructions", {"backend": "cpu", "isa": "riscv64 RVV"}),
]


@pytest.mark.parametrize(("name", "value"), OTHERS, ids=[name for name, _ in OTHERS])
def test_what_is_built_elsewhere_is_not(tmp_path: Path, here: dict[str, Any], name: str, value: Any) -> None:
    other = {**here, **({"target": value} if isinstance(value, dict) else {name: value})}
    bundle = a_bundle(tmp_path / "b", other)
    differing = host_check.differing(host_check.graph_parts(served(read_bundle(bundle))))
    assert [part.name for part in differing] == [name]
    done = command("verify", str(bundle), "--json")
    (found,) = json.loads(done.stdout)["findings"]
    assert done.returncode == 16 and found["what"].startswith(f"graphs: {name}: the bundle is for ")
    explained = json.loads(command("explain", str(bundle), "--json").stdout)
    status = {part["name"]: part["status"] for part in explained["parts"]}
    assert status[f"graphs: {name}"] == "differs" and not explained["loads"]


def test_of_graphs_for_a_gpu_triton_counts_and_vector_instructions_do_not(tmp_path: Path, here: dict[str, Any]) -> None:
    bundle = a_bundle(tmp_path / "b", {**here, "triton": "3.0.0", "target": TARGETS["h200"].properties()}, "h200")
    parts = {part.name: part.same for part in host_check.graph_parts(served(read_bundle(bundle)))}
    assert parts == {"torch": True, "torch git": True, "python": True, "triton": False}


def test_a_bundle_without_graphs_is_bound_to_no_torch(tmp_path: Path) -> None:
    lean, details = manifest.split(Manifest.from_json(of_graphs(graph_key={}, calls=[])))
    write_bundle(tmp_path / "b", lean, {**OBJECTS, lean["details"]: details})
    assert host_check.graph_parts(served(read_bundle(tmp_path / "b"))) == []


def test_without_torch(tmp_path: Path, here: dict[str, Any]) -> None:
    """A machine that checks what it ships need not have torch: it is told so, part by part."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(("torch", "triton", "functorch", "transformers")):
            (packages / entry.name).symlink_to(entry)
    bundle = a_bundle(tmp_path / "b", here)
    path = os.pathsep.join([str(ROOT), str(packages)])
    done = command("explain", str(bundle), "--json", path=path, isolated=True)
    assert done.returncode == 0, done.stderr
    parts = {part["name"]: part for part in json.loads(done.stdout)["parts"]}
    assert parts["graphs: torch"]["host"] == "not installed" and parts["graphs: python"]["status"] == "ok"
    assert parts["graphs: vector instructions"]["host"] == "not known without torch"
    done = command("verify", str(bundle), path=path, isolated=True)
    assert done.returncode == 16 and f"graphs: torch: the bundle is for {here['torch']}" in done.stdout
