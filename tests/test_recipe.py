"""aot_cache.recipes.declare: what can be declared, what is refused and in which words."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from limits import HANGS

from aot_cache.errors import DeclarationError, UnknownName
from aot_cache.recipes import declare as recipes
from aot_cache.recipes.declare import Call, Case, Recipe, declare
from aot_cache.recipes.dimensions import Range, Values

ROOT = Path(__file__).parents[1]


def add(a: int, b: int = 0, *, c: int = 0) -> int:
    return a + b + c


@declare(a=Range(1, 4), b=Values(1, 2))
def adding(a: int, b: int) -> Call:
    return Call(add, a, b, c=10)


# --- calls and cases --------------------------------------------------------------------------------------------------


def test_a_call_is_made_when_it_is_called() -> None:
    call = Call(add, 1, b=2)
    assert (call.fn, call.args, call.kwargs) == (add, (1,), {"b": 2})
    assert call() == 3


def test_a_call_may_have_an_argument_called_fn() -> None:
    assert Call(dict, fn=1)() == {"fn": 1}


def test_a_case_has_the_function_s_name_and_dimensions_in_order() -> None:
    assert adding.name == "adding" and list(adding.dims) == ["a", "b"]
    assert adding.mode == "inference" and adding.autocast is None
    assert adding.call({"a": 2, "b": 1})() == 13


def test_a_case_may_have_another_name_and_mode() -> None:
    @declare(name="other", mode="no_grad", autocast="bfloat16", n=Range(1, 2))
    def case(n: int) -> Call:
        return Call(add, n)

    assert (case.name, case.mode, case.autocast) == ("other", "no_grad", "bfloat16")


def test_a_case_s_doc_is_the_first_line_of_its_function_s() -> None:
    @declare()
    def case() -> Call:
        """
        Prompts of several requests.

        And more.
        """
        return Call(add, 1)

    assert case.doc == "Prompts of several requests." and adding.doc == ""
    assert Recipe("sample", [case]).widened({"case": [{}]}).cases[0].doc == case.doc


def test_a_case_may_have_no_dimension() -> None:
    @declare()
    def case() -> Call:
        return Call(add, 1)

    assert case.dims == {} and case.call({})() == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "training", "n": Range(1, 2)}, "'case' to be one of inference, no_grad, grad, found 'training'"),
        ({"n": 3}, "dimension 'n' of case 'case' to be a Range or Values, found 3"),
        ({"n": range(3)}, "to be a Range or Values"),
        ({"n": Range(1, 2), "m": Range(1, 2)}, "differ from its dimensions: m"),
        ({}, "differ from its dimensions: n"),
        ({"m": Range(1, 2)}, "differ from its dimensions: m, n"),
    ],
)
def test_a_declaration_that_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DeclarationError) as caught:

        @declare(**settings)
        def case(n: int) -> Call:
            return Call(add, n)

    assert words in str(caught.value)


def test_an_autocast_dtype_that_torch_has_not_is_refused() -> None:
    """When it is declared, not in the middle of a build."""
    with pytest.raises(DeclarationError, match="bfloat15"):

        @declare(autocast="bfloat15", n=Range(1, 2))
        def case(n: int) -> Call:
            return Call(add, n)


def test_what_is_no_call_is_refused() -> None:
    case = Case("case", lambda n: n, {"n": Range(1, 2)})  # type: ignore[arg-type, return-value]
    with pytest.raises(DeclarationError) as caught:
        case.call({"n": 1})
    assert "aot_cache.Call(function, *arguments) from case 'case'" in str(caught.value) and "type int" in str(
        caught.value
    )


def test_modes_are_those_of_serving() -> None:
    """In a process of its own: this one need not import torch."""
    code = """
import torch
from aot_cache.recipes.declare import Case
seen = []
for mode in ("inference", "no_grad", "grad"):
    with Case("c", None, {}, mode).modes():
        seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.is_autocast_enabled("cuda")))
