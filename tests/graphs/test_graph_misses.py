"""Calls that no graph of a bundle may serve: each misses, says why, and gives what plain Python gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Built, Serve
from projects import Project, found, hit, missed


def known(reason: str) -> pytest.MarkDecorator:
    return pytest.mark.xfail(strict=True, reason=reason)


# --- other wrappings --------------------------------------------------------------------------------------------------

WRAPPINGS = """
import aot_cache.auto
import torch
import sample_model as m, sample_twin_one
from serving import FACTS, aot_cache, ask, call, miss, norm, say

aot_cache.seal()
x = torch.randn(8, 16)
ran = []

def mine(graph, inputs):
    def run(*args):
        ran.append(1)
        return graph.forward(*args)
    return run

decorated = m.decorated._torchdynamo_orig_callable
with torch.inference_mode():
    miss("my backend first", torch.compile(decorated, backend=mine), x)
    call("inductor after my backend", m.decorated, x)
    call("inductor first", m.compiled_tiled, x)
    miss("my backend after inductor", torch.compile(m.tiled, backend=mine), x)
    FACTS["ran"] = len(ran)
    call("inductor again", m.compiled_tiled, x)
    call("my backend again", torch.compile(m.tiled, backend=mine), x)
    FACTS["ran in all"] = len(ran)

    miss("options", torch.compile(m.scaled, options={"epilogue_fusion": False}), x, 3)
    miss("dynamic", torch.compile(m.scaled, dynamic=True), x, 3)
    ask("static", torch.compile(m.scaled, dynamic=False), x, 3)
    ask("mode", torch.compile(m.scaled, mode="max-autotune-no-cudagraphs"), x, 3)
    call("the default mode", torch.compile(m.scaled, mode="default"), x, 3)
    call("no options", torch.compile(m.scaled, options={}), x, 3)
    call("fullgraph", torch.compile(m.scaled, fullgraph=True), x, 3)
with torch.no_grad():
    call("fullgraph over a break", torch.compile(m.broken, fullgraph=True), x)
    call("the break", m.compiled_broken, x)
    miss("elsewhere", m.compiled_elsewhere, x)
say()
"""


@pytest.fixture(scope="module")
def wrappings(serve: Serve) -> dict[str, Any]:
    return serve(WRAPPINGS)


def test_my_backend_gets_its_own_graph(wrappings: dict[str, Any]) -> None:
    """An Inductor graph was once served to torch.compile(f, backend=mine)."""
    for what in ("my backend first", "my backend after inductor"):
        assert missed(wrappings[what]) and "built for torch.compile with" in wrappings[what]["why"]
    assert wrappings["ran"] == 2
    assert hit(wrappings["inductor again"]) and hit(wrappings["my backend again"]) and wrappings["ran in all"] == 3


def test_inductor_gets_the_bundle_s_graph_beside_my_backend(wrappings: dict[str, Any]) -> None:
    assert found(wrappings["inductor after my backend"]) and found(wrappings["inductor first"])


@pytest.mark.parametrize("what", ["options", "dynamic", "static", "mode"])
def test_other_options_are_the_reason_for_a_miss(what: str, wrappings: dict[str, Any]) -> None:
    assert "built for torch.compile with" in wrappings[what]["why"]


@pytest.mark.parametrize("what", ["options", "dynamic"])
def test_other_options_miss(what: str, wrappings: dict[str, Any]) -> None:
    assert missed(wrappings[what])


@pytest.mark.parametrize("what", ["the default mode", "no options", "fullgraph"])
def test_what_means_the_same_hits(what: str, wrappings: dict[str, Any]) -> None:
    assert hit(wrappings[what])


def test_fullgraph_is_no_way_to_a_graph_with_a_break(wrappings: dict[str, Any]) -> None:
    fact = wrappings["fullgraph over a break"]
    assert fact["error"].startswith("Unsupported") and fact["graph"] == 0
    assert hit(wrappings["the break"])


def test_a_backend_that_is_not_built_compiles(wrappings: dict[str, Any]) -> None:
    assert missed(wrappings["elsewhere"])


# --- what the code depends on -----------------------------------------------------------------------------------------

REPLACED = """
import aot_cache.auto
import torch
import sample_model as m, sample_twin_one
from serving import aot_cache, call, miss, norm, replaced, say

aot_cache.seal()
x = torch.randn(8, 16)

def other(x, factor=3.0):
    return x - 7

with torch.inference_mode():
    with replaced(m, "helper", other):
        miss("function", m.decorated, x)
    with replaced(m, "SHIFT", 7.0):
        miss("constant", m.decorated, x)
    with replaced(m.helper, "__defaults__", (7.0,)):
        miss("default", m.decorated, x)
    call("decorated, as it was", m.decorated, x)
    with replaced(m, "helper", other):
        call("function after a hit", m.decorated, x)
