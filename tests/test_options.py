"""recipes.options, and recipes that are made of options: the text that carries them, what is read and what is refused."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aot_cache.errors import DeclarationError, UnknownName
from aot_cache.recipes import declare as recipes
from aot_cache.recipes import options
from aot_cache.recipes.declare import Call, Case, Recipe, declare
from aot_cache.recipes.dimensions import Range

NAMES = st.text(min_size=1)
NAME = st.text(st.characters(exclude_characters="?"), min_size=1)


def made(
    *,
    size: str = "0.8b",
    spec: Literal["none", "mtp"] = "none",
    drafts: Literal[1, 2] = 1,
    max_batch: int = 256,
    scale: float = 1.0,
    packed: bool = False,
    config: str = "",
) -> Recipe:
    """A recipe whose doc says what it was made of."""

    @declare(n=Range(1, max_batch))
    def case(n: int) -> Call:
        return Call(int, n)

    return Recipe("made", [case], repr((size, spec, drafts, max_batch, scale, packed, config)))


big = functools.partial(made, size="27b", max_batch=8)
bigger = functools.partial(big, size="397b")
plain = Recipe("plain", made().cases)


def needs(*, layers: int) -> Case:
    return made(max_batch=layers).cases[0]


def load(tail: str) -> Recipe:
    return recipes.load(f"{__name__}:{tail}")


def spec_of(tail: str) -> str:
    return load(tail).spec.partition(":")[2]


# --- the text ---------------------------------------------------------------------------------------------------------


@given(NAME, st.dictionaries(NAMES, st.text()))
def test_options_survive_their_text(name: str, given: dict[str, str]) -> None:
    spec = options.text(name, given)
    assert options.parse(spec) == (name, given)
    assert options.text(*options.parse(spec)) == spec
    assert spec.removeprefix(name).isascii()


@given(st.dictionaries(NAMES, st.text(), min_size=1))
def test_the_order_of_options_does_not_matter(given: dict[str, str]) -> None:
    assert options.text("m", given) == options.text("m", dict(reversed(given.items())))
    first, *rest = given
    assert options.added(options.text("m", {n: given[n] for n in rest}), {first: given[first]}) == options.text(
        "m", given
    )


def test_a_name_of_a_file_that_is_no_utf_8() -> None:
    assert options.parse(options.text("m", {"config": "a\udcff"})) == ("m", {"config": "a\udcff"})


def test_a_text_that_people_write() -> None:
    assert options.text("qwen3.5", {"spec": "mtp", "max_batch": "64"}) == "qwen3.5?max_batch=64&spec=mtp"
    assert options.parse("m?path=a/b.json&x=a=b") == ("m", {"path": "a/b.json", "x": "a=b"})
    assert options.text("m", {}) == "m" and options.parse("m:r") == ("m:r", {})


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("m?", "options of 'm' as name=value&name=value, found ''"),
        ("m?tp", "'tp'"),
        ("m?=2", "'=2'"),
        ("m?tp=1&", "''"),
        ("m?tp=1&tp=1", "option 'tp' of 'm' is given twice"),
        ("m?tp=1&t%70=2", "option 'tp' of 'm' is given twice"),
        ("m?tp=%ff", "as the value of an option, found '%ff'"),
    ],
)
def test_a_text_that_is_refused(spec: str, words: str) -> None:
    for call in (options.parse, recipes.resolve, recipes.load):
        with pytest.raises(DeclarationError) as caught:
            call(spec)
        assert words in str(caught.value)


def test_an_option_that_is_added_twice() -> None:
    with pytest.raises(DeclarationError, match="'tp' of 'm' is given twice: '1' and '2'"):
        options.added("m?tp=1", {"tp": "2"})


# --- recipes of options -----------------------------------------------------------------------------------------------


def test_what_is_read() -> None:
    text = "made?size=4b&spec=mtp&drafts=2&max_batch=64&scale=0.5&packed=yes&config=a%20b%26c"
    assert load(text).doc == repr(("4b", "mtp", 2, 64, 0.5, True, "a b&c"))
    assert load("made").doc == repr(("0.8b", "none", 1, 256, 1.0, False, ""))
    assert load(text).cases[0].dims["n"] == Range(1, 64)


def test_a_recipe_s_spec_has_what_is_no_default_in_order() -> None:
    assert spec_of("made?spec=mtp&packed=1&max_batch=064&scale=2") == "made?max_batch=64&packed=true&scale=2.0&spec=mtp"
    assert spec_of("made?spec=none&max_batch=256&packed=off&scale=1") == "made" == spec_of("made")
    spec = load("made?size=4b%26&spec=mtp").spec
    assert recipes.load(spec).spec == spec and recipes.load(spec).doc == load("made?size=4b%26&spec=mtp").doc


def test_fixed_options() -> None:
    assert load("big").doc == repr(("27b", "none", 1, 8, 1.0, False, "")) and spec_of("big") == "big"
    assert load("bigger?spec=mtp").doc == repr(("397b", "mtp", 1, 8, 1.0, False, ""))
    with pytest.raises(DeclarationError, match=r"option 'size' of '.*:bigger' is fixed to '397b'"):
        load("bigger?size=397b")


def test_what_the_recipe_itself_refuses_is_said_in_its_words() -> None:
    with pytest.raises(DeclarationError, match=r"-1 in Range\(1, -1"):
        load("made?max_batch=-1")


def test_an_option_without_a_default() -> None:
    recipe = load("needs?layers=3")
    assert (recipe.name, recipe.cases[0].dims["n"]) == ("case", Range(1, 3)) and spec_of(
        "needs?layers=3"
    ) == "needs?layers=3"
    with pytest.raises(DeclarationError, match=r"option 'layers' of '.*:needs' is missing"):
        load("needs")


def test_a_function_may_be_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "cached", functools.cache(made))
    assert load("cached?max_batch=3").cases[0].dims["n"] == Range(1, 3)


@pytest.mark.parametrize(
    ("tail", "error", "words"),
    [
        ("made?max_batch=many", DeclarationError, "a whole number as option 'max_batch' of '{}:made', found 'many'"),
        ("made?max_batch=1.5", DeclarationError, "a whole number"),
        ("made?max_batch=", DeclarationError, "a whole number as option 'max_batch' of '{}:made', found ''"),
        ("made?scale=x", DeclarationError, "a number as option 'scale' of '{}:made', found 'x'"),
        ("made?scale=inf", DeclarationError, "found 'inf'"),
        ("made?scale=nan", DeclarationError, "found 'nan'"),
        (
            "made?packed=maybe",
            DeclarationError,
            "expected one of true, false, 1, 0, yes, no, on, off as option 'packed' of '{}:made', found 'maybe'",
        ),
        (
            "made?spec=mpt",
            DeclarationError,
            "expected one of none, mtp as option 'spec' of '{}:made', found 'mpt'; hint: did you mean 'mtp'?",
        ),
        ("made?drafts=3", DeclarationError, "expected one of 1, 2 as option 'drafts' of '{}:made', found '3'"),
        (
            "made?max-batch=3",
            UnknownName,
            "'max-batch'; known: config, drafts, max_batch, packed, scale, size, spec; hint: did you mean 'max_batch'?",
        ),
        ("big?max_batsh=3", UnknownName, "known: config, drafts, packed, scale, spec"),
        ("plain?tp=2", UnknownName, "'{}:plain' has no option 'tp'; it takes no options"),
        ("nothing?tp=2", UnknownName, "no recipe at {0}:nothing: {0} has no 'nothing'"),
    ],
)
def test_an_option_that_is_refused(tail: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        load(tail)
    assert words.format(__name__) in str(caught.value)


def test_a_whole_number_may_be_of_any_size() -> None:
    big = 10**400
    assert options.make(_echo, "m", {"n": str(big)}) == (big, {"n": str(big)})


def _echo(*, n: int = 0) -> Any:
    return n


def _lists(*, n: list[int]) -> Any: ...
def _bare(n=1) -> Any: ...  # type: ignore[no-untyped-def]
def _any(**n: int) -> Any: ...
def _gone(n: NotThere = 1) -> Any: ...  # type: ignore[name-defined]  # noqa: F821
def _raises(n: int = 1) -> Any:
    raise ValueError("no such layer")


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        (
            "_lists",
            DeclarationError,
            "str, int, float, bool or a Literal as the annotation of option 'n' of '{}:_lists', found list",
        ),
        ("_bare", DeclarationError, "found none; hint: name a Recipe, a declared case, or a function that makes one"),
        ("_any", DeclarationError, "expected keywords as options of '{}:_any', found a function that takes **n"),
        ("_gone", DeclarationError, "cannot be read: NameError"),
        ("_raises", DeclarationError, "recipe '{}:_raises' raised ValueError: no such layer"),
        ("_echo", UnknownName, "a Recipe at {}:_echo, found an object of type int"),
    ],
)
def test_a_function_that_is_no_good(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error) as caught:
        load(name)
    assert words.format(__name__) in str(caught.value)


# --- a file among the options -----------------------------------------------------------------------------------------


def test_a_file_is_told_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = tmp_path / "a&b.json", tmp_path / "two.json"
    for path in (one, two):
        path.write_text("{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    told = options.published(options.text("m", {"config": str(one), "tp": "2"}))
    assert told == options.published(options.text("m", {"config": str(two), "tp": "2"}))
    assert told == f"m?config=sha256:{digest}&tp=2" == options.published(told)
    assert options.published("m?tp=2") == "m?tp=2"
    two.write_text("{ }")
    assert options.published(f"m?config={two}&tp=2") != told
    # Back: by the variable, whose file has to be the one
    with pytest.raises(DeclarationError, match=r"in AOT_CACHE_CONFIG, found nothing: the variable is not set"):
        options.with_file(told)
    monkeypatch.setenv("AOT_CACHE_CONFIG", str(two))
    with pytest.raises(DeclarationError, match="expected config file sha256:"):
        options.with_file(told)
    monkeypatch.setenv("AOT_CACHE_CONFIG", str(one))
    assert options.parse(options.with_file(told)) == ("m", {"config": str(one), "tp": "2"})
    assert load(f"made?config=sha256:{digest}").doc.endswith(f"{str(one)!r})")


@pytest.mark.parametrize("value", ["", "nowhere.json", ".", "a%00b"])
def test_a_file_that_is_not_there(value: str) -> None:
    with pytest.raises(DeclarationError, match="cannot read config file "):
        options.published(f"m?config={value}")


# --- in a file's name -------------------------------------------------------------------------------------------------


def test_a_file_s_name_says_the_options() -> None:
    assert options.file_name("qwen3.5", "q?spec=mtp&max_batch=64") == "qwen3.5-max_batch=64-spec=mtp"
    assert options.file_name("a/b c", "q") == "a-b-c"
    assert options.file_name("q", f"q?config=sha256:{'ab' * 32}") == "q-config=abababababab"


@given(
    st.lists(st.dictionaries(st.sampled_from(["a", "b", "tp"]), st.text("ab=-/tp", max_size=4)), min_size=2, max_size=5)
)
def test_other_options_have_another_name(specs: list[dict[str, str]]) -> None:
    different = {options.text("q", given) for given in specs}
    names = {options.file_name("q", spec) for spec in different}
    assert len(names) == len(different)
    assert all("/" not in name and len(name) < 150 for name in names)


def test_a_long_name_is_cut_and_stays_its_own() -> None:
    one, two = (options.file_name("q", f"q?x={'y' * 300}{n}") for n in range(2))
    assert one != two and len(one) < 130
