"""Recipes: which callables of a model run, with what arguments, over which declared ranges.

A recipe is written once and used three times: on the virtual device to enumerate what can be launched, on a GPU to tune
and to check, and (its name) in the bundle, so that a reader knows what was declared.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import os
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from dataclasses import replace as _replace
from importlib import metadata
from pathlib import Path
from typing import Any

from aot_cache.errors import AotCacheError, DeclarationError, UnknownName, did_you_mean, first_cause, one_line
from aot_cache.recipes import options, shipped
from aot_cache.recipes.dimensions import Dimension, Enumeration, Point, describe, enumerate_points

ENTRY_POINTS = "aot_cache.recipes"
MODES = ("inference", "no_grad", "grad")
AUTOCAST = ("bfloat16", "float16")


_device = ["cuda"]


def device() -> str:
    """Where a recipe makes its tensors: `cuda`, or `cpu` while it is built for the target `cpu`."""
    return _device[0]


def set_device(name: str) -> None:
    """Say where recipes make their tensors; the builder does, before it runs one."""
    _device[0] = name


class Call:
    """A function and the arguments to call it with; what a declared case returns.

    >>> Call(torch.add, x, y, alpha=2)
    """

    __slots__ = ("args", "fn", "kwargs")

    def __init__(self, fn: Callable[..., object], /, *args: object, **kwargs: object) -> None:
        self.fn = fn
        self.args = args
        self.kwargs = kwargs

    def __call__(self) -> object:
        return self.fn(*self.args, **self.kwargs)


@dataclass(frozen=True)
class Case:
    """One callable of a recipe: makes the arguments of a point (on device `cuda`) and says what to call with them.

    Args:
        name: unique within the recipe.
        make: takes the point's values by name, returns a `Call`.
        dims: the declared dimensions, in order.
        mode: `inference`, `no_grad` or `grad`: what serving runs under.
        autocast: a dtype name (`"bfloat16"`) when serving runs under `torch.autocast`, else None.
        hint: the value of a dimension that compiled graphs are to be best at; default its largest.
        missed: points that are visited beside the declared ones, because a serving process had them.
        doc: one line for people: the first of the function's docstring.
    """

    name: str
    make: Callable[..., Call]
    dims: Mapping[str, Dimension]
    mode: str = "inference"
    autocast: str | None = None
    hint: Mapping[str, int] = field(default_factory=dict)
    missed: Sequence[Point] = ()
    doc: str = ""

    def points(self) -> Enumeration:
        """Every point that a build visits: what is declared, and at the end what was missed and is not among that."""
        found = enumerate_points(self.dims)
        known = {tuple(point.items()) for point in found.points}
        rows = sorted({tuple((name, point[name]) for name in self.dims) for point in self.missed} - known)
        outside = sum(any(value not in self.dims[name] for name, value in row) for row in rows)
        return Enumeration([*found.points, *map(dict, rows)], found.total + outside, found.sampled, len(rows))

    def call(self, point: Point) -> Call:
        """The call at `point`.

        Raises:
            DeclarationError: when the recipe's code raises or returns something else.
        """
        made = self.make(**point)
        if not isinstance(made, Call):
            raise DeclarationError(
                f"aot_cache.Call(function, *arguments) from case {self.name!r}",
                f"an object of type {type(made).__name__}",
            )
        return made

    def hint_of(self, dim: str) -> int:
        """The value of a dimension that Inductor takes as the size to be good at: the declared one, else the largest."""
        return self.hint.get(dim, max(self.dims[dim].values[0], self.dims[dim].values[-1]))

    @contextlib.contextmanager
    def modes(self, device: str = "cuda") -> Iterator[None]:
        """The grad and autocast mode that the case declares, on `device`."""
        import torch

        grad: Any = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}[self.mode]
        with contextlib.ExitStack() as stack:
            stack.enter_context(grad())
            if self.autocast is not None:
                stack.enter_context(torch.autocast(device, dtype=getattr(torch, self.autocast)))
            yield


def declare(
    *,
    name: str | None = None,
    mode: str = "inference",
    autocast: str | None = None,
    hint: Mapping[str, int] | None = None,
    **dims: Dimension,
) -> Callable[[Callable[..., Call]], Case]:
    """Declare a case: the decorated function makes the `Call` of a point.

    >>> @declare(batch=Range(1, 512), tokens=Range(1, 4))
    ... def decode(batch, tokens):
    ...     q = torch.randn(batch, tokens, 16, 128, dtype=torch.bfloat16, device="cuda")
    ...     return Call(attention_step, q)

    Raises:
        DeclarationError: for an unknown mode, something that is no dimension, or names that do not fit the function.
    """

    def decorate(make: Callable[..., Call]) -> Case:
        label = name or make.__name__
        if mode not in MODES:
            raise DeclarationError(f"mode of case {label!r} to be one of {', '.join(MODES)}", repr(mode))
        if autocast is not None and autocast not in AUTOCAST:
            raise DeclarationError(
                f"autocast of case {label!r} to be one of {', '.join(AUTOCAST)}, or None", repr(autocast)
            )
        for dim, value in dims.items():
            if not isinstance(value, Dimension):
                raise DeclarationError(f"dimension {dim!r} of case {label!r} to be a Range or Values", repr(value))
        accepted = inspect.signature(make).parameters
        unfit = sorted(set(dims) ^ set(accepted))
        if unfit:
            raise DeclarationError(
                f"the parameters of case {label!r} differ from its dimensions: {', '.join(unfit)}",
                hint="name the same ones in @declare(...) and in the function",
            )
        _check_hint(label, hint or {}, dims)
        doc = (inspect.getdoc(make) or "").partition("\n")[0]
        return Case(label, make, dict(dims), mode, autocast, dict(hint or {}), doc=doc)

    return decorate


def _check_hint(label: str, hint: Mapping[str, int], dims: Mapping[str, Dimension]) -> None:
    for dim, value in hint.items():
        if dim not in dims or value not in dims[dim]:
            has = f"{dim} {dims[dim].text}" if dim in dims else f"dimensions {', '.join(dims) or 'none'}"
            raise DeclarationError(
                f"a hint of case {label!r} that is one of its points", f"{dim}={value} (it has {has})"
            )


@dataclass(frozen=True)
class Recipe:
    """A model's cases under one name.

    Args:
        name: what `aot-cache build --model` calls it.
        cases: at least one; names are unique.
        doc: one line for people.
        spec: its name and options as text, which `load` sets.
        settings: what its function made of the options, for the engine that serves with the same ones; None if it has none.
        ranks: how many processes share what it runs, and so sum over each other; 1: each runs all of it, in a job of any size.
    """

    name: str
    cases: Sequence[Case]
    doc: str = ""
    spec: str = field(default="", compare=False)
    settings: Any = field(default=None, compare=False, repr=False)
    ranks: int = 1

    def __post_init__(self) -> None:
        names = [case.name for case in self.cases]
        if not names:
            raise DeclarationError(f"recipe {self.name!r} has no case", hint="declare at least one")
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise DeclarationError(f"recipe {self.name!r} has two cases called {', '.join(twice)}", hint="rename one")
        if self.ranks < 1:
            raise DeclarationError(f"a world size of at least 1 for recipe {self.name!r}", str(self.ranks))

    def narrowed(self, ranges: Mapping[str, Dimension]) -> Recipe:
        """The recipe with `ranges` in place of its own for these dimensions, in every case that has them.

        Raises:
            UnknownName: for a dimension that no case has.
        """
        known = {dim for case in self.cases for dim in case.dims}
        for dim in ranges:
            if dim not in known:
                raise UnknownName(
                    f"recipe {self.name!r} has no dimension {dim!r}; known: {', '.join(sorted(known))}",
                    hint=did_you_mean(dim, known),
                )
        cases = [
            _replace(case, dims={dim: ranges.get(dim, own) for dim, own in case.dims.items()}) for case in self.cases
        ]
        return _replace(self, cases=cases)

    def widened(self, points: Mapping[str, Iterable[Point]]) -> Recipe:
        """The recipe with these points of its cases visited beside the declared ones.

        Args:
            points: case → points, which need not lie within what is declared.

        Raises:
            UnknownName: no case is called so.
            DeclarationError: a point has other dimensions than its case, or a value that no dimension may have.
        """
        for name in points:
            if name not in {case.name for case in self.cases}:
                known = ", ".join(case.name for case in self.cases)
                raise UnknownName(f"recipe {self.name!r} has no case {name!r}; known: {known}")
        cases = []
        for case in self.cases:
            more = list(points.get(case.name, ()))
            describe(more, case.dims)  # says which of them is no point of this case
            cases.append(_replace(case, missed=(*case.missed, *more)))
        return _replace(self, cases=cases)

    def without(self, points: Collection[tuple[str, Point]]) -> Recipe:
        """The recipe with these (case, point) not visited, unless they are declared."""
        cases = [
            _replace(case, missed=[point for point in case.missed if (case.name, point) not in points])
            for case in self.cases
        ]
        return _replace(self, cases=cases)


def names() -> dict[str, str]:
    """Installed recipes: name → `module:object`."""
    return {entry.name: entry.value for entry in metadata.entry_points(group=ENTRY_POINTS)}


def resolve(spec: str) -> str:
    """The `module:object` of a recipe given by its name or as `module:object`, its options left off. Imports nothing.

    Raises:
        UnknownName: when there is no such recipe.
        DeclarationError: when its options are no `?name=value&name=value`.
    """
    name, _ = options.parse(spec)
    if ":" in name:
        return name
    known = names()
    if name in known:
        return known[name]
    raise UnknownName(
        f"unknown model {name!r}; known: {', '.join(sorted(known)) or 'none'}",
        hint=did_you_mean(name, known, "name one of these, or module:object"),
    )


def load(spec: str) -> Recipe:
    """Import the recipe called `spec`: a name or `module:object`, with options as in `qwen3.5?spec=mtp&max_batch=64`.

    What is named is a `Recipe`, a `Case`, or a function that makes one of its keyword options, whose annotations (str, int,
    float, bool, `Literal`) say how their text is read; or a `functools.partial` of one, whose options are fixed.

    Returns:
        The recipe. Its `spec` names the options that are not the function's defaults, sorted.

    Raises:
        UnknownName: when the module, the object or an option is not there.
        DeclarationError: when importing it raises, the object is no recipe, or an option's value is none.
    """
    path = resolve(spec)
    name, given = options.parse(options.with_file(spec))
    module_name, _, attribute = path.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if os.environ.get("AOT_CACHE_DEBUG") == "1":
            traceback.print_exception(first_cause(error))
        own = error.name is None or f"{module_name}.".startswith(f"{error.name}.")  # else one that the recipe imports
        near = did_you_mean(module_name, _modules_nearby() if own else (), "install it, or set PYTHONPATH")
        hint = shipped.to_do_in(module_name, near)
        missing = f"no module named {error.name!r}" if error.name else one_line(first_cause(error))
        what = f"cannot import module {module_name!r} of recipe {name!r}"
        raise UnknownName(f"{what}: {missing}", hint=hint) from error
    except Exception as error:
        hint = shipped.to_do_in(module_name, "fix the recipe's module")
        what = f"cannot import recipe {name!r}: {type(error).__name__}: {error}"
        raise DeclarationError(what, hint=hint) from error
    module = found
    for part in attribute.split("."):
        found = getattr(found, part, None)
    if found is None:
        hint = did_you_mean(attribute, vars(module), "name a Recipe, a declared case, or a function that makes one")
        raise UnknownName(f"no recipe at {path}: {module_name} has no {attribute!r}", hint=hint)
    found, kept = _made(found, name, given)
    if isinstance(found, Case):
        found = Recipe(found.name, [found])
    if not isinstance(found, Recipe):
        raise UnknownName(
            f"a Recipe at {path}",
            f"an object of type {type(found).__name__}",
            "name a Recipe, a declared case, or a function that makes one",
        )
    return _replace(found, spec=options.text(name, kept))


def _modules_nearby() -> set[str]:
    """Names of the modules that lie beside the caller's: what a misspelt one may be."""
    folders = [Path.cwd(), *map(Path, filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)))]
    return {path.stem for folder in folders if folder.is_dir() for path in folder.glob("*.py")}


def _made(found: Any, name: str, given: Mapping[str, str]) -> tuple[Any, dict[str, str]]:
    """(the object, or what it makes of the options; the options that are not its defaults)."""
    if not options.makes_recipes(found):
        for option in given if isinstance(found, (Recipe, Case)) else ():
            raise options.unknown(option, name, {})
        return found, {}
    try:
        return options.make(found, name, given)
    except AotCacheError:
        raise
    except Exception as error:
        hint = shipped.what_to_do(found, "")
        raise DeclarationError(f"recipe {name!r} raised {type(error).__name__}: {error}", hint=hint) from error
