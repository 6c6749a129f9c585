"""`aot-cache build`: its options, what is found wrong before anything starts, and which GPU kinds are built for."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from aot_cache.artifact import rehearsed
from aot_cache.artifact import target as targets_table
from aot_cache.artifact.plan import Plan
from aot_cache.artifact.specialization import parameter_names
from aot_cache.artifact.target import Target
from aot_cache.builder import pipeline
from aot_cache.builder.pipeline import Built, Request
from aot_cache.cli.facts import build as build_facts
from aot_cache.cli.rehearse import After, after_build
from aot_cache.cli.render import build as render_build
from aot_cache.cli.render import terminal
from aot_cache.errors import CompileFailed, DeclarationError, TargetError
from aot_cache.misses import file as miss_file
from aot_cache.recipes import declare as declaring
from aot_cache.recipes import dimensions, from_config
from aot_cache.runtime import host_gpu as native_gpu

DEFAULT_TARGET = "h200"
HOW_TO_CHOOSE = "choose with --target, `aot-cache targets` lists them"

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]


# --- what it takes ----------------------------------------------------------------------------------------------------

Texts = list[str] | None
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|MODULE:OBJECT|CONFIG.JSON", help="The recipe to build, or the model's own config file or folder."
    ),
]
Spec = Annotated[
    str | None, typer.Option(metavar="METHOD", help="Speculative decoding, such as `mtp`; `none` for none.")
]
Drafts = Annotated[int | None, typer.Option(min=1, metavar="N", help="Tokens that are drafted in a step.")]
MaxBatch = Annotated[int | None, typer.Option(min=1, metavar="N", help="The most requests in a batch.")]
MaxLength = Annotated[
    int | None, typer.Option(min=1, metavar="N", help="The most tokens of a request, answer included.")
]
Parallel = Annotated[int | None, typer.Option("--tp", min=1, metavar="N", help="GPUs that a layer is split over.")]
Dtype = Annotated[str | None, typer.Option(metavar="NAME", help="Of weights and activations, such as `bfloat16`.")]
Option = Annotated[Texts, typer.Option(metavar="NAME=VALUE", help="Any option of the recipe. Repeatable.")]
PlanFile = Annotated[Path | None, typer.Option(metavar="FILE", help="A plan to build instead of a recipe.")]
Targets = Annotated[Texts, typer.Option(metavar="T", help="A GPU kind, or `native`. May be repeated.")]
Ranges = Annotated[
    Texts, typer.Option("--range", metavar="DIM=1..64", help="In place of a declared range. Repeatable.")
]
Misses = Annotated[
    list[Path] | None, typer.Option(metavar="FILE", help="What servers missed: built as well. Repeatable.")
]
StoreFolder = Annotated[Path, typer.Option(metavar="DIR", help="Where everything is kept.")]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="The bundle, with one target.")]
LineInfo = Annotated[bool, typer.Option("--line-info", help="Keep line numbers, for profilers.")]
Pythons = Annotated[
    Texts, typer.Option(metavar="EXE", help="A further interpreter to build launchers for. Repeatable.")
]
Ranks = Annotated[
    int | None,
    typer.Option(
        min=1, metavar="N", help="Of a job: what holds a rank's number is built for each. Default: as the recipe says."
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes; default all cores.")]
Rehearse = Annotated[
    bool,
    typer.Option("--rehearse/--no-rehearse", help="Run it as a server does, where that is possible here: target cpu."),
]
ShowPlan = Annotated[bool, typer.Option("--show-plan", help="Print what would be built, and why; compile nothing.")]


def build(
    model: Model = None,
    spec: Spec = None,
    num_speculative_tokens: Drafts = None,
    max_batch: MaxBatch = None,
    max_model_len: MaxLength = None,
    tp: Parallel = None,
    dtype: Dtype = None,
    option: Option = None,
    plan: PlanFile = None,
    target: Targets = None,
    ranges: Ranges = None,
    misses: Misses = None,
    store: StoreFolder = Path("artifacts"),
    out: Out = None,
    line_info: LineInfo = False,
    python: Pythons = None,
    ranks: Ranks = None,
    workers: Workers = None,
    rehearse: Rehearse = True,
    show_plan: ShowPlan = False,
    as_json: AsJson = False,
) -> None:
    """Build the bundles of a model, for one GPU kind or several.

    --spec to --dtype are options that recipes of models have; `--option` gives those that only some recipe has.
    """
    own = {"spec": spec, "num_speculative_tokens": num_speculative_tokens, "max_batch": max_batch}
    own |= {"max_model_len": max_model_len, "tp": tp, "dtype": dtype}
    named = _named(model, _options(own, option or []))
    given = _check_inputs(named, plan, ranges or [], misses or [])
    miss_file.read(misses or [])  # a mistake in it is found before the seconds that starting the worker takes
    targets, facts = _targets(target or [], given)
    if out is not None and len(targets) > 1:
        found = f"{len(targets)} targets"
        raise DeclarationError("one target with --out", found, "leave --out away, or build each alone")
    asked = Request(
        target=targets[0],
        store=store,
        model=named,
        plan=plan,
        ranges=_ranges(ranges or []),
        out=out,
        line_info=line_info,
        pythons=tuple(python or ()),
        workers=workers,
        misses=tuple(misses or ()),
        ranks=ranks,
    )
    requests = [replace(asked, target=one) for one in targets]
    if not as_json:
        render_build.chosen(facts)
        sys.stdout.flush()
    if show_plan:
        _show_plans(requests, facts, as_json)
    else:
        _build_all(requests, facts, as_json, rehearse)


def _options(own: Mapping[str, str | int | None], texts: Sequence[str]) -> dict[str, str]:
    """The recipe's options that were given, as text: those with a name of their own here, and those of --option."""
    out = {name: str(value) for name, value in own.items() if value is not None}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise DeclarationError("an option as name=value", repr(text), "write --option size=4b")
        if name in out:
            raise DeclarationError(f"option {name!r} once", f"{out[name]!r} and {value!r}")
        out[name] = value
    return out


