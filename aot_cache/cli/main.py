"""The command line: parse, call, print. Nothing is decided here that a library user could want.

Exit codes: 0 all is well · 1 the plans of `diff` differ · 2 not understood · 3 and above as `errors` says, such as 4 something
did not compile and 5 a rehearsal did not pass; `verify` adds up 8 corrupt, 16 not for this host and 32 incomplete · 128 and the
signal's number (130 for Ctrl-C, 143 for SIGTERM) interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from aot_cache.artifact import rehearsed
from aot_cache.artifact import target as targets_table
from aot_cache.artifact.key import Part
from aot_cache.artifact.manifest import served
from aot_cache.artifact.specialization import parameter_names
from aot_cache.cli.build import AsJson, build
from aot_cache.cli.facts import build as build_facts
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.facts import diff as diff_facts
from aot_cache.cli.facts import files as file_facts
from aot_cache.cli.facts import misses as miss_facts
from aot_cache.cli.rehearse import rehearse
from aot_cache.cli.render import bundle as render_bundle
from aot_cache.cli.render import html as html_page
from aot_cache.cli.render import terminal
from aot_cache.errors import AotCacheError, BundleCorrupt, DeclarationError
from aot_cache.misses import file as miss_file
from aot_cache.process_group import interruptible
from aot_cache.recipes import declare as declaring
from aot_cache.runtime import host_gpu
from aot_cache.store import Bundle, read_bundle, write_atomic

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle file.")]
PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, or a bundle.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; one line on stderr for anything that is the caller's to mend."""
    came: list[int] = []
    try:
        with interruptible() as came:
            code = app(
                args=None if arguments is None else list(arguments), prog_name="aot-cache", standalone_mode=False
            )
            sys.stdout.flush()
            if not came:  # else typer has caught it
                return code if isinstance(code, int) else 0
    except BundleCorrupt as error:
        return _complain(f"corrupt: {error}", error.exit_code)
    except AotCacheError as error:
        return _complain(error, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        pass  # said below
    except Exception as error:
        # The class of usage errors is click's or typer's own copy of it, by typer's version; both have these two.
        if not hasattr(error, "format_message"):
            raise
        return _complain(error.format_message(), getattr(error, "exit_code", 2))
    building = (sys.argv[1:] if arguments is None else list(arguments))[:1] == ["build"]
    do = "; run again to continue with what is done" if building else ""
    return _complain(f"interrupted{do}", 128 + (came[0] if came else signal.SIGINT))


def _complain(what: object, code: int) -> int:
    sys.stdout.flush()
    print(f"aot-cache: {terminal.clean(what)}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _top(context: typer.Context) -> None:
    """Compile Triton kernels ahead of time, on a machine without the GPU, and load them where there is one."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(build)
app.command()(rehearse)


# --- looking ----------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    path: Annotated[Path | None, typer.Argument(metavar="PLAN", help="A plan file, or a bundle.")] = None,
    kernel: Annotated[
        str | None, typer.Option(metavar="SUBSTRING", help="List the specializations of these kernels.")
    ] = None,
    points: Annotated[bool, typer.Option("--points", help="List every specialization with its points.")] = False,
    misses: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What servers missed, instead. Repeatable.")
    ] = None,
    ledger: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="The JSON of aot_cache.stats(), or a misses file: shown in the grid. Repeatable."
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write one page with all of it instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """What is in a bundle or a plan, and which sizes it serves; or what servers missed."""
    if (path is None) == (not misses) or (misses and (kernel or points or ledger or html)):
        found = "both" if path is not None else "neither" if not misses else "--kernel, --points, --ledger or --html"
        raise DeclarationError("a plan or a bundle, or --misses FILE alone", found, "name one of them")
    if path is None:
        facts = miss_facts.misses(miss_file.read(misses or []), misses or [])
        terminal.document(facts) if as_json else terminal.misses(facts)
        return
    facts = file_facts.facts(path, kernel, points or html is not None, ledger or [])
    if html is not None:
        write_atomic(html, html_page.page(facts).encode())
        if not as_json:
            terminal.line(f"page: {html.absolute()}")
            return
    terminal.document(facts) if as_json else render_bundle.plan_or_bundle(facts)


@app.command()
def verify(
    path: BundlePath,
    digest: Annotated[str | None, typer.Option(metavar="SHA256", help="The digest that it must have.")] = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle: the exit code adds up 8 corrupt, 16 not for this host, 32 incomplete."""
    facts: dict[str, Any] = {"path": str(path), "digest": None}
    try:
        bundle = read_bundle(path)
        facts["digest"] = bundle.digest
        facts |= rehearsed.read(path, bundle.digest).facts()
        facts["findings"] = bundle_facts.findings(bundle, digest, _host_parts(bundle))
    except BundleCorrupt as error:
        facts["findings"] = [bundle_facts.finding(BundleCorrupt, str(error))]
    code = 0
    for found in facts["findings"]:
        code |= found["code"]
    facts["exit_code"] = code
    terminal.document(facts) if as_json else terminal.findings(facts)
    raise typer.Exit(code)


def _host_parts(bundle: Bundle) -> list[Part]:
    from aot_cache.runtime.host_check import graph_parts, parts

    with bundle_facts.form_of(bundle):
        found = parts(served(bundle), look_at_gpu=host_gpu.gpu_here())
        of_graphs = graph_parts(served(bundle))
    return found + [replace(part, name=f"graphs: {part.name}") for part in of_graphs]


@app.command()
def explain(path: BundlePath, as_json: AsJson = False) -> None:
    """This host beside what a bundle was built for, part by part."""
    bundle = read_bundle(path)
    facts = bundle_facts.explain(bundle, _host_parts(bundle))
    terminal.document(facts) if as_json else terminal.explanation(facts)


@app.command()
def diff(left: PlanPath, right: PlanPath, as_json: AsJson = False) -> None:
    """What each of two plans (or bundles) has and the other has not: kernels and graphs; exit 1 when there is anything."""
    facts = diff_facts.diff(file_facts.side(left), file_facts.side(right), parameter_names)
    terminal.document(facts) if as_json else terminal.difference(facts)
    raise typer.Exit(0 if facts["same"] else 1)


@app.command()
def targets(as_json: AsJson = False) -> None:
    """The GPU kinds that can be built for, and where their numbers come from."""
    rows = build_facts.targets(targets_table.TARGETS.values())
    terminal.document({"targets": rows}) if as_json else terminal.targets(rows)


@app.command()
def models(as_json: AsJson = False) -> None:
    """The recipes that are installed here."""
    found = dict(sorted(declaring.names().items()))
    if as_json:
        terminal.document({"models": found})
    elif found:
        terminal.pairs(found, ("model", "recipe"))
    else:
        terminal.line("no recipe is installed here; build one with --model module:object")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@app.command(context_settings={"allow_interspersed_args": False})
def record(
    out: Annotated[Path, typer.Option(metavar="PLAN", help="The plan to write.")],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The program to run.")],
    recipe_name: Annotated[str | None, typer.Option(metavar="NAME", help="Default: the plan file's name.")] = None,
) -> None:
    """Run a program and write down what it launches; exits as the program does."""
    from aot_cache.runtime.record import run_command

    name = recipe_name or out.name.removesuffix(".json").removesuffix(".plan")
    code, plan = run_command(command, out, name)
    # On stderr, because stdout is the program's.
    kernels = len({unit.kernel for unit in plan.units})
    what = f"{len(plan.units)} specializations of {kernels} kernels, {len(plan.tunings)} choices"
    print(f"aot-cache: recorded {what} for {terminal.clean(plan.target)} in {out}", file=sys.stderr)
    raise typer.Exit(code if code >= 0 else 128 - code)


@app.command()
def tune(
    path: BundlePath,
    out: Annotated[Path, typer.Option(metavar="FILE", help="The bundle with the choices made.")],
    prune: Annotated[bool, typer.Option("--prune", help="Leave out the configs that were not chosen.")] = False,
    points: Annotated[int, typer.Option(min=1, help="Points that are measured for each choice.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure a bundle's configs on this machine's GPU and write the choices."""
    from aot_cache.tuning.kernels import tune as run_tune

    with terminal.Progress() as progress:
        facts = run_tune(path, out, prune=prune, points=points, progress=progress)
    terminal.document(facts) if as_json else terminal.pairs(facts, ("tuned", ""))
