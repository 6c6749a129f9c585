"""Runs one point of a case, and turns an error into a `FailedCase` with the location in the user's own code.

Nothing that a recipe's code raises at a point ends a build: the case is left out, and listed. Errors of the declaration itself
(no cases, unknown dimensions, a module that cannot be imported) are raised before any point is run.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import util

from aot_cache.artifact.plan import FailedCase
from aot_cache.errors import AotCacheError, DeclarationError, TraceError, first_cause, one_line
from aot_cache.recipes import shipped
from aot_cache.recipes.declare import Case
from aot_cache.recipes.dimensions import Point, point_text
from aot_cache.upstream.codec import torch_ranks, triton_sources
from aot_cache.upstream.virtual import process_settings

sets: dict[str, set[str]] = {}
"""Case → process-wide settings that it changed while it made arguments. A server that does not set them misses."""

Within = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass(frozen=True)
class Broken:
    """A case that cannot be run.

    Args:
        failed: its entry in a plan and a bundle.
        error: what the build raises if no case can be run.
    """

    failed: FailedCase
    error: AotCacheError


def run(
    case: Case,
    point: Point,
    within: Within = contextlib.nullcontext,
    needs_values: tuple[type[Exception], ...] = (),
) -> Broken | None:
    """Run a point, then restore the process-wide settings that it changed. Returns the failure, or None.

    Args:
        within: the modes in which it is run.
        needs_values: exceptions that mean that host code reads values of a tensor that has none.
    """
    try:
        with within(), process_settings.kept() as settings:
            call = case.call(point)
            sets.setdefault(case.name, set()).update(settings.changed().names)
            call()
    except (Exception, SystemExit) as error:  # `sys.exit()` in a model must not end the build
        return broken(case, point, error, needs_values)
    return None


def broken(case: Case, point: Point, error: BaseException, needs_values: tuple[type[Exception], ...] = ()) -> Broken:
    """The failure of a case that raised `error` at `point`."""
    where, (file, line) = f"{point_text(point)}{_as_rank()}", place_of(error) or _place_of_code(case)
    place = f"{file}:{line}"  # the full path, for the error; a bundle has a path that is independent of the machine
    at = f"case {case.name!r} at {where}"
    error = triton_sources.unreadable(error) or error
    told: AotCacheError
    if isinstance(error, TraceError):
        told = type(error)(f"{at}: {error.message}", hint=shipped.what_to_do(case.make, error.hint))
        why = str(error)
    elif isinstance(error, AotCacheError):
        rank = _as_rank().removeprefix(", ")
        told, why = error.within(rank) if rank else error, str(error)
    elif isinstance(error, needs_values):
        why = f"reads the values of a tensor ({error})"
        hint = shipped.what_to_do(case.make, "pass the number as an argument")
        told = TraceError(f"{at}: {place} {why}", hint=hint)
    else:
        lines = str(error).splitlines() or [""]
        why = f"{type(error).__name__}: {lines[0]}"
        if isinstance(error, ImportError) and error.__cause__ is not None:
            why += f", from {one_line(first_cause(error))}"
        told = DeclarationError(f"{at}: its code raised {why} ({place})", hint=shipped.what_to_do(case.make))
    return Broken(
        FailedCase(case=case.name, point=point, place=f"{short(file)}:{line}", why=why, rank=_as_rank()), told
    )


def died(case: str, point: Point, why: str) -> Broken:
    """The failure of a case that ended its process."""
    return known(FailedCase(case=case, point=point, place="", why=why, rank=_as_rank()))


def known(failed: FailedCase) -> Broken:
    """The failure of a case of which only `failed` is known."""
    return Broken(failed, TraceError(f"case {failed.case!r} cannot run at {failed.where}{failed.rank}: {failed.why}"))


def _as_rank() -> str:
    """`, as rank N` if this process is one of several ranks, because other ranks may be able to run the case; else empty."""
    return f", as rank {torch_ranks.own_rank()}" if torch_ranks.up() else ""


def all_of(broken: Iterable[Broken]) -> AotCacheError:
    """The error of a recipe whose cases all failed: the first case's, with the others listed in its message."""
    first, *others = broken
    if not others:
        return first.error
    more = "; ".join(f"{one.failed.name} {one.failed.text}" for one in others)
    return type(first.error)(f"{first.error.message}; {more}", hint=first.error.hint)


# --- where in the user's code -----------------------------------------------------------------------------------------


def place_of(error: BaseException) -> tuple[str, int] | None:
    """(file, line) of the last frame in the user's own code, or None."""
    frames = [(f.filename, f.lineno or 0) for f in traceback.extract_tb(error.__traceback__)]
    frames += [(f.filename, f.lineno or 0) for f in getattr(error, "real_stack", None) or ()]  # where Dynamo was
    return next((frame for frame in reversed(frames) if _is_of_user(frame[0])), None)


def _place_of_code(case: Case) -> tuple[str, int]:
    """(file, line) of the case's declaration."""
    code = getattr(inspect.unwrap(case.make), "__code__", None)
    return ("", 0) if code is None else (code.co_filename, code.co_firstlineno)


def _is_of_user(file: str) -> bool:
    if file.startswith("<"):
        return False
    real = os.path.realpath(file)
    if real.startswith(_folders("purelib", "platlib")):
        return not real.startswith(_machinery())
    return not real.startswith((*_folders("stdlib"), *_machinery()))


@cache
def _folders(*names: str) -> tuple[str, ...]:
    return tuple(os.path.realpath(sysconfig.get_paths()[name]) + os.sep for name in names)


@cache
def _machinery() -> tuple[str, ...]:
    """Folders whose code is never the user's: those of torch, Triton and NumPy, and ours except for the models and engines."""
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    ours = [os.path.join(package, entry) for entry in os.listdir(package) if entry not in ("models", "engines")]
    return (*ours, *filter(None, map(_folder, ("torch", "triton", "numpy"))))


def _folder(package: str) -> str:
    """A package's folder, found without importing it; empty if it is not installed."""
    spec = util.find_spec(package)
    return os.path.dirname(os.path.realpath(spec.origin)) + os.sep if spec is not None and spec.origin else ""


def short(file: str) -> str:
    """A path relative to its entry in `sys.path`, so that a bundle does not depend on the machine that built it."""
    folders = sorted({os.path.realpath(path) for path in sys.path}, key=len, reverse=True)
    real = os.path.realpath(file)
    return next((os.path.relpath(real, at) for at in folders if real.startswith(at.rstrip(os.sep) + os.sep)), file)
