"""What all commands share: `-v` and `-q`, `--json`, examples in `--help`, and how a failure is printed."""

from __future__ import annotations

import functools
import inspect
import logging
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ParamSpec

import typer

from aot_cache.cli.render import terminal

P = ParamSpec("P")
Json = Any
LOG = logging.getLogger("aot_cache")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead; an error is a part of it.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, show_default=False, help="Log to stderr; -vv: an error's traceback, too."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress on stderr, only errors.")]


class Unfinished(Exception):
    """A command was stopped by its `__cause__` after part of its work: `document` is what `--json` prints of that."""

    def __init__(self, document: Mapping[str, Json]) -> None:
        super().__init__("unfinished")
        self.document = document


# --- what a command takes ---------------------------------------------------------------------------------------------


def prepared(function: Callable[P, None], examples: Sequence[str]) -> tuple[Callable[..., None], str]:
    """`function` with -v and -q, and the end of its help, for typer's `command`."""
    hints = typing.get_type_hints(function, include_extras=True)
    hints |= {"verbose": Verbose, "quiet": Quiet}
    given = [p.replace(annotation=hints[name]) for name, p in inspect.signature(function).parameters.items()]
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
        for name, default in (("verbose", 0), ("quiet", False))
    ]

    @functools.wraps(function)
    def run(*args: P.args, **options: P.kwargs) -> None:
        listen(verbose=int(str(options.pop("verbose"))), quiet=bool(options.pop("quiet")))
        function(*args, **options)

    run.__signature__ = inspect.Signature([*given, *more])  # type: ignore[attr-defined]
    run.__annotations__ = hints
    return run, "\n".join(["\b", "Examples:", *(f"  {example}" for example in examples)])


# --- -v and -q --------------------------------------------------------------------------------------------------------


@contextmanager
def own_log() -> Iterator[None]:
    """What `listen` does ends with the command: `main` may be called in a process that logs in its own way."""
    level, quiet = LOG.level, terminal.Progress.quiet
    before = list(LOG.handlers)
    try:
        yield
    finally:
        terminal.Progress.quiet = quiet
        LOG.setLevel(level)
        for handler in [handler for handler in LOG.handlers if handler not in before]:
            LOG.removeHandler(handler)


class _OnStderr(logging.StreamHandler):  # type: ignore[type-arg]  # generic to type checkers only, before 3.11
    """What -v adds to the logger."""


def listen(verbose: int, quiet: bool) -> None:
    """Do as -v and -q say, which stand before or after the command, or in both places."""
    terminal.Progress.quiet |= quiet
    if verbose and not any(isinstance(handler, _OnStderr) for handler in LOG.handlers):
        handler = _OnStderr(sys.stderr)
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        LOG.addHandler(handler)
        LOG.setLevel(logging.INFO)
        verbose -= 1
    if verbose:
        LOG.setLevel(logging.DEBUG)


# --- failures ---------------------------------------------------------------------------------------------------------


def called(words: Sequence[str]) -> str:
    """The command that a command line names."""
    return next((word for word in words if not word.startswith("-")), "")


def wants_json(words: Sequence[str]) -> bool:
    """Whether --json is among the words of a command line, which need not be a valid one."""
    return "--json" in words and called(words) != "record"  # the program that it runs may have a --json of its own


def failed(facts: Mapping[str, Json], document: Mapping[str, Json] | None) -> int:
    """Print an error: two lines on stderr and, where there is a `document`, it and the error as JSON on stdout."""
    if document is not None:
        terminal.document({**document, "error": facts})
    sys.stdout.flush()
    for label, name in (("error", "message"), ("hint", "hint")):
        if facts[name]:
            print(f"{label}: {terminal.clean(facts[name])}", file=sys.stderr)
    return int(facts["exit_code"])


def failure(kind: str, message: str, hint: str, exit_code: int) -> dict[str, Json]:
    """What is said of an error that is none of aot-cache's own."""
    return {"type": kind, "message": message, "expected": "", "found": "", "hint": hint, "exit_code": exit_code}
