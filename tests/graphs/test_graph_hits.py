"""Graphs of a bundle in a fresh process: the first call of the ordinary compiled callable traces nothing and is right."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from conftest import Built, Serve
from projects import CLOSE, found, hit, missed

from aot_cache.artifact.manifest import graph_label
from aot_cache.cli.facts import files as file_facts
from aot_cache.store import read_bundle

# --- every way to compile ---------------------------------------------------------------------------------------------

KINDS = """
import aot_cache.auto
import torch
import sample_model as m, sample_twin_one, sample_twin_two
from serving import FACTS, aot_cache, call, miss, norm, say

aot_cache.ready(strict=False)
aot_cache.seal()
x, one, most = torch.randn(7, 16), torch.randn(1, 16), torch.randn(64, 16)
later = torch.compile(m.Step().run)
with torch.inference_mode():
    call("decorated", m.decorated, x)
    call("decorated, at its ends", lambda a, b: (m.decorated(a), m.decorated(b)), x[:2], most)
    call("method", later, x)
    call("method of another object", torch.compile(m.Step().run), x)
    call("integer", m.compiled_scaled, x, 3)
    call("another integer", m.compiled_scaled, x[:5], 5)
    call("value 8", m.compiled_tiled, torch.randn(8, 16))
    call("value 16", m.compiled_tiled, torch.randn(16, 16))
    miss("no value", m.compiled_tiled, torch.randn(12, 16))
with torch.no_grad():
    call("graph break", m.compiled_broken, x)
    call("graph break, again", m.compiled_broken, x[:3])
    call("nested", m.nested, x)
    layers = [norm(number) for number in range(4)]
    compiled = [torch.compile(layer) for layer in layers]
    for number, layer in enumerate(compiled):
        call(f"layer {number}", layer, x)
    for number, layer in enumerate(compiled):
        call(f"layer {number} at 1", layer, one)
    call("forward", torch.compile(layers[0].forward), x)
    in_place = norm(5)
    in_place.compile()
    call("in place", in_place, x)
    call("writes", m.compiled_pushed, x, x + 1)
    call("twin one", sample_twin_one.twin, x)
    call("twin two", sample_twin_two.twin, x)

def trained(x, weight):
    loss = m.compiled_weighted(x, weight)
    return loss.detach(), torch.autograd.grad(loss, weight)

