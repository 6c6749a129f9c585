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
from aot_cache.builder.engine_start import Engine
from aot_cache.builder.pipeline import Built, Request
from aot_cache.cli import matrix
from aot_cache.cli.command import AsJson, Unfinished
from aot_cache.cli.facts import build as build_facts
from aot_cache.cli.rehearse import After, after_build
from aot_cache.cli.render import build as render_build
from aot_cache.cli.render import terminal
from aot_cache.errors import AotCacheError, CompileFailed, DeclarationError, TargetError
from aot_cache.misses import file as miss_file
from aot_cache.recipes import declare as declaring
from aot_cache.recipes import dimensions, from_config
from aot_cache.runtime import host_gpu as native_gpu

DEFAULT_TARGET = "h200"
DEFAULT_HELP = f"Default: the plan's target with --plan, else this machine's GPU, else {DEFAULT_TARGET}."
HOW_TO_CHOOSE = "choose with --target; `aot-cache targets` lists them"


# --- what it takes ----------------------------------------------------------------------------------------------------


def _target_names(incomplete: str) -> list[str]:
    """For shell completion."""
    return [name for name in (*targets_table.TARGETS, "native") if name.startswith(incomplete)]


def _model_names(incomplete: str) -> list[str]:
    """For shell completion."""
    return [name for name in declaring.names() if name.startswith(incomplete)]


Texts = list[str] | None
Model = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|MODULE:OBJECT|CONFIG.JSON",
        autocompletion=_model_names,
        help="The recipe to build, or a model's config.json or its folder.",
    ),
]
Spec = Annotated[
    str | None, typer.Option(metavar="METHOD", help="Speculative decoding method, such as `mtp`, or `none`.")
]
Drafts = Annotated[int | None, typer.Option(min=1, metavar="N", help="Draft tokens per step.")]
MaxBatch = Annotated[int | None, typer.Option(min=1, metavar="N", help="Largest batch, in requests.")]
MaxLength = Annotated[int | None, typer.Option(min=1, metavar="N", help="Longest request, in tokens, output included.")]
Parallel = Annotated[int | None, typer.Option("--tp", min=1, metavar="N", help="Tensor parallel size.")]
Dtype = Annotated[str | None, typer.Option(metavar="NAME", help="Type of weights and activations, such as `bfloat16`.")]
Option = Annotated[Texts, typer.Option(metavar="NAME=VALUE", help="Set an option of the recipe. Repeatable.")]
PlanFiles = Annotated[
    list[Path] | None,
    typer.Option(
        "--plan", metavar="FILE", help="Build the kernels of a plan file, alone or beside a recipe's. Repeatable."
    ),
]

Targets = Annotated[
    Texts,
    typer.Option(
        "--target",  # said, because typer 0.27 loses the name of an option whose metavar is its name in capitals
        metavar="TARGET",
        autocompletion=_target_names,
        help=f"GPU to build for (see `aot-cache targets`), or `native`: this machine's. Repeatable. {DEFAULT_HELP}",
    ),
]
Ranges = Annotated[Texts, typer.Option("--range", metavar="DIM=1..64", help="Replace a declared range. Repeatable.")]
Misses = Annotated[
    list[Path] | None,
    typer.Option(metavar="FILE", help="Also build what servers missed (AOT_CACHE_MISSES). Repeatable."),
]
StoreFolder = Annotated[Path, typer.Option(metavar="DIR", help="Folder of the store and of the bundles.")]
RemoteStore = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        envvar="AOT_CACHE_REMOTE_STORE",
        help="A folder that builders share (s3://…, gs://…, az://…, file://…): what one of them compiled, no other compiles.",
    ),
]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Path of the bundle; needs a single target.")]
LineInfo = Annotated[bool, typer.Option("--line-info", help="Keep line numbers in kernels, for profilers.")]
Pythons = Annotated[
    Texts, typer.Option(metavar="EXE", help="Build launchers for this Python interpreter, too. Repeatable.")
]
Ranks = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="World size: what depends on the rank is built once per rank. Default: what the recipe says.",
    ),
]
AtStart = Annotated[
    Texts,
    typer.Option(
        metavar="CONSTANT",
        help="Constant of Triton kernels that is known only when the server starts, as `num_blocks` or "
        "`module:kernel.num_blocks`. The server compiles them then, before captures. Repeatable.",
    ),
]
Neighbours = Annotated[
    bool,
    typer.Option(
        "--neighbours/--no-neighbours",
        help="Of an integer that a recording has in two of Triton's classes (1, multiple of 16, other), also build the third.",
    ),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes. Default: all cores.")]
Rehearse = Annotated[
    bool,
    typer.Option(
        "--rehearse/--no-rehearse",
        help="Then run the bundle as a server does, where that is possible here (target cpu).",
    ),
]
ShowPlan = Annotated[bool, typer.Option("--show-plan", help="Print what would be built and why, without compiling.")]

PlanMatrix = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Build each bundle that a JSON file lists: builds (with the options of this command), targets, versions.",
    ),
]
On = Annotated[
    str | None,
    typer.Option(
        metavar="ray|ray://HOST:PORT",
        help="Build each bundle as a task of Ray: of the one that runs here, else one that is started, or of a cluster.",
    ),
]
EngineName = Annotated[
    str | None,
    typer.Option(
        "--engine",
        metavar="NAME",
        help="Build what an engine (vllm, sglang) launches and compiles from its own command line, which follows `--`.",
    ),
]
EngineArguments = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[-- MODEL OPTIONS]",
        help="With --engine: the model, and any options of the engine's own command (`vllm serve`, `sglang serve`).",
        show_default=False,
    ),
]


