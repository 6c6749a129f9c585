"""`aot_cache.unload`: calls miss as without the bundle, its memory is freed, and what is in use goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS

from aot_cache.store import read_bundle, write_bundle

ROOT = Path(__file__).parents[1]
RECIPE = """
import torch
from aot_cache import Call, Range, Recipe, declare, device

@torch.compile
def mlp(x, weight):
    return torch.nn.functional.silu(x @ weight).sum(-1)

@declare(batch=Range(2, 64))
def step(batch):
    return Call(mlp, torch.randn(batch, 32, device=device()), torch.randn(32, 32, device=device()))

recipe = Recipe("mlp", [step])
"""
START = """
import gc, glob, json, os, sys, tempfile, threading
from pathlib import Path
import torch
import aot_cache
from torch._inductor.codecache import PyCodeCache
from mlp import mlp

bundle = Path(sys.argv[1])
facts = {}
weight = torch.randn(32, 32)

def right(batch):
    with torch.inference_mode():
        x = torch.randn(batch, 32)
        return torch.allclose(mlp(x, weight), torch.nn.functional.silu(x @ weight).sum(-1), atol=1e-4)

def counts():
    total = aot_cache.stats()["total"]
    return {name: total[name] for name in ("graph", "frame", "graph_compile")}

def load(path=bundle):
    aot_cache.load(path, strict=True)
    aot_cache.ready()
"""


def environment(folder: Path) -> dict[str, str]:
    (folder / "tmp").mkdir(exist_ok=True)
    path = f"{ROOT}{os.pathsep}{folder}"
    return {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "TMPDIR": str(folder / "tmp")}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unload")
    (folder / "mlp.py").write_text(RECIPE)
    words = "build --model mlp:recipe --target cpu --no-rehearse --out mlp.safetensors".split()
    command = [sys.executable, "-m", "aot_cache", *words]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder / "mlp.safetensors"


def serve(bundle: Path, script: str) -> dict[str, Any]:
    folder = bundle.parent
    command = [sys.executable, "-c", START + script + "\nprint(json.dumps(facts))", str(bundle)]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def test_calls_miss_as_without_it(bundle: Path) -> None:
    facts = serve(
        bundle,
        """
load()
facts["right"] = [right(7)]
facts["hit"] = counts()
facts["unloaded"] = [aot_cache.unload("elsewhere"), aot_cache.unload(bundle), aot_cache.unload(bundle), aot_cache.unload()]
facts["bundles"] = aot_cache.stats()["bundles"], aot_cache.stats()["graphs"]
facts["right"] += [right(9)]
facts["in Dynamo's cache"] = counts()
torch._dynamo.reset()
facts["right"] += [right(9)]
facts["missed"] = counts()
torch._dynamo.reset()
load()
facts["right"] += [right(11)]
facts["loaded again"] = counts()
facts["by digest"] = aot_cache.unload(aot_cache.stats()["bundles"][0]["digest"])
""",
    )
    assert facts["right"] == [True] * 4
    assert facts["hit"] == facts["in Dynamo's cache"] == {"graph": 1, "frame": 0, "graph_compile": 0}
    assert facts["unloaded"] == [0, 1, 0, 0] and facts["bundles"] == [[], []]
    assert facts["missed"] == {"graph": 1, "frame": 1, "graph_compile": 1}
    assert facts["loaded again"] == {"graph": 2, "frame": 1, "graph_compile": 1}
    assert facts["by digest"] == 1


def test_what_it_took_is_given_back(bundle: Path) -> None:
    facts = serve(
        bundle,
        """
def memory():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def round():
    load()
    assert right(7) and aot_cache.unload() == 1
    torch._dynamo.reset()

def left():
    folders = [path for path in glob.glob(os.path.join(tempfile.gettempdir(), "aot-cache-*", "*"))]
    alive = [type(one).__name__ for one in gc.get_objects() if str(type(one).__module__).startswith("aot_cache.")]
    ours = sum(alive.count(name) for name in ("Bundle", "KernelSet", "GraphSet", "Served"))
    return [len(PyCodeCache.modules), len(PyCodeCache.linemaps), len(folders), len(os.listdir("/proc/self/fd")), ours]

for _ in range(20):
    round()
before, facts["before"] = memory(), left()
for _ in range(100):
    round()
facts["grown"], facts["after"] = memory() - before, left()
facts["ledger"] = counts()
""",
    )
    assert facts["after"] == facts["before"] and facts["after"][-1] == 0, facts
    assert facts["ledger"] == {"graph": 120, "frame": 0, "graph_compile": 0}
    assert facts["grown"] < 12 << 20, facts  # Dynamo's own reset keeps a little of each


def test_beside_calls_of_other_threads(bundle: Path) -> None:
    facts = serve(
        bundle,
        """
over, found = threading.Event(), []

def call():
    while not over.is_set():
        found.append(right(7))

threads = [threading.Thread(target=call) for _ in range(3)]
load()
for thread in threads:
    thread.start()
for _ in range(30):
    aot_cache.unload()
    load()
over.set()
for thread in threads:
    thread.join()
facts["right"], facts["rejected"] = all(found) and len(found) > 3, aot_cache.stats()["total"]["rejected_bundle"]
facts["bundles"] = len(aot_cache.stats()["bundles"])
""",
    )
    assert facts == {"right": True, "rejected": 0, "bundles": 1}


def test_another_bundle_stays(bundle: Path) -> None:
    read = read_bundle(bundle)
    objects = {name: read.object(name) for name in read.manifest["objects"]}
    write_bundle(bundle.with_name("other.safetensors"), {**read.manifest, "spec": "another one"}, objects)
    facts = serve(
        bundle,
        """
load()
load(bundle.with_name("other.safetensors"))
aot_cache.unload(bundle)
facts["right"], facts["counts"] = right(7), counts()
facts["left"] = [Path(one["path"]).name for one in aot_cache.stats()["bundles"]]
""",
    )
    assert facts["right"] and facts["left"] == ["other.safetensors"]
    assert facts["counts"] == {"graph": 1, "frame": 0, "graph_compile": 0}