call("backward", trained, x, torch.randn(16, requires_grad=True))
say()
"""


@pytest.fixture(scope="module")
def kinds(serve: Serve) -> dict[str, Any]:
    return serve(KINDS)


FIRST = {
    "decorated": 1,
    "method": 1,
    "integer": 1,
    "value 8": 1,
    "value 16": 1,
    "graph break": 3,  # before it, after it, and the function inside the custom operator
    "layer 0": 1,
    "layer 0 at 1": 1,
    "writes": 1,
    "twin one": 1,
    "twin two": 1,
    "backward": 1,
}
"""What is called → graphs of the bundle that the first call takes."""


@pytest.mark.parametrize("what", FIRST)
def test_the_first_call_hits(what: str, kinds: dict[str, Any]) -> None:
    assert found(kinds[what], FIRST[what])


AGAIN = [
    "decorated, at its ends",
    "another integer",
    "forward",
    "in place",
    *(f"layer {number}" for number in (1, 2, 3)),
    *(f"layer {number} at 1" for number in (1, 2, 3)),
]


@pytest.mark.parametrize("what", AGAIN)
def test_what_was_installed_serves_the_next_call(what: str, kinds: dict[str, Any]) -> None:
    """Other sizes, other integers, other instances, other wrappings of the same code: not even looked up again."""
    assert hit(kinds[what]) and kinds[what]["graph"] == 0


@pytest.mark.parametrize("what", ["method of another object", "graph break, again", "nested"])
def test_the_next_call_hits(what: str, kinds: dict[str, Any]) -> None:
    """Here Dynamo sees tensors of other dispatch keys: made in inference mode, or beneath an operator."""
    assert hit(kinds[what])


def test_values_are_sizes_of_their_own(kinds: dict[str, Any]) -> None:
    assert missed(kinds["no value"])
    assert "expected 8, actual 12" in kinds["no value"]["why"] and "expected 16, actual 12" in kinds["no value"]["why"]


def test_the_ledger_says_which_graphs_were_found(kinds: dict[str, Any], built: Built) -> None:
    """By first calls: of later ones nothing of ours knows."""
    (loaded,) = kinds["stats"]["graphs"]
    assert loaded["digest"] == read_bundle(built.bundle).digest
    assert sum(loaded["found"].values()) == kinds["stats"]["total"]["graph"] > 0
    functions = {graph_label(n): graph["function"] for n, graph in enumerate(built.graphs())}
    names = {functions[label] for label in loaded["found"]}
    assert {"decorated", "nested", "Norm.forward"} <= names <= set(functions.values())


def test_inspect_shows_what_a_server_counted(kinds: dict[str, Any], built: Built, tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    path.write_text(json.dumps(kinds["stats"]))
    facts = file_facts.facts(built.bundle, None, False, [path])
    rows = {row["name"]: row for grid in facts["grids"] for row in grid["rows"]}
    assert facts["ledger"]["found"] == kinds["stats"]["graphs"][0]["found"]
    assert all(max(rows[f"sample_model:{name}"]["found"]) > 0 for name in ("decorated", "nested", "Norm.forward"))
    assert {row["state"] for row in rows.values()} == {"loaded"}
    assert rows["sample_model:tiled"]["calls"] == 1 and rows["sample_model:decorated"]["calls"] == 0


def test_everything_declared_is_loaded_and_no_compiler_runs(kinds: dict[str, Any], built: Built) -> None:
    (loaded,) = kinds["stats"]["graphs"]
    compiled = {name for graph in built.graphs() for name in graph["graphs"]}
    assert loaded["graphs"] == len(built.graphs()) and loaded["primed"] == len(compiled) and not loaded["stale"]
    gcc = {what: fact["gcc"] for what, fact in kinds.items() if isinstance(fact, dict) and fact.get("gcc")}
    assert set(gcc) <= {"no value"}, "what misses is compiled, nothing else"
    assert kinds["stats"]["total"]["gcc"] == sum(gcc.values()), "and nothing before the seal"


# --- what was built ---------------------------------------------------------------------------------------------------


def test_identical_layers_share_a_graph(built: Built) -> None:
    """Three instances in the recipe, which differ in a number that their code does not ask for."""
    made = Counter(graph["function"] for graph in built.graphs())
    assert made == {
        "Norm.forward": 2,  # for 1, and for all else
        "Step.run": 1,
        "broken": 1,
        "decorated": 1,
        "nested": 1,
        "pushed": 1,
        "scaled": 1,
        "tiled": 2,
        "twin": 2,
        "weighted": 1,
    } | {name: 1 for name in made if name.startswith("torch_dynamo_resume_in_broken")}
    assert len(made) == 11


def test_the_bundle_says_what_each_graph_is_for(built: Built) -> None:
    graphs = built.graphs()
    by_name = {(g["function"], g["module"]): g for g in graphs}
    assert by_name["scaled", "sample_model"]["dynamic"] == {"L['x']": [[0, 2, 64]], "L['n']": [[-1, 2, 5]]}
    assert {str(g["dynamic"]) for g in graphs if g["function"] == "Norm.forward"} == {
        "{}",
        "{\"L['x']\": [[0, 2, 64]]}",
    }
    assert all(not g["dynamic"] for g in graphs if g["function"] == "tiled")
    assert {g["mode"] for g in graphs} == {"inference", "no_grad", "grad"}
    assert {g["module"] for g in graphs if g["function"] == "twin"} == {"sample_twin_one", "sample_twin_two"}


def test_another_backend_is_not_built(built: Built) -> None:
    assert "elsewhere" not in {graph["function"] for graph in built.graphs()}


# --- modes ------------------------------------------------------------------------------------------------------------

MODES = """
import aot_cache.auto
import torch
import sample_model as m
from serving import aot_cache, ask, call, miss, norm, say