with torch.no_grad():
    with replaced(m, "SHIFT", 7.0):
        miss("constant of another module", sample_twin_one.twin, x)
    call("twin, as it was", sample_twin_one.twin, x)
    with replaced(m.Norm, "bend", lambda self, x: x - 7):
        miss("method", torch.compile(norm()), x)
    torch._dynamo.reset()  # Dynamo does not guard on methods, and would take that for every module now
    with replaced(m.Norm, "scale", 7.0):
        miss("class attribute", torch.compile(norm()), x)
    own = norm()
    own.bend = lambda x: x - 7
    miss("method of an instance", torch.compile(own), x)
    own = norm()
    own.scale = 7.0
    miss("attribute of an instance", torch.compile(own), x)
    call("norm, as it was", torch.compile(norm()), x)
    torch._dynamo.reset()
    hooked = norm()
    hooked.linear.register_forward_hook(lambda module, args, out: out + 7)
    call("forward hook", torch.compile(hooked), x)
say()
"""


@pytest.fixture(scope="module")
def replaced(serve: Serve) -> dict[str, Any]:
    return serve(REPLACED)


REASONS = {
    "function": "the source of sample_model:helper differs",
    "constant": "G['SHIFT'] was 0.5 and is 7.0",
    "default": "G['helper'].__defaults__[0] was 3.0 and is 7.0",
    "constant of another module": "SHIFT was 0.5 and is 7.0",
    "method": "the source of sample_model:Norm.bend differs",
    "class attribute": "['scale'] was 1.25 and is 7.0",
    "method of an instance": "not ___dict_contains('bend', L['self'].__dict__)",
    "attribute of an instance": "not ___dict_contains('scale', L['self'].__dict__)",
}


@pytest.mark.parametrize("what", REASONS)
def test_what_was_replaced_at_run_time_misses(what: str, replaced: dict[str, Any]) -> None:
    assert missed(replaced[what]) and REASONS[what] in replaced[what]["why"]


def test_a_submodule_with_a_hook_misses(replaced: dict[str, Any]) -> None:
    assert missed(replaced["forward hook"])


def test_what_was_replaced_after_a_hit_misses(replaced: dict[str, Any]) -> None:
    assert hit(replaced["function after a hit"]) or missed(replaced["function after a hit"])


@pytest.mark.parametrize("what", ["decorated", "twin", "norm"])
def test_what_was_put_back_hits(what: str, replaced: dict[str, Any]) -> None:
    assert hit(replaced[f"{what}, as it was"])


# --- the state of the process -----------------------------------------------------------------------------------------

SETTINGS = """
import aot_cache.auto
import torch
import torch._inductor.config
from torch.utils._python_dispatch import TorchDispatchMode
import sample_model as m
from serving import FACTS, aot_cache, ask, call, miss, norm, say

aot_cache.seal()
x = torch.randn(8, 16)

class Sees(TorchDispatchMode):
    seen = 0
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        Sees.seen += 1
        return function(*args, **(kwargs or {}))

with torch.inference_mode():
    with torch.compiler.set_stance("fail_on_recompile"):
        call("recompiling forbidden", m.compiled_scaled, x, 3)
    with Sees():
        m.decorated(x)
        FACTS["seen"], Sees.seen = Sees.seen, 0
        with torch.compiler.set_stance("force_eager"):
            m.decorated(x)
        FACTS["to be seen"] = Sees.seen
    with torch._dynamo.config.patch(disable=True):
        call("disabled", m.compiled_tiled, x)
    torch.set_default_dtype(torch.float64)
    miss("default dtype", m.decorated, x)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(True)
    ask("deterministic algorithms", m.decorated, x)
    torch.use_deterministic_algorithms(False)
    with torch.device("cpu"):
        ask("default device", m.decorated, x)
    with torch._inductor.config.patch(epilogue_fusion=False):
        miss("Inductor's settings", torch.compile(m.Step().run), x)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    call("threads", m.decorated, x)
    torch.set_num_threads(threads)
    call("as it was", m.decorated, x)

with torch.no_grad():
    call("before the reset", m.compiled_pushed, x, x + 1)
    torch._dynamo.reset()
    call("after the reset", m.compiled_pushed, x, x + 1)
    torch._dynamo.reset()
    call("a miss after the reset", lambda a: m.compiled_pushed(a, a), torch.randn(8, 16))

    with torch._dynamo.config.patch(recompile_limit=1):
        call("strange", m.nested, x.double())
        call("too many", m.nested, x.bfloat16())
        call("beyond the limit", m.nested, x)
