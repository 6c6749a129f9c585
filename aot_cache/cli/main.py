"""The command line: parse, call, print. Nothing is decided here that a library user could want.

Exit codes: 0 all is well · 1 the plans of `diff` differ · 2 not understood · 3 and above as `errors` says, such as 4 something
did not compile and 5 a rehearsal did not pass; `verify` adds up 8 corrupt or not trusted, 16 not for this host and 32
incomplete · 128 and the signal's number (130 for Ctrl-C, 143 for SIGTERM) interrupted.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

from aot_cache.artifact import rehearsed
from aot_cache.artifact import target as targets_table
from aot_cache.artifact.key import Part
from aot_cache.artifact.manifest import served
from aot_cache.artifact.plan import Plan
from aot_cache.artifact.specialization import parameter_names
from aot_cache.cli.build import build
from aot_cache.cli.command import (
    LOG,
    AsJson,
    Quiet,
    Unfinished,
    Verbose,
    called,
    failed,
    failure,
    listen,
    own_log,
    prepared,
    wants_json,
)
from aot_cache.cli.facts import build as build_facts
from aot_cache.cli.facts import bundle as bundle_facts
from aot_cache.cli.facts import diff as diff_facts
from aot_cache.cli.facts import files as file_facts
from aot_cache.cli.facts import misses as miss_facts
from aot_cache.cli.facts import signature as signature_facts
from aot_cache.cli.gc import gc
from aot_cache.cli.rehearse import rehearse
from aot_cache.cli.render import bundle as render_bundle
from aot_cache.cli.render import html as html_page
from aot_cache.cli.render import terminal
from aot_cache.cli.sign import sign
from aot_cache.cli.transfer import pull, push
from aot_cache.errors import AotCacheError, BundleCorrupt, DeclarationError
from aot_cache.misses import file as miss_file
from aot_cache.process_group import interruptible
from aot_cache.recipes import declare as declaring
from aot_cache.runtime import host_gpu
from aot_cache.store import Bundle, read_bundle, write_atomic
from aot_cache.tested import installed

P = ParamSpec("P")
app = typer.Typer(pretty_exceptions_enable=False, rich_markup_mode=None)

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle file.")]
PublicKeys = Annotated[
    list[Path] | None,
    typer.Option(
        "--key",
        metavar="PEM",
        help="Check the signature with the public keys in this file. Repeatable. Default: those of AOT_CACHE_TRUSTED_KEYS.",
    ),
]
PlanPath = Annotated[Path, typer.Argument(metavar="PLAN", help="A plan file, or a bundle.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; an error and a hint on stderr for what is the caller's to fix."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    came: list[int] = []
    document: Mapping[str, Any] | None = {} if wants_json(words) else None
    raised: BaseException
    with own_log():
        try:
            with interruptible() as came:
                code = app(args=words, prog_name="aot-cache", standalone_mode=False)
                sys.stdout.flush()
                if not came:  # else typer has caught it
                    return code if isinstance(code, int) else 0
                raised = KeyboardInterrupt()
        except Unfinished as error:
            document, raised = error.document, error.__cause__ or error
        except (Exception, KeyboardInterrupt) as error:
            raised = error
        facts = _facts_of(raised, came, words)
        if facts is None:
            raise raised
        LOG.debug("%s", facts["type"], exc_info=raised)
        return failed(facts, document)


def _facts_of(error: BaseException, came: Sequence[int], words: Sequence[str]) -> Mapping[str, Any] | None:
    """What is printed of an error; None for one that is a bug."""
    if isinstance(error, AotCacheError):
        return error.to_json()
    if isinstance(error, (KeyboardInterrupt, typer.Abort)):
        hint = "run it again to continue: what is done is kept" if called(words) in ("build", "pull") else ""
        return failure("Interrupted", "interrupted", hint, 128 + (came[0] if came else signal.SIGINT))
    # The class of usage errors is click's or typer's own copy of it, by typer's version; both have these.
    if not hasattr(error, "format_message"):
        return None
    context = getattr(error, "ctx", None)
    hint = f"see `{context.command_path} --help`" if context is not None else ""
    return failure("UsageError", error.format_message(), hint, getattr(error, "exit_code", 2))


def _version(asked: bool) -> None:
    if asked:
        terminal.line(f"aot-cache {installed('aot_cache')}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _top(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    verbose: Verbose = 0,
    quiet: Quiet = False,
) -> None:
    """Compile kernels and graphs ahead of time, on a machine without the GPU, and load them where there is one."""
    listen(verbose, quiet)
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def _command(*examples: str, **settings: Any) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Make a function a command, with -v, -q, and examples at the end of its help."""

    def register(function: Callable[P, None]) -> Callable[P, None]:
        run, epilog = prepared(function, examples)
        app.command(epilog=epilog, **settings)(run)
        return function

    return register


