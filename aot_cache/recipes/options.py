"""A recipe's options, and their text form, the spec: `qwen3.5?max_batch=64&spec=mtp`. Imports only the errors.

A `module:object` may be a function that makes a `Recipe` from keyword options. The command line, workers, stamps and bundles
all name a recipe by its spec, so that options reach all of them in the same way.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import math
import os
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote, unquote_to_bytes

from aot_cache.errors import DeclarationError, UnknownName, did_you_mean

CONFIG = "config"
"""The option that names a config file, in every recipe that has one. The file's content counts, not its path."""
CONFIG_VARIABLE = "AOT_CACHE_CONFIG"
_SHA256 = "sha256:"
_SWITCH = {"true": True, "false": False, "1": True, "0": False, "yes": True, "no": False, "on": True, "off": False}


# --- the text ---------------------------------------------------------------------------------------------------------


def parse(spec: str) -> tuple[str, dict[str, str]]:
    """(name, options as text) of a spec.

    Raises:
        DeclarationError: the text after `?` is not of the form `name=value&name=value`, or has an option twice.
    """
    name, mark, rest = spec.partition("?")
    options: dict[str, str] = {}
    for part in rest.split("&") if mark else ():
        option, equals, value = part.partition("=")
        if not (option and equals):
            raise DeclarationError(f"options of {name!r} as name=value&name=value", repr(part), f"write {name}?tp=2")
        if _plain(option) in options:
            raise DeclarationError(f"option {_plain(option)!r} of {name!r} is given twice", hint="give it once")
        options[_plain(option)] = _plain(value)
    return name, options


def text(name: str, options: Mapping[str, str]) -> str:
    """The spec of a name and options: sorted by name and percent-escaped, so that equal options have equal text."""
    escaped = [f"{_escaped(option)}={_escaped(value)}" for option, value in sorted(options.items())]
    return f"{name}?{'&'.join(escaped)}" if escaped else name


def added(spec: str, more: Mapping[str, str]) -> str:
    """The spec with `more` options.

    Raises:
        DeclarationError: one of them is in `spec` already, or `spec` is not a spec.
    """
    name, options = parse(spec)
    for option in more:
        if option in options:
            both = f"{options[option]!r} and {more[option]!r}"
            raise DeclarationError(f"option {option!r} of {name!r} is given twice: {both}", hint="give it once")
    return text(name, {**options, **more})


def _escaped(value: str) -> str:
    return quote(value, safe="/:,@", errors="surrogatepass")  # file names need not be UTF-8


def _plain(value: str) -> str:
    try:
        return unquote_to_bytes(value).decode("utf-8", "surrogatepass")
    except UnicodeDecodeError as error:
        raise DeclarationError("percent-escaped UTF-8 as the value of an option", repr(value)) from error


def file_name(name: str, spec: str, more: Mapping[str, str] | None = None) -> str:
    """A recipe's name and the options of its spec, for use in a file name: `qwen3.5-max_batch=64-spec=mtp`.

    Different specs, or different `more` words (appended after the options), give different names: a name that would be too
    long, or that has characters unfit for a file name, ends with a digest.
    """
    _, given = parse(spec)
    if CONFIG in given:
        given[CONFIG] = given[CONFIG].removeprefix(_SHA256)[:12]
    all_words = [*sorted(given.items()), *(more or {}).items()]
    words = "-".join(f"{option}={_safe(value)}" for option, value in all_words)
    if len(words) > 120 or any(_safe(value) != value for _, value in all_words):
        given.update(more or {})
        words = f"{words[:100]}-{hashlib.sha256(text('', given).encode()).hexdigest()[:12]}"
    return f"{_safe(name)}-{words}" if words else _safe(name)


def _safe(value: str) -> str:
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in value)


# --- a file among the options -----------------------------------------------------------------------------------------


def published(spec: str) -> str:
    """The spec with the `config` path replaced by the file's sha256, for stamps and bundles.

    Raises:
        DeclarationError: there is no such file.
    """
    name, options = parse(spec)
    if CONFIG in options and not options[CONFIG].startswith(_SHA256):
        options[CONFIG] = _SHA256 + _file_digest(options[CONFIG])
    return text(name, options)


def with_file(spec: str) -> str:
    """The inverse of `published`: the digest is replaced by the path in AOT_CACHE_CONFIG.

    Raises:
        DeclarationError: the variable is not set, or its file has another digest.
    """
    name, options = parse(spec)
    wanted = options.get(CONFIG, "")
    if not wanted.startswith(_SHA256):
        return spec
    path = os.environ.get(CONFIG_VARIABLE, "")
    found = _SHA256 + _file_digest(path) if path else "nothing: the variable is not set"
    if found != wanted:
        raise DeclarationError(
            f"config file {wanted} of {name!r} in {CONFIG_VARIABLE}",
            found,
            "set it to the file that the bundle was built from: a bundle holds only the file's digest",
        )
    options[CONFIG] = path
    return text(name, options)


