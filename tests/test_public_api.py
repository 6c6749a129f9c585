"""The names that users import, the commands and entry points that are installed, and that each says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
from contracts import python

import aot_cache
from aot_cache import errors

ROOT = Path(__file__).parents[1]

# --- the one place to extend when a public name comes or goes ---------------------------------------------------------

DECLARE = ["Call", "Case", "Range", "Recipe", "Values", "declare", "device"]
SERVE = ["AotCacheWarning", "Report", "arm", "disarm", "explain", "fallback", "load", "policy", "prime", "prometheus"]
SERVE += ["ready", "recording", "seal", "stats", "unload"]
RANKS = ["Captured", "Decision", "Hit", "after_capture", "before_capture", "capture", "ranks", "will_hit"]
OTHER = ["AotCacheError", "__version__"]

PUBLIC = sorted(DECLARE + SERVE + RANKS + OTHER)

ERRORS = {  # name: (base, exit code of the command line)
    "AotCacheError": ("Exception", 3),
    "DeclarationError": ("AotCacheError", 3),
    "UnknownName": ("AotCacheError", 3),
    "TargetError": ("AotCacheError", 3),
    "TraceError": ("AotCacheError", 3),
    "DataDependent": ("TraceError", 3),
    "CompileFailed": ("AotCacheError", 4),
    "StoreError": ("AotCacheError", 3),
    "StoreUnwritable": ("StoreError", 3),
    "StoreChanged": ("StoreError", 3),
    "StoreInUse": ("StoreError", 3),
    "BundleCorrupt": ("StoreError", 8),
    "BundleMissing": ("StoreError", 3),
    "DigestMismatch": ("StoreError", 8),
    "Untrusted": ("StoreError", 8),
    "RemoteError": ("AotCacheError", 3),
    "RemoteDenied": ("RemoteError", 3),
    "RemoteMissing": ("RemoteError", 3),
    "Incompatible": ("AotCacheError", 16),
    "NotReady": ("AotCacheError", 32),
    "RehearsalFailed": ("AotCacheError", 5),
    "CacheMiss": ("AotCacheError", 64),
    "RankDisagreement": ("AotCacheError", 3),
    "TuneError": ("AotCacheError", 3),
}

# ----------------------------------------------------------------------------------------------------------------------


def test_the_exported_names() -> None:
    assert sorted(aot_cache.__all__) == PUBLIC
    assert list(aot_cache.__all__) == sorted(aot_cache.__all__), "keep __all__ in order"


@pytest.mark.parametrize("name", PUBLIC)
def test_a_name_can_be_imported_and_says_what_it_is(name: str) -> None:
    value: Any = getattr(aot_cache, name)
    if inspect.isclass(value) or inspect.isroutine(value):
        # A dataclass writes its signature where it has no docstring; that says nothing.
        written = (value.__doc__ or "").strip()
        assert written, f"aot_cache.{name} has no docstring"
        assert not written.startswith(f"{name}("), f"aot_cache.{name} has no docstring"


@pytest.mark.parametrize("name", [n for n in PUBLIC if n[0].isupper()])
def test_public_methods_say_what_they_do(name: str) -> None:
    silent = [
        method
        for method, value in vars(getattr(aot_cache, name)).items()
        if not method.startswith("_")
        and (inspect.isfunction(value) or isinstance(value, (classmethod, staticmethod, property)))
        and not inspect.getdoc(getattr(getattr(aot_cache, name), method))
    ]
    assert not silent, f"methods of aot_cache.{name} without a docstring: {silent}"


def test_the_package_alone_imports_none_of_its_rooms() -> None:
    """So that an engine's plug-in costs milliseconds in a process that does not serve."""
    code = "import sys, aot_cache; print([n for n in sys.modules if n.startswith('aot_cache.')])"
    assert python(code, {}).stdout.strip() == "[]"


def test_names_come_from_where_type_checkers_are_told() -> None:
    tree = ast.parse((ROOT / "aot_cache" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert set(told) | {"__version__"} == set(PUBLIC)
    for name, place in told.items():
        module, _, attribute = place.rpartition(".")
        assert getattr(aot_cache, name) is getattr(importlib.import_module(module), attribute), name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        aot_cache.nothing  # noqa: B018


def test_no_public_name_is_the_name_of_a_room() -> None:
    """Importing a module sets it as an attribute of its package, over whatever was there: a name would depend on the order."""
    rooms = {file.stem for file in (ROOT / "aot_cache").iterdir()}
    assert {"runtime", "errors"} <= rooms, "the rooms were not found"
    assert not rooms & set(PUBLIC)


def test_nothing_public_is_left_out() -> None:
    """Every name without an underscore that `aot_cache` defines itself, and no module, is in `__all__`."""
    own = {n for n, v in vars(aot_cache).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert own - {"annotations"} <= set(PUBLIC)


def test_the_tree_of_errors() -> None:
    found = {
        name: (value.__bases__[0].__name__, value.exit_code)
        for name, value in vars(errors).items()
        if inspect.isclass(value) and issubclass(value, errors.AotCacheError)
    }
    assert found == ERRORS


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_says_when_it_is_raised(name: str) -> None:
    text = getattr(errors, name).__doc__
    assert text, f"errors.{name} has no docstring"
    assert name in (errors.__doc__ or ""), f"errors.{name} is missing in the tree at the top of errors.py"


# --- what is installed ------------------------------------------------------------------------------------------------


def project() -> dict[str, Any]:
    try:
        tomllib = importlib.import_module("tomllib")
    except ModuleNotFoundError:  # Python 3.10, where pytest brings it
        tomllib = importlib.import_module("tomli")
    document: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return document["project"]  # type: ignore[no-any-return]


def test_the_version_is_the_package_s() -> None:
    assert project()["version"] == aot_cache.__version__


def installed_objects() -> dict[str, str]:
    own = project()
    groups = {"scripts": own["scripts"], **own["entry-points"]}
    return {f"{group}: {name}": spec for group, entries in groups.items() for name, spec in entries.items()}


@pytest.mark.parametrize("entry", installed_objects())
def test_an_entry_point_names_something(entry: str) -> None:
    """By the source: a recipe's module needs an extra that may not be installed."""
    module, _, name = installed_objects()[entry].partition(":")
    path = ROOT.joinpath(*module.split(".")).with_suffix(".py")
    assert path.is_file(), f"{entry} names {module}, and there is no {path.relative_to(ROOT)}"
    defined = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined.update(t.id for t in node.targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
    assert name in defined, f"{entry} names {name}, which {path.relative_to(ROOT)} does not define"


def test_types_are_shipped() -> None:
    assert Path(inspect.getfile(aot_cache)).with_name("py.typed").is_file()