_command(
    "aot-cache build --model qwen3.5-4b --target h200",
    "aot-cache build --model my_package.recipes:decode --range batch=1..64 --target h200 --target b200",
    "aot-cache build --model ./Qwen3.5-4B/config.json --tp 2 --max-batch 64 --show-plan",
    "aot-cache build --model qwen3.5-4b --misses misses.jsonl",
    "aot-cache build --engine vllm --target h100 -- MODEL --max-num-seqs 64",
)(build)
_command(
    "aot-cache rehearse artifacts/bundles/qwen3.5-4b-h200.safetensors",
    "aot-cache rehearse model.safetensors --case decode --points 64 --stamp",
)(rehearse)
_command(
    "aot-cache sign model.safetensors --key key.pem",
    "aot-cache sign model.safetensors --show-text > model.txt",
)(sign)
_command(
    "aot-cache push artifacts/bundles/qwen3.5-4b-h200.safetensors registry.example.com/team/qwen3.5-4b:v1",
    "aot-cache push artifacts/bundles/*.safetensors s3://bucket/bundles",
)(push)
_command(
    "aot-cache pull registry.example.com/team/qwen3.5-4b:v1 --out /opt/aot/bundles",
    'aot-cache pull s3://bucket/bundles --out /opt/aot/bundles --digest "$DIGEST"',
)(pull)
_command(
    "aot-cache gc --dry-run",
    "aot-cache gc artifacts --max-size 20GB --older-than 30d --keep 'bundles/qwen*' --wait 600",
)(gc)


# --- looking ----------------------------------------------------------------------------------------------------------


@_command(
    "aot-cache inspect model.safetensors",
    "aot-cache inspect model.safetensors --kernel attention --points",
    "aot-cache inspect model.safetensors --html model.html --ledger stats.json",
    "aot-cache inspect --misses misses.jsonl",
)
def inspect(
    path: Annotated[Path | None, typer.Argument(metavar="BUNDLE", help="A bundle, or a plan file.")] = None,
    kernel: Annotated[
        str | None,
        typer.Option(metavar="SUBSTRING", help="List the specializations of kernels with this in their name."),
    ] = None,
    points: Annotated[bool, typer.Option("--points", help="List every specialization with its points.")] = False,
    misses: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Show what servers missed instead of a bundle. Repeatable."),
    ] = None,
    ledger: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="Show the JSON of aot_cache.stats(), or a misses file, in the grid. Repeatable."
        ),
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write everything to one HTML page instead.")
    ] = None,
    key: PublicKeys = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in a bundle or a plan and which sizes it serves, or what servers missed."""
    if (path is None) == (not misses) or (misses and (kernel or points or ledger or html or key)):
        options = "--kernel, --points, --ledger, --html or --key"
        found = "both" if path is not None else "neither" if not misses else options
        raise DeclarationError("a plan or a bundle, or --misses FILE alone", found, "name one of them")
    if path is None:
        facts = miss_facts.misses(miss_file.read(misses or []), misses or [])
        terminal.document(facts) if as_json else terminal.misses(facts)
        return
    facts = file_facts.facts(path, kernel, points or html is not None, ledger or [], key or [])
    if html is not None:
        write_atomic(html, html_page.page(facts).encode())
        if not as_json:
            terminal.line(f"page: {html.absolute()}")
            return
    terminal.document(facts) if as_json else render_bundle.plan_or_bundle(facts)


@_command(
    "aot-cache verify model.safetensors",
    'aot-cache verify model.safetensors --digest "$DIGEST" --json',
    "aot-cache verify model.safetensors --key public.pem",
)
def verify(
    path: BundlePath,
    digest: Annotated[str | None, typer.Option(metavar="SHA256", help="Report a bundle with another digest.")] = None,
    key: PublicKeys = None,
    as_json: AsJson = False,
) -> None:
    """Check a bundle; the exit code is the sum of 8 (corrupt or not trusted), 16 (not for this host) and 32 (incomplete)."""
    facts: dict[str, Any] = {"path": str(path), "digest": None, "signature": None, "findings": []}
    keys = signature_facts.keys(key or [])
    try:
        bundle = read_bundle(path)
        facts["digest"] = bundle.digest
        facts |= rehearsed.read(path, bundle.digest).facts()
        facts["signature"] = signature_facts.signed(path, bundle.digest, keys)
        facts["findings"] += signature_facts.findings(facts["signature"])
        if digest is None and keys is None:
            facts["findings"] += bundle_facts.place(bundle)
        facts["findings"] += bundle_facts.findings(bundle, digest, _host_parts(bundle))
    except BundleCorrupt as error:
        facts["findings"].append(bundle_facts.finding(BundleCorrupt, str(error)))
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


@_command(
    "aot-cache explain model.safetensors",
)
def explain(path: BundlePath, as_json: AsJson = False) -> None:
    """Compare this host with what a bundle was built for, part by part."""
    bundle = read_bundle(path)
    facts = bundle_facts.explain(bundle, _host_parts(bundle))
    terminal.document(facts) if as_json else terminal.explanation(facts)


@_command(
    "aot-cache diff old.safetensors new.safetensors",
    "aot-cache diff recorded.plan.json model.safetensors --json",
)
def diff(left: PlanPath, right: PlanPath, as_json: AsJson = False) -> None:
    """Compare the kernels and graphs of two plans or bundles; exits with 1 when they differ."""
    facts = diff_facts.diff(file_facts.side(left), file_facts.side(right), parameter_names)
    terminal.document(facts) if as_json else terminal.difference(facts)
    raise typer.Exit(0 if facts["same"] else 1)


@_command(
    "aot-cache targets",
    "aot-cache targets --json",
)
def targets(as_json: AsJson = False) -> None:
    """List the targets, and where their numbers come from."""
    rows = build_facts.targets(targets_table.TARGETS.values())
    terminal.document({"targets": rows}) if as_json else terminal.targets(rows)


@_command(
    "aot-cache models",
)
def models(as_json: AsJson = False) -> None:
    """List the recipes that are installed."""
    found = dict(sorted(declaring.names().items()))
    if as_json:
        terminal.document({"models": found})
    elif found:
        terminal.pairs(found, ("model", "recipe"))
    else:
        terminal.line("no recipe is installed; build one with --model MODULE:OBJECT")


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@_command(
    "aot-cache record --out server.plan.json -- python serve.py --port 8000",
    context_settings={"allow_interspersed_args": False},
)
def record(
    out: Annotated[Path, typer.Option(metavar="PLAN", help="Path of the plan.")],
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="Program to run, with its arguments.")],
    recipe_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="Name of the recipe. Default: the name of the plan file.")
    ] = None,
    candidates: Annotated[
        str,
        typer.Option(
            metavar="WHICH",
            help="Configs of autotuners to record: those that are `launched`, `all`, or only the `chosen` ones.",
        ),
    ] = "launched",
) -> None:
    """Run a program and record the kernels that it launches; exits with the program's exit code."""
    from aot_cache.artifact import engine_cache
    from aot_cache.recordings.plans import CANDIDATES
    from aot_cache.runtime.record import run_command

    which = next((known for known in CANDIDATES if known == candidates), None)
    if which is None:
        raise DeclarationError(f"--candidates to be one of {', '.join(CANDIDATES)}", repr(candidates))
    name = recipe_name or out.name.removesuffix(".json").removesuffix(".plan")
    code, plan = run_command(command, out, name, which)
    # On stderr, because stdout is the program's.
    print(f"aot-cache: recorded {_amount(plan)} for {terminal.clean(plan.target)} in {out}", file=sys.stderr)
    for function in plan.functions:
        if function.why:
            what = f"compiled function {function.function} needs a recipe: {function.why}"
            print(f"aot-cache: {terminal.clean(what)}", file=sys.stderr)
    if plan.caches:
        beside = engine_cache.beside(out)
        size = f"{beside.stat().st_size / 1e6:.1f} MB"
        print(f"aot-cache: recorded the engine's compile cache in {beside} ({size})", file=sys.stderr)
    raise typer.Exit(code if code >= 0 else 128 - code)