say()
"""


@pytest.fixture(scope="module")
def settings(serve: Serve) -> dict[str, Any]:
    return serve(SETTINGS)


STATES = {
    "default dtype": "GLOBAL_STATE changed: default_dtype",
    "deterministic algorithms": "Inductor's settings differ: deterministic was False and is True",
    "default device": "___check_torch_function_mode_stack()",
    "Inductor's settings": "Inductor's settings differ: epilogue_fusion was True and is False",
}


@pytest.mark.parametrize("what", STATES)
def test_another_state_is_the_reason_for_a_miss(what: str, settings: dict[str, Any]) -> None:
    assert STATES[what] in settings[what]["why"]


@pytest.mark.parametrize("what", ["default dtype", "Inductor's settings"])
def test_another_state_misses(what: str, settings: dict[str, Any]) -> None:
    assert missed(settings[what])


def test_the_number_of_threads_is_the_machine_s_business(settings: dict[str, Any]) -> None:
    assert hit(settings["threads"]) and hit(settings["as it was"])


def test_the_first_call_hits_where_recompiling_is_forbidden(settings: dict[str, Any]) -> None:
    assert found(settings["recompiling forbidden"])


def test_a_mode_that_watches_operators_sees_them(settings: dict[str, Any]) -> None:
    assert settings["seen"] == settings["to be seen"], (
        "as torch.compile has it, which compiles nothing under such a mode"
    )


def test_dynamo_that_is_disabled_runs_plain_python(settings: dict[str, Any]) -> None:
    assert hit(settings["disabled"]) and settings["disabled"]["graph"] == 0


def test_a_reset_forgets_and_the_next_call_hits(settings: dict[str, Any]) -> None:
    assert found(settings["before the reset"])
    assert found(settings["after the reset"]), "Dynamo's cache is empty: found in the bundle again"


def test_a_miss_after_a_reset_compiles(settings: dict[str, Any]) -> None:
    assert missed(settings["a miss after the reset"]), "a KeyError of Dynamo's orig_code_map"


@known("at the limit Dynamo stops to ask its callback for that code, and so the bundle; the ledger counts nothing")
def test_calls_that_miss_too_often_do_not_take_the_bundle_away(settings: dict[str, Any]) -> None:
    assert missed(settings["strange"]) and settings["too many"]["graph"] == 0
    assert found(settings["beyond the limit"])


# --- other source -----------------------------------------------------------------------------------------------------

SERVED_ELSEWHERE = """
import aot_cache.auto
import torch
import sample_model as m, sample_twin_one, sample_twin_two, sample_twin_three
from serving import FACTS, aot_cache, call, miss, norm, say

aot_cache.seal()
FACTS["file"] = m.__file__
x = torch.randn(8, 16)
with torch.inference_mode():
    call("moved", m.compiled_tiled, x)
    call("moved method", torch.compile(m.Step().run), x)
    miss("default", m.decorated, x)
    miss("own source", m.compiled_scaled, x, 3)
with torch.no_grad():
    call("moved break", m.compiled_broken, x)
    call("moved twin", sample_twin_two.twin, x)
    miss("inlined source", sample_twin_one.twin, x)
    miss("same text", sample_twin_three.twin, x)
    miss("class attribute", torch.compile(norm()), x)
say()
"""


@pytest.fixture(scope="module")
def moved(built: Built, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The bundle, served with another copy of the source: further down in its files, and changed here and there."""
    project = Project.at(tmp_path_factory.mktemp("moved") / "deep" / "down")
    edit(project, "sample_model.py", "import torch\n", "import torch\n\n# A comment.\n# Another.\n")
    edit(project, "sample_model.py", "factor: float = 3.0", "factor: float = 4.0")
    edit(project, "sample_model.py", "scale = 1.25", "scale = 2.5")
    edit(project, "sample_model.py", "x * n + x.shape[0]", "x * n - x.shape[0]")
    edit(project, "sample_twin_one.py", "x * 2", "x * 4")
    facts = project.serve(SERVED_ELSEWHERE, built.bundle)
    assert Path(facts["file"]).parent == project.folder
    return facts


def edit(project: Project, name: str, old: str, new: str) -> None:
    text = (project.folder / name).read_text()
    assert text.count(old) == 1
    (project.folder / name).write_text(text.replace(old, new))


@pytest.mark.parametrize("what", ["moved", "moved method", "moved twin"])
def test_source_that_moved_hits(what: str, moved: dict[str, Any]) -> None:
    assert found(moved[what])


def test_a_graph_break_that_moved_hits(moved: dict[str, Any]) -> None:
    assert found(moved["moved break"], 3)


def test_source_that_changed_where_it_is_inlined_misses(moved: dict[str, Any]) -> None:
    assert missed(moved["inlined source"])
    assert "the source of sample_twin_one:inner differs" in moved["inlined source"]["why"]
    assert moved["stats"]["graphs"][0]["stale"] == {
        "sample_twin_one:twin": "the source of sample_twin_one:inner differs"
    }


def test_a_function_of_the_same_name_and_text_in_another_module_misses(moved: dict[str, Any]) -> None:
    assert missed(moved["same text"])
    assert (
        "its function is of module sample_twin_one, but this one is of sample_twin_three" in moved["same text"]["why"]
    )


def test_source_that_changed_misses(moved: dict[str, Any]) -> None:
    assert missed(moved["own source"])


def test_source_that_changed_is_named(moved: dict[str, Any]) -> None:
    assert "the source of sample_model:scaled differs" in moved["own source"]["why"]


@pytest.mark.parametrize("what", ["default", "class attribute"])
def test_a_value_that_changed_in_the_source_misses(what: str, moved: dict[str, Any]) -> None:
    assert missed(moved[what])
