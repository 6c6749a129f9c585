"""aot_cache.recipes.from_config: from a model's config file to its recipe, and what is wrong with a file in one line."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from aot_cache.errors import AotCacheError, DeclarationError, UnknownName
from aot_cache.recipes import from_config, options


class EntryPoint(NamedTuple):
    name: str
    value: str


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and two recipes for three types of models."""
    monkeypatch.chdir(tmp_path)
    groups = {
        "aot_cache.recipes": [
            EntryPoint("small", "pack:small"),
            EntryPoint("a", "pack:recipe"),
            EntryPoint("b", "pack:recipe"),
        ],
        "aot_cache.model_types": [
            EntryPoint("big_3", "pack:recipe"),
            EntryPoint("big_3_text", "pack:recipe"),
            EntryPoint("other", "pack:other"),
        ],
    }
    monkeypatch.setattr(metadata, "entry_points", lambda group: groups[group])


@pytest.mark.parametrize(
    ("text", "is_config"),
    [
        ("config.json", True),  # there or not: nothing else ends so
        ("nowhere/config.json", True),
        ("a:b/config.json", True),
        ("there", True),
        ("there?tp=2", False),
        ("small", False),  # a recipe's name goes before a file's
        ("module:there", False),
        ("missing", False),
        ("small?config=x.json", False),
        ("nowhere?config=x.json", False),
        (".", False),  # no config.json in it
        ("folder", True),
        ("", False),
    ],
)
def test_what_is_a_config_file(text: str, is_config: bool) -> None:
    Path("folder").mkdir()
    for name in ("there", "small", "module:there", "folder/config.json"):
        Path(name).touch()
    assert from_config.is_config(text) is is_config


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("big_3", "a"), ("big_3_text", "a"), ("other", "pack:other")],  # by its name, the first of two, else by its object
)
def test_a_recipe_is_found_by_the_model_s_type(model_type: str, name: str) -> None:
    Path("a b.json").write_text(f'{{"model_type": "{model_type}", "layers": 3}}')
    assert options.parse(from_config.spec_for("a b.json")) == (name, {"config": "a b.json"})


def test_a_model_s_folder_is_its_config_file() -> None:
    Path("m").mkdir()
    Path("m/config.json").write_text('{"model_type": "other"}')
    assert options.parse(from_config.spec_of("m", {"tp": "2"})) == (
        "pack:other",
        {"config": "m/config.json", "tp": "2"},
    )
    assert from_config.spec_of("small", {"tp": "2"}) == "small?tp=2"


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (None, DeclarationError, "cannot read config file f.json: No such file"),
        ("{", DeclarationError, "config file f.json is not JSON: Expecting"),
        ("\x00", DeclarationError, "not JSON"),
        ("[" * 100_000, DeclarationError, "not JSON"),
        ("[1]", DeclarationError, 'a "model_type" in f.json, found none; hint: give transformers'),
        ("{}", DeclarationError, 'a "model_type" in f.json, found none'),
        ('{"model_type": 3}', DeclarationError, 'a "model_type" in f.json, found 3'),
        (
            '{"model_type": "bert"}',
            UnknownName,
            "no recipe for model_type 'bert' of f.json; known: big_3, big_3_text, other",
        ),
        ('{"model_type": "big3"}', UnknownName, "did you mean 'big_3'?"),
    ],
)
def test_a_file_that_is_no_good(content: str | None, error: type[AotCacheError], words: str) -> None:
    if content is not None:
        Path("f.json").write_text(content)
    with pytest.raises(error) as caught:
        from_config.spec_for("f.json")
    assert words in str(caught.value)


def test_a_folder_and_bytes_that_are_no_text() -> None:
    Path("d.json").mkdir()
    Path("b.json").write_bytes(b'{"model_type": "\xff"}')
    for name in ("d.json", "b.json"):
        with pytest.raises(DeclarationError, match=name):
            from_config.spec_for(name)
