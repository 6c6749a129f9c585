"""Graphs of a source that changed since they were built: a miss, never a wrong answer.

A module is built for the CPU, changed line by line, and served with the old bundle. What each compiled function computes
is held against what it computes as plain Python.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS

from aot_cache.artifact import target as targets
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request

ROOT = Path(__file__).parents[1]

# Each line that ends in `# was → is` is changed so; FUNCTIONS says which function reads what.
MODULE = """
import collections, enum, functools
from dataclasses import dataclass
import torch
from aot_cache import Call, Range, Recipe, declare, device
import stale_helper

NUMBER = 101                                        # 101 → 201
TABLE = {"a": [102]}                                # 102 → 202
def plain(x): return x + 103                        # 103 → 203
def default(x, k=104): return x + k                 # 104 → 204
def by_name(x, *, k=105): return x + k              # 105 → 205
def factory(k): return lambda x: x + k
made = factory(106)                                 # 106 → 206
functions = {"f": lambda x: x + 107}                # 107 → 207
scaled = functools.partial(default, k=108)          # 108 → 208
class Layer(torch.nn.Module):
    scale = 109                                     # 109 → 209
    def forward(self, x): return x + self.scale
    def method(self, x): return x + 110             # 110 → 210
    def with_default(self, x, k=111): return x + k  # 111 → 211
    @staticmethod
    def static(x): return x + 112                   # 112 → 212
    @property
    def held(self): return 113                      # 113 → 213
layer = Layer()
class Mode(enum.Enum):
    A = 114                                         # 114 → 214
@dataclass
class Config:
    scale: int = 115                                # 115 → 215
config = Config()
def keep(function):
    @functools.wraps(function)
    def wrapper(x): return function(x) + 116        # 116 → 216
    return wrapper
@keep
def decorated(x): return x
def nested(x):
    def inner(y): return y + 117                    # 117 → 217
    return inner(x)
unchanged = 118
same = lambda x: x + 119
"""
HELPER = """
NUMBER = 120                                        # 120 → 220
def far(x): return x + 121                          # 121 → 221
class Far:
    def method(self, x): return x + 122             # 122 → 222
_far = Far()
def farther(x): return _far.method(x)
"""
FUNCTIONS = {
    "its own code": "x + 123  # 123 → 223",
    "a global": "x + NUMBER",
    "in a dict": "x + TABLE['a'][0]",
    "a function": "plain(x)",
    "a default": "default(x)",
    "a default by name": "by_name(x)",
    "what a closure holds": "made(x)",
    "a function in a dict": "functions['f'](x)",
    "a partial's argument": "scaled(x)",
    "a class's attribute": "x + Layer.scale",
    "an instance's attribute of its class": "layer(x)",
    "a method": "layer.method(x)",
    "a method's default": "layer.with_default(x)",
    "a static method": "Layer.static(x)",
    "a property": "x + layer.held",
    "an enum's value": "x + Mode.A.value",
    "a field's default": "x + config.scale",
    "a field's default, made inside": "x + Config().scale",
    "a wrapper": "decorated(x)",
    "a nested function": "nested(x)",
    "a global of another module": "x + stale_helper.NUMBER",
    "a function of another module": "stale_helper.far(x)",
    "a method of another module": "stale_helper.farther(x)",
    "nothing that changed": "same(x) + unchanged",
}

TAIL = """
bodies = {{name: eval(f"lambda x: {{text}}", globals()) for name, text in {functions!r}.items()}}
compiled = {{name: torch.compile(body) for name, body in bodies.items()}}
def case_of(name, function):
    return declare(name=name, n=Range(2, 3))(lambda n: Call(function, torch.ones(n, 2, device=device())))
recipe = Recipe("stale", [case_of(name, function) for name, function in compiled.items()])
"""

SERVER = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch, aot_cache
aot_cache.load(sys.argv[1], strict=True)
import stale_model
facts = {}
with torch.inference_mode():
    for name, function in stale_model.compiled.items():
        before = aot_cache.stats()["total"]
        x = torch.ones(2, 2)
        same = torch.equal(function(x), stale_model.bodies[name](x))
        after = aot_cache.stats()["total"]
        facts[name] = [same, after["graph"] - before["graph"], after["frame"] - before["frame"]]
print(json.dumps(facts))
"""


def changed(text: str) -> str:
    return "\n".join(
        line.replace(found[1], found[2], 1) if (found := re.search(r"# (\w+) → (\w+)", line)) else line
        for line in text.split("\n")
    )


def write(folder: Path, new: bool) -> None:
    functions = {name: changed(text) if new else text for name, text in FUNCTIONS.items()}
    folder.mkdir()
    module = (changed(MODULE) if new else MODULE) + TAIL.format(functions=functions)
    (folder / "stale_model.py").write_text(module)
    (folder / "stale_helper.py").write_text(changed(HELPER) if new else HELPER)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("stale")
    write(folder / "old", new=False)
    write(folder / "new", new=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "old")
        patch.setenv("PYTHONPATH", str(ROOT))
        made = pipeline.build(
            Request(target=targets.get("cpu"), store=folder / "store", model="stale_model:recipe", workers=2)
        )
    assert not made.failed and made.graphs == len(FUNCTIONS)
    return made


def serve(built: Built, folder: str) -> dict[str, list[Any]]:
    here = built.path.parents[2] / folder
    done = subprocess.run(
        [sys.executable, "-c", SERVER, str(built.path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""},
        cwd=here,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    facts: dict[str, list[Any]] = json.loads(done.stdout.splitlines()[-1])
    return facts


@pytest.fixture(scope="module")
def old(built: Built) -> dict[str, list[Any]]:
    return serve(built, "old")


@pytest.fixture(scope="module")
def new(built: Built) -> dict[str, list[Any]]:
    return serve(built, "new")


@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_source_that_did_not_change_hits(old: dict[str, list[Any]], what: str) -> None:
    assert old[what] == [True, 1, 0], "[right, graphs found, frames traced]"


@pytest.mark.parametrize("what", FUNCTIONS)
def test_a_source_that_changed_is_no_wrong_answer(new: dict[str, list[Any]], what: str) -> None:
    right, found, traced = new[what]
    assert right, "the graph of the old source was run"
    if what == "nothing that changed":
        assert (found, traced) == (1, 0), "what changed elsewhere is nothing to it"
