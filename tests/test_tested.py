"""aot_cache.tested and aot_cache.recipes.shipped: which releases are used in silence, with a word, or not at all."""

from __future__ import annotations

import functools
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS

from aot_cache import tested
from aot_cache.errors import AotCacheError
from aot_cache.recipes import declare as declaring
from aot_cache.recipes import shipped
from aot_cache.tested import GRAPHS, KERNELS, Module, Pair, Table

ROOT = Path(__file__).parents[1]
TABLE = Table(
    {
        "dynamo_guards": Module("guards", True, ("2.11",), ("3.6",)),
        "triton_jit": Module("kernels", True, ("2.11",), ("3.6",)),
        "torch_capture": Module("captures", True, ("2.11",), ("3.6",)),
        "inductor_target": Module("compiling", False, ("2.11",), ("3.6",)),
    },
    (
        Pair("2.9", "3.4", ("5.17", "5.24")),
        Pair("2.11", "3.6", ("5.24",)),
        Pair("2.12", "3.7", broken=("dynamo_guards",)),
        Pair("2.13", "3.7", broken=("triton_jit",)),
        Pair("2.14", "3.8", broken=("inductor_target",)),
        Pair("2.15", "3.9", failed=("graph hits",)),
        Pair("2.16", "3.9", broken=("torch_capture",)),
    ),
)


@pytest.mark.parametrize(
    ("torch", "triton", "graphs", "kernels"),
    [
        ("2.11.0+cu130", "3.6.0", "", ""),
        ("2.9.1", "3.4.0", "", ""),
        ("2.8.0", "3.4.0", "2.9 is the oldest", "2.9 is the oldest"),
        ("2.9.0", "3.3.1", "3.4 is the oldest", "3.4 is the oldest"),
        ("2.12.1", "3.7.1", "dynamo_guards", ""),
        ("2.13.0", "3.7.1", "", "triton_jit"),
        ("2.14.0", "3.8.0", "", ""),
        ("2.15.0", "3.9.0", "", ""),
        ("2.16.0", "3.9.0", "torch_capture", "torch_capture"),
        ("2.17.0a0+gitabc", "3.10.0", "", ""),
        ("2.16.0", "", "torch_capture", "torch_capture"),
        ("2.11.0", "3.9.0", "", ""),
    ],
)
def test_only_what_is_older_or_known_not_to_hold_is_refused(torch: str, triton: str, graphs: str, kernels: str) -> None:
    for what, words in ((GRAPHS, graphs), (KERNELS, kernels)):
        found = TABLE.refused(what, torch, triton)
        assert (words in found) if words else found == "", (what, found)


@pytest.mark.parametrize(
    ("torch", "triton", "transformers", "words"),
    [
        ("2.11.0", "3.6.0", "", ""),
        ("2.11.0", "", "", ""),
        ("2.11.0", "3.6.1", "5.24.3", ""),
        ("2.11.0", "3.6.0", "5.17.0", "transformers 5.17.0 (tested there: 5.24)"),
        ("2.11.0", "3.9.0", "", "never tested with torch 2.11.0 × triton 3.9.0 (tested: 2.9 × 3.4, 2.11 × 3.6"),
        ("2.17.0", "", "", "never tested with torch 2.17.0 (tested: 2.9, 2.11, 2.12"),
        ("2.15.0", "3.9.0", "", "tests did not pass with torch 2.15.0 × triton 3.9.0: graph hits"),
        ("2.14.0", "3.8.0", "", "tests did not pass with torch 2.14.0 × triton 3.8.0: inductor_target"),
    ],
)
def test_what_nobody_tested_is_said_in_one_line(torch: str, triton: str, transformers: str, words: str) -> None:
    found = TABLE.doubt(torch, triton, transformers)
    assert (words in found and "\n" not in found) if words else found == "", found


def test_a_table_without_rows_refuses_nothing_and_doubts_everything() -> None:
    empty = Table({}, ())
    assert empty.refused(GRAPHS, "2.13.0", "3.7.0") == "" and "never tested" in empty.doubt("2.13.0", "3.7.0")


