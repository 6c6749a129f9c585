"""`aot-cache build --plan-matrix FILE` and `--on`: which bundles to build, and what is said of all of them.

A matrix is builds × targets × versions. The keys of a build are the long options of `aot-cache build`:

    {
     "builds": [
      {"model": "qwen3.5-4b", "spec": "mtp", "max-batch": 64},
      {"model": "my_package.recipes:decode", "range": ["batch=1..64"], "target": "cpu"},
      {"engine": "vllm", "arguments": ["MODEL", "--max-num-seqs", "64"]}
     ],
     "targets": ["h200", "b200"],
     "versions": {"torch-2.13": "/opt/torch-2.13/bin/python"}
    }
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import typer

from aot_cache.artifact import target as targets_table
from aot_cache.builder import matrix, on_ray
from aot_cache.builder.matrix import Outcome, Unit
from aot_cache.cli.command import Unfinished
from aot_cache.cli.facts import matrix as matrix_facts
from aot_cache.cli.render import build as render_build
from aot_cache.cli.render import terminal
from aot_cache.errors import AotCacheError, CompileFailed, DeclarationError, UnknownName, did_you_mean

Json = Any
ARGUMENTS = "arguments"
"""The key for what follows `--` on a command line: the engine's own."""
_WHAT = ("model", "plan", "engine", ARGUMENTS)
_OF_ALL = {"plan_matrix", "on", "store", "remote_store", "workers", "show_plan", "as_json", "verbose", "quiet", "help"}
"""Parameters of the command that hold for the whole matrix."""
_FORM = 'write {"builds": [{"model": "NAME"}], "targets": ["h200"]}'


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Each build (key → value) for each of its targets, else for `targets`, in each version (name → interpreter)."""

    builds: Sequence[Mapping[str, Json]]
    targets: Sequence[str] = ()
    versions: Mapping[str, str] = field(default_factory=dict)


# --- what is asked for ------------------------------------------------------------------------------------------------


def of_command_line(context: typer.Context) -> Matrix:
    """The matrix of the one build that the command line asks for, for all its targets."""
    return Matrix(builds=[_given(context)])


def of_file(path: Path, context: typer.Context) -> Matrix:
    """The matrix in a file.

    Raises:
        DeclarationError: it cannot be read, or has another form; or the command line has options of a single build, too.
        UnknownName: it has a key that nothing knows.
    """
    if more := _given(context):
        raise DeclarationError(
            "no options of one build beside --plan-matrix", ", ".join(more), f"write them into {path}"
        )
    try:
        return _matrix(json.loads(path.read_text()))
    except OSError as error:
        raise DeclarationError(f"cannot read matrix {path}: {error.strerror}", hint="correct the path") from error
    except ValueError as error:
        raise DeclarationError(f"matrix {path} is not JSON: {error}", hint=_FORM) from error
    except AotCacheError as error:
        raise error.within(f"matrix {path}") from error


def _matrix(found: Json) -> Matrix:
    if not isinstance(found, dict) or not _is_list(found.get("builds"), dict) or not found["builds"]:
        raise DeclarationError("there is no list of builds", hint=_FORM)
    _known(found, ("builds", "targets", "versions"))
    targets, versions = found.get("targets", []), found.get("versions", {})
    if not _is_list(targets, str):
        raise DeclarationError("a list of names as targets", json.dumps(targets), _FORM)
    if not isinstance(versions, dict) or not _is_list([*versions.values()], str) or not all(map(_is_name, versions)):
        hint = 'write "versions": {"torch-2.13": "/opt/torch-2.13/bin/python"}'
        raise DeclarationError("names with a Python each as versions", json.dumps(versions), hint)
    return Matrix(builds=found["builds"], targets=targets, versions=versions)


def _known(found: Mapping[str, Json], keys: Sequence[str]) -> None:
    for key in found:
        if key not in keys:
            raise UnknownName(f"unknown key {key!r}; known: {', '.join(keys)}", hint=did_you_mean(key, keys))


def _is_list(value: Json, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(one, kind) for one in value)


def _is_name(text: str) -> bool:
    """Whether it can be the name of a folder in the store."""
    return bool(text) and text == Path(text).name and text not in (".", "..")


# --- the command's options --------------------------------------------------------------------------------------------


def _options(context: typer.Context) -> dict[str, Any]:
    """Key of a build → the parameter of the command."""
    named = {p.opts[0].lstrip("-"): p for p in context.command.params if p.name not in _OF_ALL}
    return {ARGUMENTS if key == "engine_arguments" else key: p for key, p in named.items()}


def _given(context: typer.Context) -> dict[str, Json]:
    """The build on the command line, in the form of one in a file."""
    found: dict[str, Json] = {}
    for key, parameter in _options(context).items():
        source = context.get_parameter_source(parameter.name)
        value = context.params.get(parameter.name)
        if source is not None and source.name == "COMMANDLINE" and value is not None:
            many = isinstance(value, (list, tuple))
            found[key] = [str(one) for one in value] if many else str(value) if isinstance(value, Path) else value
    return found


def _words(key: str, value: Json, option: Any) -> list[str]:
    """A key of a build with its value as words of a command line.

    Raises:
        DeclarationError: the option cannot have such a value.
    """
    name = option.opts[0]
    if option.is_flag and isinstance(value, bool):
        return [name] if value else list(option.secondary_opts[:1])
    values = value if isinstance(value, list) and option.multiple else [value]
    if option.is_flag or not all(isinstance(one, (str, int, float)) and not isinstance(one, bool) for one in values):
        what = "true or false" if option.is_flag else "a list of texts" if option.multiple else "a text or a number"
        raise DeclarationError(f"{what} as {key!r}", json.dumps(value), "see `aot-cache build --help`")
    return [f"{name}={one}" for one in values]


# --- units ------------------------------------------------------------------------------------------------------------


def units(asked: Matrix, context: typer.Context, more: Sequence[str], store: Path) -> list[Unit]:
    """The builds of a matrix, in its order.

    Args:
        more: arguments of all builds.

    Raises:
        DeclarationError, UnknownName: a build has a key, value or target that there is not, or is there twice.
    """
    options = _options(context)
    out: dict[str, Unit] = {}
    for number, build in enumerate(asked.builds, 1):
        try:
            for unit in _units_of(build, asked, options, more, store.absolute()):
                if unit.label in out:
                    raise DeclarationError(f"{unit.label} is there twice", hint="remove one of them")
                out[unit.label] = unit
        except AotCacheError as error:
            raise error.within(f"build {number}") from error
    return list(out.values())


def _units_of(
    build: Mapping[str, Json], asked: Matrix, options: Mapping[str, Any], more: Sequence[str], store: Path
) -> list[Unit]:
    _known(build, [*options])
    own, engine = build.get("target") or [*asked.targets] or [""], build.get(ARGUMENTS, [])
    targets = [own] if isinstance(own, str) else own
    for key, value in (("target", targets), (ARGUMENTS, engine)):
        if not _is_list(value, str):
            raise DeclarationError(f"a list of texts as {key!r}", json.dumps(value), "see `aot-cache build --help`")
    for target in targets:
        if target not in ("", "native"):
            targets_table.get(target)
    rest = {key: value for key, value in build.items() if key not in ("target", ARGUMENTS)}
    words = [word for key, value in rest.items() for word in _words(key, value, options[key])]
    versions = asked.versions or {"": ""}
    if "out" in build and len(targets) * len(versions) > 1:
        raise DeclarationError("one target and one version with out", f"{len(targets) * len(versions)}", "omit out")
    return [
        Unit(
            name=_name(build),
            target=target,
            version=version,
            python=python,
            arguments=(
                *more,
                f"--store={store / version}",  # no object fits two versions, and a bundle's name does not tell them apart
                *([f"--target={target}"] if target else []),
                *words,
                *(["--", *engine] if engine else []),
            ),
        )
        for version, python in versions.items()
        for target in targets
    ]


def _name(build: Mapping[str, Json]) -> str:
    """What is built, and then its options."""
    texts = {key: " ".join(map(str, value)) if isinstance(value, list) else str(value) for key, value in build.items()}
    what = [texts[key] for key in _WHAT if key in texts]
    return " ".join([*what, *(f"{key}={text}" for key, text in texts.items() if key not in (*_WHAT, "target"))])


# --- the command ------------------------------------------------------------------------------------------------------


def build_matrix(
    context: typer.Context,
    file: Path | None,
    on: str | None,
    store: Path,
    remote_store: str | None,
    workers: int | None,
    show_plan: bool,
    as_json: bool,
) -> None:
    """Build everything in a matrix, and print a row for each bundle.

    Raises:
        DeclarationError, UnknownName: something is wrong with the request; nothing was built.
        CompileFailed: a bundle could not be built, or is incomplete. The others are there.
    """
    asked = of_file(file, context) if file is not None else of_command_line(context)
    if on is not None:
        on_ray.check(on)
        workers = workers or 1
    more = [f"--workers={workers}"] if workers is not None else []
    more += ["--show-plan"] if show_plan else []
    more += (
        [f"--remote-store={remote_store}"] if remote_store else []
    )  # also from the environment: Ray's workers have their own
    todo = units(asked, context, more, store)
    outcomes: dict[str, Outcome] = {}
    stopped: AotCacheError | KeyboardInterrupt | None = None
    with terminal.Progress() as progress:

        def done(outcome: Outcome) -> None:
            outcomes[outcome.unit.label] = outcome
            progress("bundles", len(outcomes), len(todo))

        progress("bundles", 0, len(todo))
        try:
            if on is not None:
                on_ray.run(todo, on, workers or 1, Path.cwd(), done)
            else:
                matrix.run_here(todo, Path.cwd(), dict(os.environ), done)
        except (AotCacheError, KeyboardInterrupt) as error:
            stopped = error  # what was built before is there, and is printed
    rows = matrix_facts.rows(outcomes[unit.label] for unit in todo if unit.label in outcomes)
    stopped = stopped or _failure(rows)
    document = {"on": on, "units": len(todo), "rows": rows}
    if as_json and stopped is not None:
        raise Unfinished(document) from stopped
    if as_json:
        terminal.document(document)
    else:
        render_build.matrix(rows, show_plan)
        sys.stdout.flush()
    if stopped is not None:
        raise stopped


def _failure(rows: Sequence[Mapping[str, Json]]) -> CompileFailed | None:
    bad = [f"{row['label']} ({row['state']})" for row in rows if row["state"] not in matrix_facts.GOOD]
    if not bad:
        return None
    what = f"{len(bad)} of {len(rows)} builds failed or are incomplete: {', '.join(bad)}"
    return CompileFailed(what, hint="fix what is said above and build again: the rest is kept")
