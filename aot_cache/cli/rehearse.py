"""`aot-cache rehearse`, and the rehearsal with which a build for this machine's CPU ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from aot_cache import rehearsal as rehearsals
from aot_cache.artifact import rehearsed
from aot_cache.artifact.rehearsed import Stamp
from aot_cache.cli.command import AsJson, Unfinished
from aot_cache.cli.render import rehearsal as render_rehearsal
from aot_cache.cli.render import terminal
from aot_cache.errors import AotCacheError, DeclarationError, RehearsalFailed
from aot_cache.recipes import options
from aot_cache.rehearsal import Rehearsal
from aot_cache.runtime import bundle_lookup
from aot_cache.store import signature

if TYPE_CHECKING:
    from aot_cache.builder.pipeline import Built

AFTER_BUILD = 16
"""Points of each case that a build rehearses."""


def rehearse(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle file.")],
    points: Annotated[
        int, typer.Option(min=1, metavar="N", help="At most N points of each case, spread over its ranges.")
    ] = rehearsals.POINTS,
    everything: Annotated[bool, typer.Option("--all", help="Run all declared points.")] = False,
    case: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Run only this case. Repeatable.")] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, metavar="X", help="Largest distance from eager's results. Default: by dtype."),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0, metavar="SECONDS", help="Time limit of a point. Default: none.")
    ] = None,
    digest: Annotated[str | None, typer.Option(metavar="SHA256", help="Refuse a bundle with another digest.")] = None,
    compiler: Annotated[
        bool, typer.Option("--with-compiler", help="Keep a C compiler on PATH, for recipes whose own code needs one.")
    ] = False,
    stamp: Annotated[bool, typer.Option("--stamp", help="Write the result beside the bundle.")] = False,
    as_json: AsJson = False,
) -> None:
    """Run a bundle's declared points as a server does, in a fresh process that has only the bundle.

    On a GPU the first call of each point is inside a CUDA graph capture. Exits with 0 when all points hit and are close to
    eager, else with 5.
    """
    if everything and points != rehearsals.POINTS:
        raise DeclarationError("either --points or --all", "both", "omit one of them")
    digest = bundle_lookup.read(path, digest, signature.trusted_keys()).digest  # the process that runs it knows no keys
    with terminal.Progress() as progress:
        found = rehearsals.rehearse(
            path,
            digest=digest,
            points=None if everything else points,
            cases=case or (),
            tolerance=tolerance,
            timeout=timeout,
            compiler=compiler,
            progress=progress,
        )
    if stamp:
        stamped(found)
    shown = facts(found)
    if as_json and not found.passed:
        raise Unfinished(shown) from failure(found)
    terminal.document(shown) if as_json else render_rehearsal.rehearsal(shown)
    if not found.passed:
        raise failure(found)


def facts(found: Rehearsal) -> dict[str, Any]:
    """What is shown of a rehearsal."""
    return {**found.to_json(), "verdict": found.run().text() if found.passed else f"not proved: {_hits(found)}"}


def stamped(found: Rehearsal) -> Stamp:
    """Write down what passed; what did not takes away what was written of this device before."""
    if found.passed:
        return rehearsed.add(found.path, found.run())
    return rehearsed.remove(found.path, found.digest, found.device)


def failure(found: Rehearsal) -> RehearsalFailed:
    """The error with which a rehearsal ends that did not pass."""
    expected = f"all {found.chosen} chosen points of {found.path} to hit and be close to eager"
    return RehearsalFailed(expected, found.died or _hits(found), "see the results of each point above")


def _hits(found: Rehearsal) -> str:
    return f"{found.hits} of {found.chosen} points hit"


# --- after a build ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class After:
    """What became of the rehearsal with which a build ends.

    Args:
        stamp: what is written beside the bundle.
        found: the rehearsal; None where an earlier one stands for it, or it could not run.
        error: what keeps the build from being good.
    """

    stamp: Stamp
    found: Rehearsal | None = None
    error: AotCacheError | None = None

    def facts(self) -> dict[str, Any] | None:
        """What is shown of it; None where there is nothing to say beside the stamp."""
        if self.found is not None:
            return facts(self.found)
        if self.error is None:
            return None
        reasons = {"not_ready": "", "cases": [], "reasons": [str(self.error)]}
        return {"passed": False, "verdict": "not proved: the rehearsal could not run", **reasons}


def after_build(built: Built, model: str | None, progress: rehearsals.Progress) -> After:
    """Rehearse a whole bundle of `model` for the CPU, unless that was done before and nothing has changed since."""
    path, digest = built.path, built.digest
    if not digest:
        return After(rehearsed.NO_STAMP)
    stamp = rehearsed.read(path, digest)
    before = stamp.of("cpu")
    same = built.nothing_to_do and before is not None and dict(before.versions) == rehearsals.versions()
    if same or built.target != "cpu" or built.failed or not built.graphs:
        return After(stamp)
    try:
        config = options.parse(model or "")[1].get(options.CONFIG)
        found = rehearsals.rehearse(path, digest=digest, points=AFTER_BUILD, config=config, progress=progress)
    except AotCacheError as error:
        return After(rehearsed.remove(path, digest, "cpu"), error=error)
    return After(stamped(found), found, None if found.passed else failure(found))
