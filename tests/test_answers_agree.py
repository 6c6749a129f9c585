"""What `verify`, `ready(strict=True)` and `will_hit` say of odd functions, beside what the serving process then counts.

The functions are put together by chance (of a fixed seed) out of ways in which Python hands values over. They multiply
matrices only, which Inductor leaves to the library: nothing has to be compiled by a C++ compiler.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS

from aot_cache.artifact import target as targets
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Request

ROOT = Path(__file__).parents[1]
SEED, COUNT = 15, 8
NS = (2, 3, 5, 6)

HEAD = """
import functools

import torch

from aot_cache import Call, Range, Recipe, declare, device

TWICE = True
CASES = []


def weight():
    return torch.empty(4, 4, device=device())


def helper(x, w, times=2):
    for _ in range(times):
        x = x @ w
    return x


def decorated(function):
    @functools.wraps(function)
    def wrapper(x, w):
        return function(x, w) @ w

    return wrapper


class Step:
    again = True

    def run(self, x, w):
        return x @ w @ w if self.again else x @ w


"""

Parts = dict[str, str]


def default(name: str) -> Parts:
    return {"parameters": "x, w, times=3", "body": "x = helper(x, w, times)", "call": "X, W"}


def keyword(name: str) -> Parts:
    return {
        "parameters": "x, w, *, more=None, again=True",
        "body": "x = x @ w @ w if again else x @ w",
        "call": "X, w=W",
    }


def optional(name: str) -> Parts:
    return {
        "parameters": "x, w, other=None",
        "body": "x = x @ (w if other is None else other)",
        "call": "X, W, weight()",
    }


def branch(name: str) -> Parts:
    return {"parameters": "x, w", "body": "x = x @ w if x.shape[0] > 4 else x @ w @ w", "call": "X, W"}


def constant(name: str) -> Parts:
    return {"parameters": "x, w", "body": "x = helper(x, w) if TWICE else x @ w", "call": "X, W"}


def closure(name: str) -> Parts:
    return {"around": "times = 3", "parameters": "x, w", "body": "x = helper(x, w, times)", "call": "X, W"}


def method(name: str) -> Parts:
    return {"around": "step = Step()", "parameters": "x, w", "body": "x = step.run(x, w)", "call": "X, W"}


def returned(name: str) -> Parts:
    return {"parameters": "x, w", "body": "x = x @ w", "result": "{'x': x, 'both': (x @ w, x)}", "call": "X, W"}


FEATURES: tuple[Callable[[str], Parts], ...] = (default, keyword, optional, branch, constant, closure, method, returned)


def function_text(name: str, chance: random.Random, first: Callable[[str], Parts]) -> str:
    """A compiled function with its case: the signature of one feature, the bodies of two."""
    one, two = first(name), chance.choice(FEATURES)(name)
    lines = [f"def make_{name}():"]
    lines += [f"    {part['around']}" for part in {id(p): p for p in (one, two)}.values() if "around" in part]
    wrap = ["    @decorated"] if one["parameters"] == "x, w" and "result" not in one and chance.random() < 0.5 else []
    lines += [f"    @torch.compile(fullgraph={chance.random() < 0.5})", *wrap]
    # The second's own parameters are this one's locals.
    names = {p.split("=")[0].strip(): p.split("=")[1] for p in two["parameters"].split(", ") if "=" in p}
    lines += [f"    def {name}({one['parameters']}):"]
    own = one["parameters"].replace("*, ", "").split(", ")
    lines += [f"        {n} = {v}" for n, v in names.items() if n not in {p.split("=")[0] for p in own}]
    lines += [f"        {one['body']}", f"        {two['body']}", f"        return {one.get('result', 'x')}"]
    lines += [f"    return {name}", "", f"{name} = make_{name}()", ""]
    call = one["call"].replace("X", "torch.empty(n, 4, device=device())").replace("W", "weight()")
    lines += [f"@declare(n=Range(2, 6), name={name!r}, mode={chance.choice(['inference', 'no_grad'])!r})"]
    lines += [f"def case_{name}(n):", f"    return Call({name}, {call})", "", f"CASES.append(case_{name})", ""]
    return "\n".join(lines)


def module_text(seed: int) -> str:
    chance = random.Random(seed)
    features = [FEATURES[n % len(FEATURES)] for n in range(COUNT)]
    texts = [function_text(f"{feature.__name__}_{n}", chance, feature) for n, feature in enumerate(features)]
    return HEAD + "\n".join(texts) + "\nrecipe = Recipe('odd', CASES)\n"


SERVER = """
import json, sys
import torch
import aot_cache
from aot_cache.recipes import declare as recipes
from aot_cache.errors import NotReady
aot_cache.load(sys.argv[1], strict=True)
recipes.set_device("cpu")
import odd_functions as odd
torch._dynamo.config.cache_size_limit = 64