def test_a_word_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tested, "table", lambda: Table({}, (Pair("99.1", "99.1"),)))
    monkeypatch.delenv("AOT_CACHE_UNTESTED")
    assert "99.1 is the oldest" in tested.refused_here(GRAPHS, on_cpu=True)
    assert "never tested" in tested.doubt_here(on_cpu=False)
    monkeypatch.setenv("AOT_CACHE_UNTESTED", "1")
    assert tested.refused_here(GRAPHS, on_cpu=True) == tested.doubt_here(on_cpu=False) == ""


# --- shipped recipes --------------------------------------------------------------------------------------------------


def test_a_shipped_recipe_is_not_the_reader_s_to_mend() -> None:
    from aot_cache.models.qwen3_5.recipe import recipe as qwen

    text = shipped.what_to_do(functools.partial(qwen, tp=1))
    assert "fix the recipe" not in text and "aot-cache's own" in text and "\n" not in text
    for pair in tested.table().pairs:
        assert pair.broken or pair.failed or pair.text in text
    for release in (tested.table().transformers()[0], tested.table().transformers()[-1]):
        assert release in text
    assert f"torch {tested.installed('torch')}" in text
    assert shipped.what_to_do(test_a_shipped_recipe_is_not_the_reader_s_to_mend) == shipped.YOURS


BROKEN = {
    "another transformers": "raise ImportError(\"cannot import name 'MtpModel'\")",
    "no transformers": "import a_module_that_nobody_has",
    "another call": "def recipe():\n    raise TypeError(\"update() got an unexpected keyword argument 'kwargs'\")\n",
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.parametrize("own", [True, False])
def test_an_error_in_a_shipped_recipe(own: bool, what: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever raises, importing it or making it: the same recipe is the reader's to mend only where it is the reader's."""
    import aot_cache.models

    (tmp_path / "broken_one.py").write_text(BROKEN[what])
    monkeypatch.setattr(aot_cache.models, "__path__", [*aot_cache.models.__path__, str(tmp_path)])
    monkeypatch.syspath_prepend(str(tmp_path))
    name = "broken_one" if own else "aot_cache.models.broken_one"
    monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(AotCacheError) as caught:
        declaring.load(f"{name}:recipe")
    assert ("aot-cache's own" in str(caught.value)) is not own
    assert own or not ("fix the" in str(caught.value) or "PYTHONPATH" in str(caught.value))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("where", ["trace", "graphs"])
def test_an_error_while_a_shipped_recipe_runs(own: bool, where: str) -> None:
    code = (
        "import sys\n"
        "from aot_cache import Call, Recipe, Values, declare; from aot_cache.artifact import target\n"
        "from aot_cache.errors import DeclarationError\n"
        "def case(n):\n"
        "    raise TypeError('update() got an unexpected keyword argument')\n"
        "case.__module__ = sys.argv[1]\n"
        "recipe = Recipe('r', [declare(n=Values(1))(case)])\n"
        "try:\n"
        "    if sys.argv[2] == 'graphs':\n"
        "        from aot_cache.builder import graphs\n"
        "        runs = graphs.GraphBuilder(recipe, target.get('cpu'))\n"
        "        runs.survey(lambda *_: None)\n"
        "        print(runs.broken[0].error.hint)\n"
        "    else:\n"
        "        from aot_cache.builder import kernels_trace, virtual_gpu\n"
        "        virtual_gpu.become(target.get('h200'))\n"
        "        kernels_trace.trace(recipe, 'h200', lambda *_: None, 1)\n"
        "except DeclarationError as error:\n"
        "    print(error.hint)\n"
    )
    module = "my_recipe" if own else "aot_cache.models.qwen3_5.recipe"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, module, where],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANGS,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = done.stdout.strip().splitlines()[-1]
    assert said == (shipped.YOURS if own else shipped.known_to_work())