def build(
    context: typer.Context,
    engine_arguments: EngineArguments = None,
    engine: EngineName = None,
    model: Model = None,
    spec: Spec = None,
    num_speculative_tokens: Drafts = None,
    max_batch: MaxBatch = None,
    max_model_len: MaxLength = None,
    tp: Parallel = None,
    dtype: Dtype = None,
    option: Option = None,
    plan: PlanFiles = None,
    target: Targets = None,
    ranges: Ranges = None,
    misses: Misses = None,
    store: StoreFolder = Path("artifacts"),
    remote_store: RemoteStore = None,
    out: Out = None,
    line_info: LineInfo = False,
    python: Pythons = None,
    ranks: Ranks = None,
    at_start: AtStart = None,
    neighbours: Neighbours = True,
    workers: Workers = None,
    rehearse: Rehearse = True,
    show_plan: ShowPlan = False,
    plan_matrix: PlanMatrix = None,
    on: On = None,
    as_json: AsJson = False,
) -> None:
    """Build the bundles of a model, for one or more targets.

    The options from --spec to --dtype are those of the recipes for models; --option sets any other option of a recipe.
    """
    if plan_matrix is not None or on is not None:
        matrix.build_matrix(context, plan_matrix, on, store, remote_store, workers, show_plan, as_json)
        return
    own = {"spec": spec, "num_speculative_tokens": num_speculative_tokens, "max_batch": max_batch}
    own |= {"max_model_len": max_model_len, "tp": tp, "dtype": dtype}
    named = _named(model, _options(own, option or []))
    started = _engine(engine, engine_arguments or [])
    given = _check_inputs(named, plan or [], ranges or [], started)
    miss_file.read(misses or [])  # a mistake in it is found before the seconds that starting the worker takes
    targets, facts = _targets(target or [], given)
    if out is not None and len(targets) > 1:
        found = f"{len(targets)} targets"
        raise DeclarationError("one target with --out", found, "omit --out, or build each target alone")
    asked = Request(
        target=targets[0],
        store=store,
        remote_store=remote_store or None,
        model=named,
        plans=tuple(plan or ()),
        ranges=_ranges(ranges or []),
        out=out,
        line_info=line_info,
        pythons=tuple(python or ()),
        workers=workers,
        misses=tuple(misses or ()),
        ranks=ranks,
        at_start=tuple(at_start or ()),
        neighbours=neighbours,
        engine=started,
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
            raise DeclarationError(f"option {name!r} is given twice: {out[name]!r} and {value!r}", hint="give it once")
        out[name] = value
    return out


def _named(model: str | None, given: Mapping[str, str]) -> str | None:
    """The spec of the recipe that --model names, with the options."""
    if model is None:
        if given:
            raise DeclarationError(
                f"options of a recipe ({', '.join(given)}) need --model",
                hint="omit them: a plan has its options already",
            )
        return None
    return from_config.spec_of(model, given)


def _engine(name: str | None, arguments: Sequence[str]) -> Engine | None:
    """The engine that --engine names, with its own command line."""
    if name is None and arguments:
        hint = "name a recipe with --model, or write --engine vllm before `--`"
        raise DeclarationError("no arguments without --engine", " ".join(arguments), hint)
    if name is None:
        return None
    if not arguments:
        raise DeclarationError(
            "a model behind `--`", "none", f"write --engine {name} -- MODEL, and the engine's options"
        )
    return Engine(name, tuple(arguments))


def _check_inputs(model: str | None, plans: Sequence[Path], ranges: Sequence[str], engine: Engine | None) -> list[Plan]:
    """Find mistakes before the seconds that starting the worker takes; returns the plans."""
    if model is None and not plans and engine is None:
        hint = "name a recipe (see `aot-cache models`), a plan file or an engine"
        raise DeclarationError("--model, --plan or --engine", "none of them", hint)
    if model is not None:
        declaring.resolve(model)
    elif ranges:
        raise DeclarationError(
            f"--range ({', '.join(ranges)}) needs --model", hint="omit --range: a plan's points are already enumerated"
        )
    return [Plan.read(plan) for plan in plans]


def _ranges(texts: Sequence[str]) -> dict[str, str]:
    out: dict[str, str] = {}
    for text in texts:
        dim, equals, values = text.partition("=")
        if not (dim.strip() and equals):
            raise DeclarationError("a range as dimension=values", repr(text), "write --range tokens=1..64")
        if dim.strip() in out:
            raise DeclarationError(
                f"dimension {dim.strip()!r} has two ranges", hint="list all values in one --range, as in 1,2,8"
            )
        try:
            out[dim.strip()] = dimensions.parse_dimension(values).text
        except DeclarationError as error:
            raise error.within(f"--range {text}") from error
    return out


def _targets(names: Sequence[str], plans: Sequence[Plan]) -> tuple[list[Target], dict[str, Any]]:
    """The targets asked for, else this machine's GPU, else the plan's, else the default; and the facts about that."""
    why, differences = "as requested", []
    if not names:
        names, why = _default_target(plans)
    found: dict[str, Target] = {}
    for name in names:
        if name == "native":
            target, different = native_gpu.native()
            differences += build_facts.differences(target.id, different)
        else:
            target = targets_table.get(name)
        found[target.id] = target
    return list(found.values()), {"targets": list(found), "why": why, "differences": differences}


def _default_target(plans: Sequence[Plan]) -> tuple[list[str], str]:
    told = {plan.target for plan in plans}
    if len(told) == 1 and told <= set(targets_table.TARGETS):
        return [*told], f"the plan's; {HOW_TO_CHOOSE}"
    if native_gpu.gpu_here():
        try:
            native_gpu.native()
        except TargetError as error:
            return [DEFAULT_TARGET], f"the default, because {error.message}; {HOW_TO_CHOOSE}"
        return ["native"], f"this machine's GPU; {HOW_TO_CHOOSE}"
    return [DEFAULT_TARGET], f"the default where no GPU is found; {HOW_TO_CHOOSE}"


def _show_plans(requests: Sequence[Request], facts: dict[str, Any], as_json: bool) -> None:
    plans = []
    with terminal.Progress() as progress:
        for request in requests:
            progress.target = request.target.id
            found = pipeline.plan_only(request, progress)
            path = (*request.plans, Path(found.plan.recipe))[0]
            plans.append(build_facts.of_engine(build_facts.plan(found.plan, path, parameter_names), found.engine))
    failed = _cannot_run(plans)
    if as_json and failed is not None:
        raise Unfinished({**facts, "plans": plans}) from failed
    if as_json:
        terminal.document({**facts, "plans": plans})
        return
    for one in plans:
        terminal.line()
        render_build.plan(one)
    if failed is not None:
        raise failed


def _cannot_run(plans: Sequence[Mapping[str, Any]]) -> CompileFailed | None:
    """The cases that are not in the plans."""
    lost = [f"{one['target']}: {failure['kernel']}" for one in plans for failure in one["failed"]]
    if not lost:
        return None
    what = f"{len(lost)} case{'s' if len(lost) > 1 else ''} cannot run ({', '.join(lost)})"
    return CompileFailed(what, hint="fix what is said above; the other cases are planned")


def _build_all(requests: Sequence[Request], facts: dict[str, Any], as_json: bool, rehearse: bool) -> None:
    done: list[Built] = []
    after: dict[str, After] = {}
    stopped: AotCacheError | KeyboardInterrupt | None = None
    try:
        with terminal.Progress() as progress:
            for request in requests:
                progress.target = request.target.id
                done.append(pipeline.build(request, progress))
                if rehearse:
                    after[request.target.id] = after_build(done[-1], pipeline.model_of(request), progress)
    except (AotCacheError, KeyboardInterrupt) as error:
        stopped = error  # what was built for the targets before this one is there, and is printed
    rows = [_facts_of(one, after.get(one.target)) for one in done]
    stopped = stopped or _failure(done) or next((one.error for one in after.values() if one.error is not None), None)
    if as_json and stopped is not None:
        raise Unfinished({**facts, "bundles": rows} if rows else {}) from stopped
    if as_json:
        terminal.document({**facts, "bundles": rows})
    elif rows:
        render_build.builds(rows)
    if stopped is not None:
        raise stopped


def _failure(done: Sequence[Built]) -> CompileFailed | None:
    """What did not compile, of all targets."""
    failed = [f"{one.target}: {failure['kernel']}" for one in done for failure in one.failed]
    if not failed:
        return None
    units = sum(one.units + one.pruned + one.graphs for one in done) + len(failed)
    names = ", ".join(dict.fromkeys(failed))
    return CompileFailed(
        f"{len(failed)} of {units} cases, kernels and graphs failed ({names})",
        hint="fix what is said above and build again: the rest is kept",
    )


def _facts_of(one: Built, after: After | None) -> dict[str, Any]:
    if after is None:
        return build_facts.built(one, rehearsed.read(one.path, one.digest) if one.digest else rehearsed.NO_STAMP)
    return build_facts.built(one, after.stamp, after.facts())