def _file_digest(path: str) -> str:
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:  # ValueError: the path has a NUL
        why = getattr(error, "strerror", None) or str(error)
        raise DeclarationError(f"cannot read config file {path}: {why}", hint="correct the path") from error


# --- the function -----------------------------------------------------------------------------------------------------


def makes_recipes(found: object) -> bool:
    """Whether `found` is a function (or a `functools.partial` of one), which makes the recipe."""
    return inspect.isfunction(_function(found))


def make(found: Callable[..., object], name: str, given: Mapping[str, str]) -> tuple[object, dict[str, str]]:
    """(what the function makes from the options, the options that differ from its defaults as text).

    Raises:
        UnknownName: the function does not have an option.
        DeclarationError: a value does not have its option's type, an option is fixed or missing, or the function's parameters
            cannot be options.
    """
    fixed = found.keywords if isinstance(found, functools.partial) else {}
    open_ones = {option: own for option, own in _parameters(found, name).items() if option not in fixed}
    types = _types(found, name)
    values: dict[str, Any] = {}
    for option, value in given.items():
        if option in fixed:
            raise DeclarationError(f"option {option!r} of {name!r} is fixed to {fixed[option]!r}", hint="omit it")
        if option not in open_ones:
            raise unknown(option, name, open_ones)
        values[option] = _read(option, name, types[option], value)
    for option, own in open_ones.items():
        if own.default is own.empty and option not in values:
            raise DeclarationError(f"option {option!r} of {name!r} is missing, and has no default", hint="give it")
    kept = {option: _written(v) for option, v in values.items() if not _same(v, open_ones[option].default)}
    return found(**values), kept


def unknown(option: str, name: str, known: Mapping[str, object]) -> UnknownName:
    """The error for an option that recipe `name` does not have."""
    has = f"known: {', '.join(sorted(known))}" if known else "it takes no options"
    return UnknownName(f"{name!r} has no option {option!r}; {has}", hint=did_you_mean(option, known))


def _function(found: object) -> object:
    inner = found.func if isinstance(found, functools.partial) else found
    return inspect.unwrap(inner) if callable(inner) else inner


def _parameters(found: Callable[..., object], name: str) -> dict[str, inspect.Parameter]:
    parameters = dict(inspect.signature(found).parameters)
    for own in parameters.values():
        if own.kind not in (own.KEYWORD_ONLY, own.POSITIONAL_OR_KEYWORD):
            raise DeclarationError(f"keywords as options of {name!r}", f"a function that takes {own}")
    return parameters


def _types(found: Callable[..., Any], name: str) -> dict[str, Any]:
    """Option → its type: str, int, float, bool, or the tuple of a Literal's values."""
    try:
        hints = typing.get_type_hints(_function(found))
    except Exception as error:
        raise DeclarationError(
            f"the annotations of {name!r} cannot be read: {type(error).__name__}: {error}"
        ) from error
    out: dict[str, Any] = {}
    for option in inspect.signature(found).parameters:
        hint = hints.get(option)
        literal = typing.get_args(hint) if typing.get_origin(hint) is Literal else ()
        if hint not in (str, int, float, bool) and not literal:
            said = "none" if hint is None else getattr(hint, "__name__", str(hint))
            raise DeclarationError(
                f"str, int, float, bool or a Literal as the annotation of option {option!r} of {name!r}",
                said,
                "name a Recipe, a declared case, or a function that makes one",
            )
        out[option] = literal or hint
    return out


def _read(option: str, name: str, kind: Any, value: str) -> Any:
    if isinstance(kind, tuple):
        choices = {_written(choice): choice for choice in kind}
    else:
        choices = _SWITCH if kind is bool else {}
    if choices:
        if value in choices:
            return choices[value]
        expected = f"one of {', '.join(choices)} as option {option!r} of {name!r}"
        raise DeclarationError(expected, repr(value), did_you_mean(value, choices))
    if kind is str:
        return value
    try:
        read = kind(value)
    except ValueError:
        read = math.nan
    if read != read or read in (math.inf, -math.inf):  # not math.isfinite, which raises OverflowError for a large int
        words = "a whole number" if kind is int else "a number"
        raise DeclarationError(f"{words} as option {option!r} of {name!r}", repr(value))
    return read


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _same(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other