assert seen == [(True, False, False), (False, False, False), (False, True, False)], seen
with torch.no_grad(), Case("c", None, {}, "grad", "float16").modes():
    assert torch.is_grad_enabled()
    if torch.cuda.is_available():  # torch switches autocast off where there is no GPU
        assert torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16
assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
with Case("c", None, {}, "no_grad", "bfloat16").modes("cpu"):
    assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cuda") and not torch.is_grad_enabled()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, timeout=HANGS)


# --- the size to be best at -------------------------------------------------------------------------------------------


def test_a_hint_is_the_largest_unless_it_is_declared() -> None:
    assert adding.hint == {} and (adding.hint_of("a"), adding.hint_of("b")) == (4, 2)

    @declare(hint={"a": 2}, a=Range(1, 8), b=Values(9, 3))
    def case(a: int, b: int) -> Call:
        return Call(add, a, b)

    assert case.hint == {"a": 2} and (case.hint_of("a"), case.hint_of("b")) == (2, 9)


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        ({"n": 9}, "n=9 (it has n 1..8/2)"),
        ({"n": 2}, "n=2"),  # between two steps
        ({"n": 0}, "n=0"),
        ({"n": True}, "n=True"),
        ({"n": 1.0}, "n=1.0"),
        ({"m": 1}, "m=1 (it has dimensions n)"),
    ],
)
def test_a_hint_that_is_no_point_of_the_case(hint: dict[str, Any], words: str) -> None:
    with pytest.raises(DeclarationError, match="hint of case 'case'") as caught:

        @declare(hint=hint, n=Range(1, 8, 2))
        def case(n: int) -> Call:
            return Call(add, n)

    assert words in str(caught.value)


def test_a_hint_where_there_is_no_dimension() -> None:
    with pytest.raises(DeclarationError, match="dimensions none"):

        @declare(hint={"n": 1})
        def case() -> Call:
            return Call(add, 1)


def test_a_hint_of_the_caller_s_is_copied() -> None:
    hint = {"n": 1}

    @declare(hint=hint, n=Range(1, 8))
    def case(n: int) -> Call:
        return Call(add, n)

    hint["n"] = 5
    assert case.hint_of("n") == 1


def test_narrowing_keeps_the_hint() -> None:
    """Also one that is now outside: the point nearest to it is then the one to be best at."""

    @declare(hint={"n": 100}, n=Range(1, 512))
    def case(n: int) -> Call:
        return Call(add, n)

    (narrow,) = Recipe("sample", [case]).narrowed({"n": Range(1, 8)}).cases
    assert narrow.hint_of("n") == 100


# --- where tensors are made -------------------------------------------------------------------------------------------


def test_tensors_are_made_on_the_gpu_unless_the_builder_says_otherwise() -> None:
    assert recipes.device() == "cuda"
    try:
        recipes.set_device("cpu")
        assert recipes.device() == "cpu"
    finally:
        recipes.set_device("cuda")


# --- recipes ----------------------------------------------------------------------------------------------------------


def test_a_recipe_without_cases_is_refused() -> None:
    with pytest.raises(DeclarationError, match="'empty' has no case"):
        Recipe("empty", [])


def test_cases_of_one_name_are_refused() -> None:
    with pytest.raises(DeclarationError, match="two cases called adding"):
        Recipe("twice", [adding, adding])


def test_a_recipe_for_no_rank_is_refused() -> None:
    with pytest.raises(DeclarationError, match="a world size of at least 1 for recipe 'none', found 0"):
        Recipe("none", [adding], ranks=0)


def test_narrowing_replaces_dimensions_wherever_they_are() -> None:
    @declare(b=Range(1, 100))
    def other(b: int) -> Call:
        return Call(add, b)

    recipe = Recipe("sample", [adding, other], "doc")
    narrow = recipe.narrowed({"b": Values(7)})
    assert [dict(case.dims) for case in narrow.cases] == [{"a": Range(1, 4), "b": Values(7)}, {"b": Values(7)}]
    assert list(narrow.cases[0].dims) == ["a", "b"], "in the declared order"
    assert dict(recipe.cases[1].dims) == {"b": Range(1, 100)}, "the recipe stays"
    assert narrow.name == "sample" and narrow.doc == "doc"