aot_cache.seal()
plain = torch.randn(7, 16)
with torch.inference_mode():
    inside = torch.randn(7, 16)

with torch.no_grad():
    miss("inference under no_grad", m.decorated, plain)
ask("inference under grad", m.decorated, plain)
with torch.inference_mode():
    call("inference, tensor from inside", m.decorated, inside)
    call("inference, tensor from outside", m.decorated, plain)
    call("inference, both in turn", lambda: [m.decorated(t) for t in (plain, inside, plain)])

with torch.inference_mode():
    ask("no_grad under inference", torch.compile(norm()), plain)
ask("no_grad under grad", torch.compile(norm()), plain)
with torch.no_grad():
    call("no_grad, tensor from outside", torch.compile(norm()), plain)
    call("no_grad, tensor from inside", torch.compile(norm()), inside)
    with torch.inference_mode():
        made_inside = norm()
    call("no_grad, parameters from inside", torch.compile(made_inside), plain)
    call("no_grad, all from inside", torch.compile(made_inside), inside)
    ask("no_grad, parameters that require grad", torch.compile(norm().requires_grad_(True)), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        miss("no_grad, autocast", m.compiled_pushed, plain, plain + 1)
    call("no_grad, no autocast", m.compiled_pushed, plain, plain + 1)

weight = torch.randn(16, requires_grad=True)
with torch.no_grad():
    miss("grad under no_grad", m.compiled_weighted, plain, weight)
call("grad", m.compiled_weighted, plain, weight)
ask("grad, nothing requires it", m.compiled_weighted, plain, weight.detach().clone())
say()
"""


@pytest.fixture(scope="module")
def modes(serve: Serve) -> dict[str, Any]:
    return serve(MODES)


@pytest.mark.parametrize("mode", ["inference, tensor from inside", "no_grad, tensor from outside", "grad"])
def test_a_mode_as_declared_hits(mode: str, modes: dict[str, Any]) -> None:
    assert found(modes[mode])


MIXED = [
    "inference, tensor from outside",
    "inference, both in turn",
    "no_grad, tensor from inside",
    "no_grad, parameters from inside",
    "no_grad, all from inside",
    "no_grad, no autocast",
]


@pytest.mark.parametrize("what", MIXED)
def test_tensors_from_inside_and_outside_of_inference_mode(what: str, modes: dict[str, Any]) -> None:
    assert hit(modes[what])


OTHER_MODES = {
    "inference under no_grad": "built for mode 'inference', but this is 'no_grad'",
    "inference under grad": "built for mode 'inference', but this is 'grad'",
    "no_grad under inference": "built for mode 'no_grad', but this is 'inference'",
    "no_grad under grad": "built for mode 'no_grad', but this is 'grad'",
    "grad under no_grad": "built for mode 'grad', but this is 'no_grad'",
    "no_grad, parameters that require grad": " requires grad",
    "grad, nothing requires it": " requires grad",
    "no_grad, autocast": "GLOBAL_STATE changed: autocast",
}


@pytest.mark.parametrize("what", OTHER_MODES)
def test_another_mode_is_the_reason_for_a_miss(what: str, modes: dict[str, Any]) -> None:
    assert OTHER_MODES[what] in modes[what]["why"]


@pytest.mark.parametrize("what", ["inference under no_grad", "grad under no_grad", "no_grad, autocast"])
def test_another_mode_misses(what: str, modes: dict[str, Any]) -> None:
    assert missed(modes[what])


# --- the declared range, and beyond -----------------------------------------------------------------------------------

RANGE = """
import aot_cache.auto
import random
import torch
import sample_model as m
from serving import FACTS, aot_cache, call, counts, miss, norm, say

aot_cache.seal()

def rows(n, width=16):
    return torch.randn(n, width)

class LoRA(torch.nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = torch.nn.Linear(16, 2, bias=False).requires_grad_(False)
        self.up = torch.nn.Linear(2, 16, bias=False).requires_grad_(False)
    def forward(self, x):
        return self.base(x) + self.up(self.down(x))

with torch.no_grad():
    swapped = norm()
    swapped.linear = LoRA(swapped.linear)
    miss("swapped", torch.compile(swapped), rows(7))
    call("unswapped", torch.compile(norm()), rows(7))
    without = norm()
    without.linear = torch.nn.Linear(16, 16, bias=False).requires_grad_(False)
    call("without a bias", torch.compile(without), rows(7))
    call("swapped again", torch.compile(swapped), rows(7))
    call("unswapped again", torch.compile(norm()), rows(9))

with torch.inference_mode():
    call("inside", m.decorated, rows(7))
    miss("outside", m.decorated, rows(65))
    call("inside after outside", m.decorated, rows(64))
    with torch.compiler.set_stance("fail_on_recompile"):
        call("inside, recompiling forbidden", m.decorated, rows(33))

seed = random.randrange(10**6)
chance = random.Random(seed)
torch.manual_seed(seed)
layer = torch.compile(norm())
inside, outside = [], []

def point(name, where, mode, function, *args):
    with mode():
        call("point", function, *args)
    where.append([name, FACTS.pop("point")])

for _ in range(50):
    n = chance.randint(2, 64)
    x, k = rows(n), chance.randint(2, 5)
    point(f"decorated {n}", inside, torch.inference_mode, m.decorated, x)
    point(f"scaled {n} {k}", inside, torch.inference_mode, m.compiled_scaled, x, k)
    point(f"norm {n}", inside, torch.no_grad, layer, rows(chance.choice([1, n])))
    point(f"pushed {n}", inside, torch.no_grad, m.compiled_pushed, x, rows(n))

def strange(n):
    "Tensors that no point of a recipe has, by size, layout or type."
    kinds = {
        "long": lambda: rows(65 + n), "none": lambda: rows(0), "one": lambda: rows(1),
        "transposed": lambda: rows(16, n).t(), "strided": lambda: rows(2 * n)[::2], "wide": lambda: rows(n, 32)[:, :16],
        "double": lambda: rows(n).double(), "expanded": lambda: rows(1).expand(n, 16), "narrow": lambda: rows(n, 1),
        "shifted": lambda: rows(n + 1).flatten()[5 : 5 + n * 16].view(n, 16), "plain": lambda: rows(n),
    }
    kind = chance.choice(list(kinds))
    return kind, kinds[kind]()

for _ in range(12):
    n = chance.randint(2, 64)
    (kind, x), k = strange(n), chance.choice([-3, 0, 1, 3, 6, 1000])
    point(f"scaled {kind} {n} {k}", outside, torch.inference_mode, m.compiled_scaled, x, k)
    if x.shape[1] == 16 and x.dtype == torch.float32:
        point(f"norm {kind} {n}", outside, torch.no_grad, layer, x)
FACTS |= {"seed": seed, "inside points": inside, "outside points": outside}
say()
"""


@pytest.fixture(scope="module")
def ranges(serve: Serve) -> dict[str, Any]:
    return serve(RANGE)


def test_outside_of_the_range_compiles_and_inside_still_hits(ranges: dict[str, Any]) -> None:
    assert found(ranges["inside"])
    assert missed(ranges["outside"]) and "2 <= L['x'].size()[0] <= 64" in ranges["outside"]["why"]
    assert hit(ranges["inside after outside"]) and hit(ranges["inside, recompiling forbidden"])


def test_a_swapped_submodule_misses_and_harms_nobody(ranges: dict[str, Any]) -> None:
    assert missed(ranges["swapped"]) and "_modules['linear']" in ranges["swapped"]["why"]
    assert found(ranges["unswapped"])
    assert missed(ranges["without a bias"])
    assert hit(ranges["swapped again"]) and hit(ranges["unswapped again"])


def test_random_points_inside_of_the_range_hit(ranges: dict[str, Any]) -> None:
    wrong = [name for name, fact in ranges["inside points"] if not hit(fact)]
    assert not wrong, f"seed {ranges['seed']}"
    assert len(ranges["inside points"]) == 200


def test_random_points_outside_of_the_range_are_never_wrong(ranges: dict[str, Any]) -> None:
    wrong = {name: fact for name, fact in ranges["outside points"] if fact["error"] or fact["distance"] >= CLOSE}
    assert not wrong, f"seed {ranges['seed']}"
    assert any(fact["frame"] for _, fact in ranges["outside points"])


# --- orders of imports ------------------------------------------------------------------------------------------------

ORDERS = {
    "torch, the bundle, the model": "import torch\nimport aot_cache.auto\nimport sample_model as m",
    "the model, the bundle": """
import os, torch, sample_model as m
os.environ["AOT_CACHE_STRICT"] = "0"
import aot_cache.auto
""",
    "the model, called, the bundle": """
import torch, sample_model as m
before = torch.compile(m.Step().run)
with torch.inference_mode():
    m.decorated(torch.randn(65, 16))
import os
path = os.environ.pop("AOT_CACHE")
import aot_cache
assert aot_cache.load(path, strict=False) is not None
""",
}
AFTER = """
import os
from serving import FACTS, aot_cache, call, say

aot_cache.seal()
x = torch.randn(8, 16)
with torch.inference_mode():
    call("decorated at import", m.decorated, x)
    call("wrapped at import", m.compiled_tiled, x)
    call("wrapped before", globals().get("before") or torch.compile(m.Step().run), x)
    call("wrapped after", torch.compile(m.decorated._torchdynamo_orig_callable), x)
import sys
COMPILER = ("compile_fx", "graph", "ir", "lowering", "scheduler", "select_algorithm")
FACTS["compiler"] = [name for name in COMPILER if f"torch._inductor.{name}" in sys.modules]
import sample_twin_two
with torch.no_grad():
    call("one twin alone", sample_twin_two.twin, x)
    if os.environ.get("AOT_CACHE_STRICT") == "0":
        from aot_cache.upstream.hooks import inductor_artifact
        inductor_artifact.load_graph = None  # whatever happens there
        call("a graph that does not load", m.compiled_pushed, x, x + 1)
say()
"""
TORCH_FIRST, MODEL_FIRST, CALLED_FIRST = (order + AFTER for order in ORDERS.values())


@pytest.fixture
def torch_first(serve: Serve) -> dict[str, Any]:
    return serve(TORCH_FIRST)


@pytest.fixture
def model_first(serve: Serve) -> dict[str, Any]:
    return serve(MODEL_FIRST)


@pytest.fixture
def called_first(serve: Serve) -> dict[str, Any]:
    return serve(CALLED_FIRST)


def test_any_order_of_imports(
    torch_first: dict[str, Any], model_first: dict[str, Any], called_first: dict[str, Any]
) -> None:
    """The bundle before everything is how all other tests have it."""
    for facts in (torch_first, model_first, called_first):
        for what in ("decorated at import", "wrapped at import", "wrapped before"):
            assert found(facts[what])
        assert hit(facts["wrapped after"]) and facts["wrapped after"]["rejected_bundle"] == 0


def test_a_process_whose_calls_hit_does_not_import_the_compiler(torch_first: dict[str, Any]) -> None:
    """Where the bundle comes before the model; upstream imports the compiler when a model is decorated before that."""
    assert torch_first["compiler"] == []


def test_a_function_whose_twin_is_not_imported_hits(torch_first: dict[str, Any]) -> None:
    """Code objects of the same text on the same lines are equal, and yet of two modules."""
    assert found(torch_first["one twin alone"])


def test_a_graph_that_does_not_load_is_a_miss(model_first: dict[str, Any]) -> None:
    """A bundle does no harm, unless it was asked for with AOT_CACHE_STRICT=1."""
    assert missed(model_first["a graph that does not load"])
    assert model_first["stats"]["total"]["rejected_bundle"] == 1
