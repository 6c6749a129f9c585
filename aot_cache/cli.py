"""The command line: parse, call, print. Nothing is decided here that a library user could want.

Exit codes: 0 all is well · 1 the plans of `diff` differ · 2 not understood · 3 and above as `errors` says, where
`verify` adds up 8 corrupt, 16 not for this host and 32 incomplete · 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from aot_cache import (
    miss_file,
    page,
    recipe,
    render,
    render_bundle,
    report,
    report_builds,
    report_files,
    report_misses,
    shapes,
)
from aot_cache import native as native_gpu
from aot_cache import target as targets_table
from aot_cache.build import pipeline
from aot_cache.build.pipeline import Built, Request
from aot_cache.errors import AotCacheError, BundleCorrupt, CompileFailed, DeclarationError, TargetError
from aot_cache.key import Part
from aot_cache.plan import Plan
from aot_cache.signature import parameter_names
from aot_cache.store import Bundle, read_bundle, write_atomic
from aot_cache.target import Target

DEFAULT_TARGET = "h200"
HOW_TO_CHOOSE = "choose with --target, `aot-cache targets` lists them"

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle file.")]
PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, or a bundle.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; one line on stderr for anything that is the caller's to mend."""
    try:
        code = app(args=None if arguments is None else list(arguments), prog_name="aot-cache", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except AotCacheError as error:
        return _complain(error, error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception as error:
        # The class of usage errors is click's or typer's own copy of it, by typer's version; both have these two.
        if not hasattr(error, "format_message"):
            raise
        return _complain(error.format_message(), getattr(error, "exit_code", 2))


def _complain(what: object, code: int) -> int:
    sys.stdout.flush()
    print(f"aot-cache: {render.clean(what)}", file=sys.stderr)
    return code


@app.callback(invoke_without_command=True)
def _top(context: typer.Context) -> None:
    """Compile Triton kernels ahead of time, on a machine without the GPU, and load them where there is one."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


# --- build ------------------------------------------------------------------------------------------------------------


@app.command()
def build(
    model: Annotated[str | None, typer.Option(metavar="NAME|MODULE:OBJECT", help="The recipe to build.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="A plan to build instead of a recipe.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(metavar="T", help="A GPU kind, or `native`. May be repeated.")
    ] = None,
    ranges: Annotated[
        list[str] | None, typer.Option("--range", metavar="DIM=1..64", help="In place of a declared range. Repeatable.")
    ] = None,
    misses: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What servers missed: built as well. Repeatable.")
    ] = None,
    store: Annotated[Path, typer.Option(metavar="DIR", help="Where everything is kept.")] = Path("artifacts"),
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="The bundle, with one target.")] = None,
    line_info: Annotated[bool, typer.Option("--line-info", help="Keep line numbers, for profilers.")] = False,
    python: Annotated[
        list[str] | None, typer.Option(metavar="EXE", help="A further interpreter to build launchers for. Repeatable.")
    ] = None,
    ranks: Annotated[
        int, typer.Option(min=1, help="Of a job: what holds a rank's number is built for each of so many.")
    ] = 1,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default all cores.")] = None,
    show_plan: Annotated[bool, typer.Option("--show-plan", help="Print what would be built; compile nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Build the bundles of a model, for one GPU kind or several."""
    given = _check_inputs(model, plan, ranges or [])
    if misses and plan is not None:
        raise DeclarationError("--misses with --model", "--plan", "misses are added to what a recipe declares")
    miss_file.read(misses or [])  # a mistake in it is found before the seconds that starting the worker takes
    targets, facts = _targets(target or [], given)
    if out is not None and len(targets) > 1:
        raise DeclarationError(
            "one target with --out", f"{len(targets)} targets", "leave --out away, or build each alone"
        )
    requests = [
        Request(
            t,
            store,
            model,
            plan,
            _ranges(ranges or []),
            out,
            line_info,
            tuple(python or ()),
            workers,
            tuple(misses or ()),
            ranks,
        )
        for t in targets
    ]
    if not as_json:
        render.chosen(facts)
        sys.stdout.flush()
    if show_plan:
        _show_plans(requests, facts, as_json)
    else:
        _build_all(requests, facts, as_json)


def _check_inputs(model: str | None, plan: Path | None, ranges: Sequence[str]) -> Plan | None:
    """Find mistakes before the seconds that starting the worker takes; returns the plan, if one is given."""
    if (model is None) == (plan is None):
        found = "neither" if model is None else "both"
        raise DeclarationError("either --model or --plan", found, "name a recipe (`aot-cache models`) or a plan file")
    if plan is None:
        recipe.resolve(str(model))
        return None
    if ranges:
        raise DeclarationError("no --range with --plan", ", ".join(ranges), "a plan's points are already enumerated")
    return Plan.read(plan)


def _ranges(texts: Sequence[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for text in texts:
        dim, equals, values = text.partition("=")
        if not (dim.strip() and equals):
            raise DeclarationError("a range as dimension=values", repr(text), "write --range tokens=1..64")
        if dim.strip() in out:
            raise DeclarationError(f"one range for dimension {dim.strip()!r}", "two", "list values as 1,2,8 in one")
        try:
            out[dim.strip()] = shapes.parse_dimension(values).text
        except DeclarationError as error:
            raise DeclarationError(f"{error.wanted} in --range {text}", error.found, error.do) from error
    return out


def _targets(names: Sequence[str], plan: Plan | None) -> tuple[list[Target], dict[str, Any]]:
    """The targets asked for, else this machine's GPU, else the plan's, else the default; and the facts about that."""
    why, differences = "as asked", []
    if not names:
        names, why = _default_target(plan)
    found: dict[str, Target] = {}
    for name in names:
        if name == "native":
            target, different = native_gpu.native()
            differences += report_builds.differences(target.id, different)
        else:
            target = targets_table.get(name)
        found[target.id] = target
    return list(found.values()), {"targets": list(found), "why": why, "differences": differences}


def _default_target(plan: Plan | None) -> tuple[list[str], str]:
    if plan is not None and plan.target in targets_table.TARGETS:
        return [plan.target], f"the plan's; {HOW_TO_CHOOSE}"
    if gpu_here():
        try:
            native_gpu.native()
        except TargetError as error:
            return [DEFAULT_TARGET], f"the default, because {error.found}; {HOW_TO_CHOOSE}"
        return ["native"], f"this machine's GPU; {HOW_TO_CHOOSE}"
    return [DEFAULT_TARGET], f"the default without a GPU here; {HOW_TO_CHOOSE}"


def gpu_here(devices: Path = Path("/dev"), environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a GPU may be here: from the devices alone, because asking torch takes seconds where there is none."""

    def hidden(*names: str) -> bool:
        return any(environment.get(name, "0").strip() in ("", "-1") for name in names)

    if any(devices.glob("nvidia[0-9]*")):
        return not hidden("CUDA_VISIBLE_DEVICES")
    return (devices / "kfd").exists() and not hidden(
        "CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"
    )


def _show_plans(requests: Sequence[Request], facts: dict[str, Any], as_json: bool) -> None:
    plans = []
    with render.Progress() as progress:
        for request in requests:
            progress.target = request.target.id
            found = pipeline.plan_only(request, progress)
            plans.append(report.plan(found, request.plan or Path(found.recipe), names=parameter_names))
    if as_json:
        render.document({**facts, "plans": plans})
        return
    for one in plans:
        render.line()
        render_bundle.plan_or_bundle(one)


def _build_all(requests: Sequence[Request], facts: dict[str, Any], as_json: bool) -> None:
    done: list[Built] = []
    try:
        with render.Progress() as progress:
            for request in requests:
                progress.target = request.target.id
                done.append(pipeline.build(request, progress))
    finally:  # what was built for the targets before one that cannot be built is there, and is said
        rows = [report_builds.built(one) for one in done]
        if as_json and (rows or not sys.exc_info()[0]):
            render.document({**facts, "bundles": rows})
        elif rows:
            render.builds(rows)
    failed = [f"{one.target}: {failure['kernel']}" for one in done for failure in one.failed]
    if failed:
        units = sum(one.units + one.pruned + one.graphs for one in done) + len(failed)
        names = ", ".join(dict.fromkeys(failed))
        raise CompileFailed(
            f"all of {units} kernels and graphs to compile", f"{len(failed)} failed ({names})", "the rest is kept"
        )


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
        facts = report_misses.misses(miss_file.read(misses or []), misses or [])
        render.document(facts) if as_json else render.misses(facts)
        return
    facts = report_files.facts(path, kernel, points or html is not None, ledger or [])
    if html is not None:
        write_atomic(html, page.page(facts).encode())
        if not as_json:
            render.line(f"page: {html.absolute()}")
            return
    render.document(facts) if as_json else render_bundle.plan_or_bundle(facts)


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
        facts["findings"] = report.findings(bundle, digest, _host_parts(bundle))
    except BundleCorrupt as error:
        facts["findings"] = [report.finding(BundleCorrupt, str(error))]
    code = 0
    for found in facts["findings"]:
        code |= found["code"]
    facts["exit_code"] = code
    render.document(facts) if as_json else render.findings(facts)
    raise typer.Exit(code)


def _host_parts(bundle: Bundle) -> list[Part]:
    from aot_cache.runtime.compatible import parts

    return parts(bundle.manifest, look_at_gpu=gpu_here())


@app.command()
def explain(path: BundlePath, as_json: AsJson = False) -> None:
    """This host beside what a bundle was built for, part by part."""
    bundle = read_bundle(path)
    facts = report.explain(bundle, _host_parts(bundle))
    render.document(facts) if as_json else render.explanation(facts)


@app.command()
def diff(left: PlanPath, right: PlanPath, as_json: AsJson = False) -> None:
    """What each of two plans (or bundles) launches and the other does not; exit 1 when there is anything."""
    facts = report.diff(report_files.side(left), report_files.side(right), parameter_names)
    render.document(facts) if as_json else render.difference(facts)
    raise typer.Exit(0 if facts["same"] else 1)


@app.command()
def targets(as_json: AsJson = False) -> None:
    """The GPU kinds that can be built for, and where their numbers come from."""
    rows = report_builds.targets(targets_table.TARGETS.values())
    render.document({"targets": rows}) if as_json else render.targets(rows)


@app.command()
def models(as_json: AsJson = False) -> None:
    """The recipes that are installed here."""
    found = dict(sorted(recipe.names().items()))
    if as_json:
        render.document({"models": found})
    elif found:
        render.pairs(found, ("model", "recipe"))
    else:
        render.line("no recipe is installed here; build one with --model module:object")


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
    print(f"aot-cache: recorded {what} for {render.clean(plan.target)} in {out}", file=sys.stderr)
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
    from aot_cache.tune import tune as run_tune

    with render.Progress() as progress:
        facts = run_tune(path, out, prune=prune, points=points, progress=progress)
    render.document(facts) if as_json else render.pairs(facts, ("tuned", ""))


if __name__ == "__main__":
    sys.exit(main())