def test_narrowing_to_a_value_outside_of_the_range_is_allowed() -> None:
    """`--range` is the user's word; the recipe's is a default."""
    assert Recipe("sample", [adding]).narrowed({"a": Range(9, 10)}).cases[0].dims["a"] == Range(9, 10)


def test_narrowing_an_unknown_dimension_is_refused() -> None:
    with pytest.raises(UnknownName) as caught:
        Recipe("sample", [adding]).narrowed({"tokens": Range(1, 2)})
    assert "'tokens'" in str(caught.value) and "known: a, b" in str(caught.value)


# --- finding them -----------------------------------------------------------------------------------------------------


class EntryPoint:
    def __init__(self, name: str, value: str) -> None:
        self.name, self.value = name, value


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two installed recipes, whatever is installed here."""
    found = [EntryPoint("gated-delta", "package.module:recipe"), EntryPoint("other", "nowhere:recipe")]
    monkeypatch.setattr(metadata, "entry_points", lambda group: found if group == "aot_cache.recipes" else [])


@pytest.mark.usefixtures("installed")
def test_names_resolve_without_importing() -> None:
    assert recipes.names() == {"gated-delta": "package.module:recipe", "other": "nowhere:recipe"}
    assert recipes.resolve("gated-delta") == "package.module:recipe"
    assert recipes.resolve("any.module:thing.of") == "any.module:thing.of"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "words"),
    [("gated-dalta", "did you mean 'gated-delta'?"), ("xyz", "known: gated-delta, other"), ("", "known:")],
)
def test_an_unknown_name(name: str, words: str) -> None:
    with pytest.raises(UnknownName) as caught:
        recipes.resolve(name)
    assert words in str(caught.value) and repr(name) in str(caught.value)


@pytest.mark.usefixtures("installed")
def test_a_name_whose_module_is_gone() -> None:
    with pytest.raises(UnknownName) as caught:
        recipes.load("other")
    assert "'nowhere'" in str(caught.value) and "'other'" in str(caught.value)


def test_loading_a_recipe_and_a_case() -> None:
    own = sys.modules[__name__]
    spec = f"{__name__}:adding"
    loaded = recipes.load(spec)
    assert (loaded.name, list(loaded.cases), loaded.spec) == ("adding", [adding], spec)
    own.whole = Recipe("whole", [adding])  # type: ignore[attr-defined]
    assert recipes.load(f"{__name__}:whole").name == "whole"
    own.holder = type("Holder", (), {"inside": Recipe("inside", [adding])})  # type: ignore[attr-defined]
    assert recipes.load(f"{__name__}:holder.inside").name == "inside"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("raise ValueError('bad weights')", DeclarationError, "ValueError: bad weights"),
        ("import not_here_at_all", UnknownName, "no module named 'not_here_at_all'"),
        ("from os import not_there", DeclarationError, "ImportError"),
        ("def broken(:", DeclarationError, "SyntaxError"),
        ("recipe = 3", UnknownName, "an object of type int"),
        ("", UnknownName, "no recipe at bad_module_"),
    ],
)
def test_a_module_that_is_no_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: type[Exception], words: str
) -> None:
    name = f"bad_module_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(error) as caught:
        recipes.load(f"{name}:recipe")
    assert words in str(caught.value)


def test_a_module_that_a_recipe_lacks_is_not_misspelt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No hint that names the module that was given."""
    (tmp_path / "own_module.py").write_text("import not_here_at_all")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(UnknownName, match="'not_here_at_all'; hint: install it, or set PYTHONPATH"):
        recipes.load("own_module:recipe")


def test_a_recipe_that_ships_is_installed_under_its_name() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert 'gated-delta = "aot_cache.models.gated_delta:recipe"' in text
    assert (ROOT / "aot_cache" / "models" / "gated_delta.py").is_file()