def _amount(plan: Plan) -> str:
    kernels = len({unit.kernel for unit in plan.units})
    functions = len({function.function for function in plan.functions if not function.why})
    found = f"{len(plan.units)} specializations of {kernels} kernels, {len(plan.tunings)} choices"
    return f"{found}, {functions} compiled function{'' if functions == 1 else 's'}"


@_command(
    "aot-cache merge server.plan.json draft.plan.json misses.jsonl --out all.plan.json",
)
def merge(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Recorded plans and misses files.")],
    out: Annotated[Path, typer.Option(metavar="PLAN", help="Path of the merged plan.")],
    as_json: AsJson = False,
) -> None:
    """Merge recorded plans, and the kernels that servers missed, into one plan."""
    from aot_cache.artifact import engine_cache
    from aot_cache.builder.merge_files import merge_files

    merged = merge_files(files)
    engine_cache.write_plan(merged.plan, merged.caches, out)
    facts = {
        "plan": str(out),
        "target": merged.plan.target,
        "specializations": len(merged.plan.units),
        "kernels": len({unit.kernel for unit in merged.plan.units}),
        "choices": len(merged.plan.tunings),
        "misses": merged.misses,
        "engine_caches": len(merged.caches.entries),
        "uncovered": [{"name": name, "why": why} for name, why in merged.uncovered],
    }
    if as_json:
        terminal.document(facts)
        return
    terminal.line(f"merged {_amount(merged.plan)} for {merged.plan.target} in {out}")
    for name, why in merged.uncovered:
        terminal.line(f"not merged: {name}: {why}")


@_command(
    "aot-cache tune model.safetensors --out model-tuned.safetensors --prune",
)
def tune(
    path: BundlePath,
    out: Annotated[Path, typer.Option(metavar="FILE", help="Path of the tuned bundle.")],
    prune: Annotated[bool, typer.Option("--prune", help="Drop the configs that were not chosen.")] = False,
    points: Annotated[int, typer.Option(min=1, metavar="N", help="Points at which each choice is measured.")] = 3,
    as_json: AsJson = False,
) -> None:
    """Measure a bundle's configs on this machine's GPU, and write a bundle with the fastest ones."""
    from aot_cache.tuning.kernels import tune as run_tune

    with terminal.Progress() as progress:
        facts = run_tune(path, out, prune=prune, points=points, progress=progress)
    terminal.document(facts) if as_json else terminal.pairs(facts, ("tuned", ""))