def ready():
    try:
        aot_cache.ready(strict=True)
    except NotReady as error:
        return str(error)
    return ""

def served():
    rows = []
    for case in odd.recipe.cases:
        for n in json.loads(sys.argv[2]):
            before, events = aot_cache.will_hit(case.name, {"n": n}), aot_cache.stats()["total"]
            with case.modes("cpu"):
                case.call({"n": n})()
            total = aot_cache.stats()["total"]
            hit = not any(total[kind] - events[kind] for kind in ("frame", "graph_compile", "gcc", "rejected_bundle"))
            after = aot_cache.will_hit(case.name, {"n": n})
            rows.append([case.name, n, bool(before), hit, bool(after), before.why + after.why])
    return rows

facts = {"as built": {"ready": ready(), "rows": served()}}
torch._dynamo.reset()
odd.TWICE = False  # a value that guards hold
facts["another value"] = {"ready": ready(), "rows": served()}
odd.TWICE = True
torch._dynamo.reset()
def helper(x, w, times=2):
    return x @ w @ w @ w @ w
odd.helper.__code__ = helper.__code__  # what is inlined
facts["another source"] = {"ready": ready(), "rows": served()}
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("agree")
    (folder / "odd_functions.py").write_text(module_text(SEED))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PYTHONPATH", str(ROOT))
        made = pipeline.build(
            Request(target=targets.get("cpu"), store=folder / "store", model="odd_functions:recipe", workers=2)
        )
    assert not made.failed, made.failed
    said = {
        "serve": _python(folder, "-c", SERVER, str(made.path), json.dumps(NS)),
        "verify": _python(folder, "-m", "aot_cache", "verify", "--json", str(made.path)),
    }
    assert said["serve"].returncode == 0, said["serve"].stderr
    found: dict[str, Any] = json.loads(said["serve"].stdout.splitlines()[-1])
    return {**found, "verify": json.loads(said["verify"].stdout)["exit_code"]}


def _python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AOT_CACHE", "TORCHINDUCTOR"))}
    environment = {**kept, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**environment, "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor")},
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )


def rows(facts: dict[str, Any], when: str) -> Iterator[tuple[str, bool, bool, bool]]:
    """(what, will_hit said so, it hit, will_hit said so afterwards)."""
    found = [(f"{name} at n={n}: {why}", *answers) for name, n, *answers, why in facts[when]["rows"]]
    assert len(found) == COUNT * len(NS)
    yield from found


def test_as_it_was_built_all_say_yes_and_it_hits(facts: dict[str, Any]) -> None:
    assert (facts["verify"], facts["as built"]["ready"]) == (0, "")
    wrong = [what for what, *answers in rows(facts, "as built") if answers != [True, True, True]]
    assert not wrong, wrong


def test_what_misses_is_no_hit_from_then_on(facts: dict[str, Any]) -> None:
    """Before the first call nobody looks at values that guards hold."""
    missed = [what for what, _, hit, _ in rows(facts, "another value") if not hit]
    assert 0 < len(missed) < COUNT * len(NS), "some hold the value, and some do not"
    wrong = [what for what, _, hit, after in rows(facts, "another value") if hit is not after]
    assert not wrong, wrong


def test_a_source_that_changed_is_known_before_the_first_call(facts: dict[str, Any]) -> None:
    assert "the source of odd_functions:helper differs" in facts["another source"]["ready"]
    missed = [what for what, _, hit, _ in rows(facts, "another source") if not hit]
    assert 0 < len(missed) < COUNT * len(NS)
    wrong = [what for what, before, hit, after in rows(facts, "another source") if not hit and (before or after)]
    assert not wrong, wrong