def _named(model: str | None, given: Mapping[str, str]) -> str | None:
    """The spec of the recipe that --model names, with the options."""
    if model is None:
        if given:
            raise DeclarationError("a recipe's options with --model", ", ".join(given), "a plan was made with its own")
        return None
    return from_config.spec_of(model, given)


def _check_inputs(model: str | None, plan: Path | None, ranges: Sequence[str], misses: Sequence[Path]) -> Plan | None:
    """Find mistakes before the seconds that starting the worker takes; returns the plan, if one is given."""
    if (model is None) == (plan is None):
        found = "neither" if model is None else "both"
        raise DeclarationError("either --model or --plan", found, "name a recipe (`aot-cache models`) or a plan file")
    if plan is None:
        declaring.resolve(str(model))
        return None
    if ranges:
        raise DeclarationError("no --range with --plan", ", ".join(ranges), "a plan's points are already enumerated")
    given = Plan.read(plan)
    if misses:
        raise DeclarationError("--misses with --model", "--plan", "misses are added to what a recipe declares")
    return given


def _ranges(texts: Sequence[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for text in texts:
        dim, equals, values = text.partition("=")
        if not (dim.strip() and equals):
            raise DeclarationError("a range as dimension=values", repr(text), "write --range tokens=1..64")
        if dim.strip() in out:
            raise DeclarationError(f"one range for dimension {dim.strip()!r}", "two", "list values as 1,2,8 in one")
        try:
            out[dim.strip()] = dimensions.parse_dimension(values).text
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
            differences += build_facts.differences(target.id, different)
        else:
            target = targets_table.get(name)
        found[target.id] = target
    return list(found.values()), {"targets": list(found), "why": why, "differences": differences}


def _default_target(plan: Plan | None) -> tuple[list[str], str]:
    if plan is not None and plan.target in targets_table.TARGETS:
        return [plan.target], f"the plan's; {HOW_TO_CHOOSE}"
    if native_gpu.gpu_here():
        try:
            native_gpu.native()
        except TargetError as error:
            return [DEFAULT_TARGET], f"the default, because {error.found}; {HOW_TO_CHOOSE}"
        return ["native"], f"this machine's GPU; {HOW_TO_CHOOSE}"
    return [DEFAULT_TARGET], f"the default without a GPU here; {HOW_TO_CHOOSE}"


def _show_plans(requests: Sequence[Request], facts: dict[str, Any], as_json: bool) -> None:
    plans = []
    with terminal.Progress() as progress:
        for request in requests:
            progress.target = request.target.id
            found = pipeline.plan_only(request, progress)
            plans.append(build_facts.plan(found, request.plan or Path(found.recipe), parameter_names))
    if as_json:
        terminal.document({**facts, "plans": plans})
    else:
        for one in plans:
            terminal.line()
            render_build.plan(one)
    lost = [f"{one['target']}: {failure['kernel']}" for one in plans for failure in one["failed"]]
    if lost:
        names = f"{len(lost)} cannot be run ({', '.join(lost)})"
        raise CompileFailed("a plan of all cases", names, "the others are planned without it")


def _build_all(requests: Sequence[Request], facts: dict[str, Any], as_json: bool, rehearse: bool) -> None:
    done: list[Built] = []
    after: dict[str, After] = {}
    try:
        with terminal.Progress() as progress:
            for request in requests:
                progress.target = request.target.id
                done.append(pipeline.build(request, progress))
                if rehearse:
                    after[request.target.id] = after_build(done[-1], request.model, progress)
    finally:  # what was built for the targets before one that cannot be built is there, and is said
        rows = [_facts_of(one, after.get(one.target)) for one in done]
        if as_json and (rows or not sys.exc_info()[0]):
            terminal.document({**facts, "bundles": rows})
        elif rows:
            render_build.builds(rows)
    failed = [f"{one.target}: {failure['kernel']}" for one in done for failure in one.failed]
    if failed:
        units = sum(one.units + one.pruned + one.graphs for one in done) + len(failed)
        names = ", ".join(dict.fromkeys(failed))
        raise CompileFailed(
            f"all of {units} cases, kernels and graphs to be built",
            f"{len(failed)} failed ({names})",
            "the rest is kept",
        )
    for one in after.values():
        if one.error is not None:
            raise one.error


def _facts_of(one: Built, after: After | None) -> dict[str, Any]:
    if after is None:
        return build_facts.built(one, rehearsed.read(one.path, one.digest) if one.digest else rehearsed.NO_STAMP)
    return build_facts.built(one, after.stamp, after.facts())
